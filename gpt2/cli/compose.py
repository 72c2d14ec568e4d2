"""Composes `conf/` with Hydra without running anything, and formats overrides and errors."""

import re
import shlex
import warnings
from collections.abc import Iterator, KeysView
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from gpt2.cli.schema import register
from gpt2.config import SCHEMAS, USER_KEYS
from gpt2.errors import UserError, one_line, shortened, without_secrets
from gpt2.runtime.plain_values import flat
from gpt2.runtime.repository import CONF

# outputs/sweeps, which holds the presets of studies, need not exist.
warnings.filterwarnings("ignore", message="provider=hydra.searchpath in main")

# Keys without effect on a run's result.
KEYS_WITHOUT_EFFECT = {
    *USER_KEYS,
    *("sample_prompt", "plan", "profile", "loggers", "resume", "resume_changes", "train.auto_resume"),
    *("train.save_every", "train.keep_checkpoints", "train.log_every", "train.detect_anomaly", "train.deterministic"),
    *("train.eval_tasks", "train.eval_tasks_limit", "train.eval_tasks_folder"),
    *("train.pin_memory", "train.compile", "train.gradient_checkpointing"),
    *("distributed.strategy", "distributed.timeout"),
}

SYNONYMS = {  # nanoGPT's names, and other words: the name of our key, a group, or a key of Hydra
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "d_model",
    "block_size": "context_length",
    "bias": "use_bias",
    "max_iters": "max_steps",
    "warmup_iters": "warmup_steps",
    "min_lr": "min_learning_rate",
    "gradient_accumulation_steps": "accumulation_steps",
    "grad_clip": "gradient_clip",
    "eval_interval": "eval_every",
    "eval_iters": "eval_batches",
    "log_interval": "log_every",
    "dtype": "precision",
    "num_samples": "num_return_sequences",
    "start": "prompt",
    "dataset": "data",
    "out_dir": "hydra.run.dir",
    "n_trials": "hydra.sweeper.n_trials",
}


def compose(name: str, overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """Compose `conf/` and a command line with Hydra.

    Args:
        with_hydra: Keep Hydra's own node.

    Raises:
        HydraException, OmegaConfBaseException: The overrides do not compose.
    """
    composed = _composed(name, tuple(overrides), Path.cwd())
    if isinstance(composed, Exception):
        raise composed.with_traceback(None)  # the cached exception's traceback would grow each time
    composed = deepcopy(composed)
    if not with_hydra:
        with open_dict(composed):
            del composed["hydra"]
    return composed


@contextmanager
def hydra_of(name: str) -> Iterator[None]:
    """Initialize Hydra with `conf/` for a block."""
    register(name)
    if GlobalHydra.instance().is_initialized():  # in a job of a sweep, with the same `conf/`
        yield
    else:
        with hydra.initialize_config_dir(str(CONF), job_name=name):
            yield


@lru_cache(maxsize=8)
def _composed(name: str, overrides: tuple[str, ...], _cwd: Path) -> DictConfig | Exception:
    """The composition or its error, cached: Hydra takes 0.1 s, and a check composes a command line repeatedly."""
    with hydra_of(name):
        try:
            return hydra.compose(name, list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            return error
        except Exception as error:  # noqa: BLE001  # a file that is not YAML, for example: these errors have no common class
            wrapped = ConfigCompositionException(f"{type(error).__name__}: {one_line(error)}")
            wrapped.__cause__ = error
            return wrapped


def group_options(name: str, group: str) -> list[str]:
    """The files that a command line may choose from a group; empty if there is no such group."""
    with hydra_of(name):
        return GlobalHydra.instance().config_loader().get_group_options(group, config_name=name, overrides=[])


@cache
def compose_defaults(name: str, with_hydra: bool = False) -> DictConfig:
    """The configuration without overrides. The callers share it and must not change it.

    Raises:
        UserError: A file of `conf/` is wrong.
    """
    try:
        return compose(name, [], with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{CONF}: {composition_error(error)}") from error


def composition_error(error: Exception) -> str:
    """The problem in one line: from Hydra's message, with the available choices and without the search path."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        first = str(cause).splitlines()[0]
        if schema := schema_without_key(cause):
            return f"{first.partition('. Did you mean')[0]}{did_you_mean(schema, str(cause.key))}"
        return "a list is wanted, [A,B,...]" if "is not a ListConfig" in first else first
    text = str(error).split("Config search path")[0]
    if "No match in the defaults list" in text:
        return "there is no such group here"
    if "Unsupported item value in defaults" in text:
        return "its defaults list has a choice that YAML reads as true, false or a number; put the name into quotes"
    if "An item is already at" in text:
        return "the key exists already, leave out the +"
    if preset := re.match(r"In '(([^/']+)/[^']+)': ConfigKeyError.*Key '\2' not in", text, re.DOTALL):
        return f"{preset[1]}.yaml needs the line `# @package _global_`, because it sets keys of other groups"
    text = re.sub(r"^In '\w+': ", "", text)  # the script's primary file
    problem, *choices = [line.strip() for line in text.splitlines() if line.strip()]
    choices = [choice for choice in choices if choice != "study" and not choice.startswith("_")]  # not for users
    return f"{problem.removesuffix('.')}. {choices[0]} {', '.join(choices[1:])}" if choices else problem


def override_at_fault(error: Exception, overrides: list[str]) -> str | None:
    """The override that is named in Hydra's message about a failed composition; None if none is named."""
    message = str(error).splitlines()[0]
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        ends = f"override {override}", f"Could not find '{key}/{value}'"  # how Hydra's messages end
        if message.endswith(ends) or f"Could not override '{key}'." in message:
            return override
    return None


def schema_without_key(error: OmegaConfBaseException) -> type | None:
    """The command's schema if the error is about a key that it lacks; None for other errors and for keys of Hydra."""
    key, parent = error.full_key or "", error.parent_node
    if not isinstance(error, ConfigAttributeError | ConfigKeyError) or parent is None or key.startswith("hydra."):
        return None
    schema = OmegaConf.get_type(parent._get_root())
    return schema if schema in SCHEMAS.values() else None


def did_you_mean(schema: Any, key: str) -> str:
    """A hint at the keys and groups that the user may have meant.

    They have this name, a synonym or these initials (lr: learning_rate). If there are none, their names contain the
    text or are similar.
    """
    key, words = SYNONYMS.get(key, key), dict[str, list[str]]()
    for full_key in keys_of_schema(schema):
        if full_key.startswith("study."):  # which only a sweep sets
            continue
        group, _, name = full_key.rpartition(".")
        words.setdefault(name, []).append(full_key)
        words.setdefault("".join(part[0] for part in name.split("_")), []).append(full_key)
        words.setdefault(group, [group])
    similar = [key] if key in words else [word for word in words if key in word][:3] or get_close_matches(key, words)
    found = dict.fromkeys([key] if key.startswith("hydra.") else (full for word in similar for full in words[word]))
    keys = ", ".join(f"'{full_key}'" for full_key in found)
    return f". Did you mean{' one of' if len(found) > 1 else ''}: {keys}?" if keys else "; --help lists the keys"


def keyed_error(error: Exception, key: str | None = None) -> str:
    """The composition error after the key of the wrong value, if OmegaConf names the key."""
    key = key or getattr(error, "full_key", None)
    return f"{key}: {composition_error(error)}" if key else composition_error(error)


def parsed(overrides: list[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar. The results are cached and must not be changed."""
    return [_parsed(override) for override in overrides]


@lru_cache(maxsize=1000)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_overrides([override])[0]


def without_sweeps(overrides: list[str]) -> list[str]:
    return [str(override.input_line) for override in parsed(overrides) if not override.is_sweep_override()]


def overrides_of(hydra_node: Any, kind: str = "task") -> list[str]:
    """The overrides in Hydra's node as typed. (Access to a single one would resolve its interpolations.)"""
    plain = OmegaConf.to_container(hydra_node.overrides)
    assert isinstance(plain, dict)
    return plain[kind]


def keys_of_schema(schema: Any) -> KeysView[str]:
    """The full keys of a schema, in the order of their declaration."""
    return flat(asdict(schema())).keys()


def as_argument(key: str, value: Any) -> str:
    """`key=value` quoted for the shell and for Hydra's grammar."""
    return shlex.quote(f"{key}={hydra_syntax(value)}")


def escaped(value: Any) -> Any:
    """Escape `${` in the texts of a plain value, so that OmegaConf and Hydra read no interpolation."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as a file that OmegaConf and Hydra read back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(values)))


def hydra_syntax(value: Any) -> str:
    """A value in the syntax of Hydra's overrides, which parse it to the same value."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra_syntax, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower()
    is_plain = re.fullmatch(r"[\w./:-]+", value) and parsed([f"key={value}"])[0].value() == value  # not `null` or `1e3`
    return value if is_plain else QuotedString(escaped(value), Quote.double).with_quotes()


def preset(overrides: list[str], searched: set[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """A command line as a preset: the groups it chooses, and the values that differ from those of the groups.

    Args:
        searched: Keys whose values are listed even if they do not differ.
    """
    composed, defaults = compose("train", overrides, with_hydra=True), compose_defaults("train", with_hydra=True)
    chosen, usual = (whole.hydra.runtime.choices for whole in (composed, defaults))
    choices = {
        str(group): str(choice)
        for group, choice in chosen.items()
        if choice not in (None, usual.get(group)) and group.split("/")[0] not in ("hydra", "hparams_search", "wandb")
    }
    before = leaves(compose("train", [f"{group}={choice}" for group, choice in choices.items()]))
    values = leaves(compose("train", overrides)).items()
    return choices, {key: value for key, value in values if key in searched or value != before.get(key)}


def title(overrides: list[str]) -> str:
    """A short name of a run, from its command line: `model=gpt2_xl train.seed=2` becomes `gpt2_xl seed=2`.

    Keys without effect on the result and long values are left out; numbers with many digits are rounded.
    """
    words: dict[str, str] = {}  # if a key is repeated, its last value counts
    try:
        arguments = parsed(overrides)
    except HydraException:  # overrides from a checkpoint may be anything
        return ""
    for override in arguments:
        key, value = override.key_or_group, str(override.input_line).partition("=")[2]
        if key in KEYS_WITHOUT_EFFECT or key.startswith("hydra.") or key == "wandb":
            continue
        if re.fullmatch(r"\d+\.\d{6,}(e-?\d+)?", value):  # a sampled number
            value = f"{float(value):.4g}"
        last = key.rpartition(".")[2]
        words[key] = f"{last}={value if len(value) <= 40 else '…'}" if "." in key else value
    return shortened(without_secrets(" ".join(words.values())), 100)


def keys_of(overrides: list[str]) -> set[str]:
    """The keys and groups that a command line sets."""
    return {override.key_or_group for override in parsed(overrides)}


def leaves(config: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """The values of a configuration by their full keys. A list is one value."""
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return flat(plain)  # type: ignore[arg-type]  # our keys are texts
