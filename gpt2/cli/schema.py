"""The dataclasses of `gpt2.config` as schemas of Hydra, and the resolvers that `conf/` uses."""

import math
import secrets
import sysconfig
from collections.abc import Callable
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from gpt2.config import SCHEMAS, StudyConfig
from gpt2.runtime.repository import ROOT


def steps_for_tokens(tokens: Any, _root_: DictConfig) -> int:
    """The steps that train on a number of tokens, at the batch size of the run: `train.max_steps=${steps:1e9}`."""
    per_step = _root_.train.batch_size * _root_.train.accumulation_steps * _root_.data.max_length
    return max(1, round(tokens / per_step))


def steps_of_compute(flops: Any, _root_: DictConfig) -> int:
    """The steps that take a number of FLOPs: 6 for each token and weight, without embeddings (Kaplan et al., 2020).

    By this measure models of different shapes are compared at equal compute.
    """
    model = _root_.model
    weights = model.num_layers * model.d_model * (4 * model.d_model + 2 * model.d_ff)
    return steps_for_tokens(flops / (6 * weights), _root_)


RESOLVERS: dict[str, Callable[..., Any]] = {
    "steps": steps_for_tokens,
    "steps_of_compute": steps_of_compute,
    "times": lambda factor, value: max(1, round(factor * value)),
    "divide": lambda value, by: math.ceil(value / by),
    "repository": lambda: str(ROOT),
    "python_library": lambda: sysconfig.get_path("stdlib"),
}


@cache
def register(name: str) -> None:
    """Register the schemas of one command and of studies, but no others: each takes OmegaConf up to 20 ms."""
    store = ConfigStore.instance()
    Plugins.instance()  # imports the Optuna plugin, which stores its own samplers
    store.repo["hydra"]["sweeper"].pop("sampler", None)  # the samplers are those in conf/hydra/sweeper/sampler
    store.store(name=f"{name}_schema", node=SCHEMAS[name], replace=True)
    store.store(group="hydra/sweeper", name="study", node=StudyConfig, replace=True)


for _name, _function in RESOLVERS.items():
    OmegaConf.register_resolver(_name, _function, replace=True)
OmegaConf.register_resolver("suffix", lambda: secrets.token_hex(2), use_cache=True, replace=True)  # one per composition
