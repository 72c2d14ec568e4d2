"""Registers the dataclasses of `gpt2.config` as Hydra's schemas, and the resolvers that `conf/` uses."""

import math
import secrets
import sysconfig
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from gpt2.config import (
    DoctorRun,
    EvaluateRun,
    ExportRun,
    GenerateRun,
    GenerationBenchmark,
    Run,
    StudyConfig,
    TrainingBenchmark,
    TrainRun,
)

SCHEMAS: dict[str, type[Run]] = {
    "train": TrainRun,
    "evaluate": EvaluateRun,
    "generate": GenerateRun,
    "export": ExportRun,
    "benchmark_generation": GenerationBenchmark,
    "benchmark_training": TrainingBenchmark,
    "doctor": DoctorRun,
}


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


def register() -> None:
    """Register the schema of each command and of a study, and the resolvers."""
    store = ConfigStore.instance()
    Plugins.instance()  # imports the Optuna plugin, which stores its own samplers
    store.repo["hydra"]["sweeper"].pop("sampler", None)  # ours are in conf/hydra/sweeper/sampler
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    store.store(group="hydra/sweeper", name="study", node=StudyConfig)
    OmegaConf.register_resolver("steps", steps_for_tokens, replace=True)
    OmegaConf.register_resolver("steps_of_compute", steps_of_compute, replace=True)
    OmegaConf.register_resolver("times", lambda factor, value: max(1, round(factor * value)), replace=True)
    OmegaConf.register_resolver("divide", lambda value, by: math.ceil(value / by), replace=True)
    OmegaConf.register_resolver("repository", lambda: str(Path(__file__).resolve().parents[2]), replace=True)
    OmegaConf.register_resolver("python_library", lambda: sysconfig.get_path("stdlib"), replace=True)
    OmegaConf.register_resolver("suffix", lambda: secrets.token_hex(2), use_cache=True, replace=True)


register()
