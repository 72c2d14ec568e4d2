"""Validation that the schema cannot express: ranges, relations between fields, missing files.

Each problem reads `key: what is wrong, what would be right`. All problems are reported at once. The scripts validate
before they import torch, and the constructors of the Python API validate their arguments.
"""

import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import count
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gpt2.config import (
    EXTRA_LOGGERS,
    OPTIMIZERS,
    TASKS,
    WHEN_LOADED,
    DataConfig,
    DistributedConfig,
    EvaluateRun,
    ExportRun,
    GenerateRun,
    GenerationBenchmark,
    GPT2Config,
    InferenceConfig,
    OptunaConfig,
    TrainingBenchmark,
    TrainingConfig,
    TrainRun,
)
from gpt2.errors import UserError, without_password
from gpt2.runtime.dist_env import DistEnv, dist_env, division
from gpt2.runtime.hub import is_on_hub
from gpt2.runtime.patterns import no_expression, no_file
from gpt2.runtime.plain_values import brief, choices_of, from_plain, options_of, shown

Problems = list[str]
Bounds = Mapping[str, tuple[float, float, str]]  # key: smallest value, largest value, both in words


# ---------------------------------------------------------------------------------------------------------------------
# Single fields

_TINY = 5e-324  # the smallest positive float: "above 0" as a closed bound
_BELOW_ONE = 1 - 2**-53
COUNT = (1, inf, "a whole number of at least 1")
COUNT_OR_ZERO = (0, inf, "a whole number of at least 0")
POSITIVE = (_TINY, inf, "a finite number above 0")
NOT_NEGATIVE = (0, inf, "a finite number of at least 0")
PROBABILITY = (0, _BELOW_ONE, "at least 0 and below 1")
SEED = (0, 2**63 - 1, "between 0 and 2^63 - 1")
MAX_WEIGHTS = 10**12  # of the largest model, which has 4 terabytes
PASSWORD_REFUSED = "a URL with a user or a password, which would be written to all files of the run"
FREE_TEXT_KEYS = ("prompt", "sample_prompt", "stop", "document_start", "started_with", "storage")

BOUNDS: dict[type, Bounds] = {
    GPT2Config: {
        **dict.fromkeys(
            ("vocab_size", "context_length", "d_model", "num_heads", "d_ff", "mup_base_width", "mup_base_head_width"),
            (1, 10**7, "between 1 and 10^7"),
        ),
        "num_layers": (1, 1000, "between 1 and 1000"),
        **dict.fromkeys(("dropout", "attention_dropout", "residual_dropout"), PROBABILITY),
        **dict.fromkeys(("layer_norm_epsilon", "initializer_range"), POSITIVE),
    },
    TrainingConfig: {
        **dict.fromkeys(("batch_size", "accumulation_steps", "max_epochs", "max_steps", "eval_batches"), COUNT),
        "eval_tasks_limit": COUNT,
        **dict.fromkeys(("save_every", "eval_every", "log_every", "keep_checkpoints"), COUNT),
        **dict.fromkeys(("warmup_steps", "num_workers", "nonfinite_limit"), COUNT_OR_ZERO),
        **dict.fromkeys(("weight_decay", "gradient_clip", "min_learning_rate"), NOT_NEGATIVE),
        **dict.fromkeys(("learning_rate", "epsilon", "max_training_hours"), POSITIVE),
        **dict.fromkeys(("beta1", "beta2", "muon_momentum"), PROBABILITY),
        "decay_fraction": (0, 1, "between 0 and 1"),
        "seed": SEED,
    },
    DataConfig: {
        **dict.fromkeys(("max_length", "preprocessing_num_workers"), COUNT),
        "vocab_size": (257, 2**31 - 1, "at least 257 (the 256 bytes and <|endoftext|>)"),
        "validation_fraction": (_TINY, _BELOW_ONE, "above 0 and below 1"),
    },
    InferenceConfig: {
        **dict.fromkeys(("max_new_tokens", "num_return_sequences", "top_k"), COUNT),
        "temperature": NOT_NEGATIVE,
        "top_p": (_TINY, 1, "above 0 and at most 1"),
        "min_p": (0, 1, "between 0 and 1"),
        "repetition_penalty": (1e-3, 1e3, "between 0.001 and 1000"),
        "seed": SEED,
    },
    OptunaConfig: {
        **dict.fromkeys(("n_trials", "timeout"), COUNT),
        **dict.fromkeys(("n_startup_trials", "n_warmup_steps"), COUNT_OR_ZERO),
    },
    DistributedConfig: {"timeout": (5, 86400, "between 5 and 86400 seconds")},
    GenerateRun: {"batch_size": COUNT},
    EvaluateRun: dict.fromkeys(("batch_size", "limit"), COUNT),
    GenerationBenchmark: {
        **dict.fromkeys(("prompt_tokens", "repetitions"), COUNT),
        "new_tokens": (2, inf, "at least 2"),
    },
    TrainingBenchmark: dict.fromkeys(("repetitions", "steps", "warmup"), COUNT),
}


def out_of_bounds(values: Mapping[str, Any], bounds: Bounds, prefix: str) -> Problems:
    """Problems of numbers outside their bounds. The bounds themselves are legal, and so is None (null)."""
    return [
        f"{prefix}{key}: {reprlib.repr(values[key])} is not {wanted}"
        for key, (low, high, wanted) in bounds.items()
        if values[key] is not None and not _is_within(values[key], low, high)
    ]


def _is_within(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and low <= value <= high and value < inf


def validate_lists(config: Any, prefix: str) -> Problems:
    """Problems of lists whose items have a wrong type: OmegaConf accepts lists and mappings as items of any list."""
    problems, words = [], {str: "texts", int: "whole numbers"}
    for key, hint in get_type_hints(type(config)).items():
        value = getattr(config, key)
        for kind in [get_args(option)[0] for option in options_of(hint) if get_origin(option) is list]:
            is_right = value is None or (isinstance(value, list) and all(type(item) is kind for item in value))
            if kind in words and not is_right:
                problems.append(f"{prefix}{key}: {value!r} is not a list of {words[kind]}")
    return problems


def validate_fields(config: Any, prefix: str) -> Problems:
    """Problems of single fields: numbers out of bounds, values that are not a choice, unknown devices, passwords."""
    problems = out_of_bounds(vars(config), BOUNDS.get(type(config), {}), prefix)
    for key, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, key), choices_of(hint)
        if choices and value not in choices:
            problems.append(f"{prefix}{key}: {value!r} is none of {', '.join(map(shown, choices))}")
        elif key == "device" and not (isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value)):
            problems.append(f"{prefix}{key}: {value!r} is none of auto, cuda, cuda:N, mps, cpu")
        elif key not in FREE_TEXT_KEYS and has_password(value):
            problems.append(f"{prefix}{key}: {PASSWORD_REFUSED}")
    return problems


def has_password(value: Any) -> bool:
    """Whether there is a URL with a user or a password in a text or a list of texts."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return any(":/" in text and without_password(text) != text for text in texts)


def replace_checked(config: Any, values: Mapping[str, Any]) -> Any:
    """Replace fields, as `dataclasses.replace` does, by unchecked plain values from a file or a terminal.

    Raises:
        UserError: A key, a type or a value is wrong. The error has all problems.
    """
    result = from_plain(type(config), {**vars(config), **values})
    if problems := validate(result):
        raise UserError(*problems)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Relations between fields, and files that must exist


def validate(config: Any, prefix: str = "") -> Problems:
    """All problems of a configuration dataclass and of those in it, one line each; empty if it can run."""
    problems = validate_lists(config, prefix)
    if not problems:
        problems += validate_fields(config, prefix)
        try:
            problems += RELATIONS.get(type(config), lambda *_: [])(config, prefix)
        except TypeError:  # a field of a wrong type, from Python
            if not problems:
                raise
    for field in fields(config):
        if is_dataclass(value := getattr(config, field.name)):
            problems += validate(value, f"{prefix}{field.name}.")
    return list(dict.fromkeys(problems))


def require_valid(config: Any, prefix: str = "") -> None:
    """Refuse a configuration that cannot run.

    Raises:
        UserError: It is invalid. The error has all problems.
    """
    if problems := validate(config, prefix):
        raise UserError(*problems)


def _model(config: GPT2Config, prefix: str) -> Iterator[str]:
    width, heads = config.d_model, min(config.num_heads, config.d_model)
    if out_of_bounds(vars(config), BOUNDS[GPT2Config], prefix):
        return
    tables, block = (config.vocab_size + config.context_length) * width, width * (4 * width + 2 * config.d_ff)
    if (weights := tables + config.num_layers * block) > MAX_WEIGHTS:
        yield f"{prefix}d_model: {width} makes a model of {weights:.0e} weights, at most {MAX_WEIGHTS:.0e} are allowed"
    elif width % config.num_heads:
        nearest = next(n for away in count() for n in (heads - away, heads + away) if n > 0 and width % n == 0)
        yield f"{prefix}num_heads: {config.num_heads} heads do not divide {prefix}d_model={width}, {nearest} would"


def _training(config: TrainingConfig, prefix: str) -> Iterator[str]:
    lowest = config.min_learning_rate
    if lowest is not None and config.learning_rate < lowest < inf:
        yield (
            f"{prefix}min_learning_rate: {lowest} is above {prefix}learning_rate={config.learning_rate}, "
            f"which is the peak of the schedule"
        )
    if not isinstance(config.compile, bool) and config.compile != "auto":
        yield f"{prefix}compile: {config.compile!r} is none of auto, true, false"
    if (traits := OPTIMIZERS.get(config.optimizer)) and find_spec(traits.package) is None:
        included = ", ".join(name for name, others in OPTIMIZERS.items() if others.package == "torch")
        needed = f"needs the package {traits.package}, pip install -e '.[{config.optimizer.replace('_', '-')}]'"
        yield f"{prefix}optimizer: {config.optimizer} {needed}; {included} need nothing more"
    if config.optimizer == "schedule_free" and not config.beta1:
        yield f"{prefix}beta1: 0 is not for schedule_free, which averages over steps; use a value above 0"
    yield from _tasks(f"{prefix}eval_tasks", config.eval_tasks, config.eval_tasks_folder)
    if not config.mixed_precision and config.precision in ("bf16", "fp16"):
        yield f"{prefix}precision: {config.precision} contradicts {prefix}mixed_precision=false, drop one of the two"


def _tasks(key: str, names: list[str], folder: str | None) -> Iterator[str]:
    for name in names:
        if name not in TASKS:
            nearest = get_close_matches(name, TASKS, n=1)
            hint = f"; {nearest[0]} is the nearest" if nearest else ""
            yield f"{key}: {brief(name)} is none of {', '.join(TASKS)}{hint}"
        elif folder is not None and not Path(folder, TASKS[name]).is_dir():
            yield f"{key}_folder: there is no folder {Path(folder, TASKS[name])} (looked from {Path.cwd()})"


def _data(config: DataConfig, prefix: str) -> Iterator[str]:
    if config.dataset_name.startswith((".", "/")) and not Path(config.dataset_name).is_dir():
        yield f"{prefix}dataset_name: there is no folder {config.dataset_name} (looked from {Path.cwd()})"
    if config.validation_files and not config.files:
        yield f"{prefix}validation_files: {prefix}files, for training, are missing"
    for name, patterns in (("files", config.files), ("validation_files", config.validation_files)):
        if patterns == []:
            yield f"{prefix}{name}: the list is empty; name a file, or a pattern: 'corpus/**/*.txt', or 'tokens/*.bin'"
        for pattern in patterns or []:
            if reason := no_file(pattern):
                yield f"{prefix}{name}: {reason}"
    if config.document_start and (reason := no_expression(config.document_start)):
        yield f"{prefix}document_start: {brief(config.document_start)} is not a regular expression: {reason}"
    name = config.tokenizer
    if name not in ("bytes", "train") and not is_on_hub(name) and not Path(name).exists():
        yield f"{prefix}tokenizer: {name!r} is neither gpt2, bytes nor train, and no folder has that name"


def _inference(config: InferenceConfig, prefix: str) -> Iterator[str]:
    if "" in config.stop:
        yield f"{prefix}stop: an empty text matches everywhere, so nothing would be generated"
    yield from _quantization(config, prefix)


def _quantization(config: InferenceConfig | EvaluateRun, prefix: str) -> Iterator[str]:
    if config.quantization and config.precision not in ("auto", "fp32"):
        quantization = f"{prefix}quantization={config.quantization}"
        yield f"{prefix}precision: {config.precision} contradicts {quantization}, drop one of the two"


def validate_parametrization(model: GPT2Config, train: TrainingConfig) -> Problems:
    if model.parametrization != "mup" or train.optimizer not in OPTIMIZERS or OPTIMIZERS[train.optimizer].scales:
        return []
    scaling = ", ".join(name for name, traits in OPTIMIZERS.items() if traits.scales)
    needs = f"does not scale learning rates by width, as model.parametrization=mup needs; use {scaling}"
    return [f"train.optimizer: {train.optimizer} {needs}"]


def validate_distributed(distributed: DistributedConfig, train: TrainingConfig, started: DistEnv) -> Problems:
    problems = validate_fields(distributed, "distributed.")
    fsdp = "distributed.strategy: fsdp"
    if distributed.strategy == "fsdp" and started.world_size > 1:
        if train.precision == "fp16":
            problems.append(f"{fsdp} is for bf16 and fp32, not for train.precision=fp16")
        if train.optimizer in OPTIMIZERS and not OPTIMIZERS[train.optimizer].sharded:
            problems.append(f"{fsdp} does not support train.optimizer={train.optimizer}, use adamw or ddp")
    if started.by_torchrun and re.fullmatch(r"mps|cuda:\d+", train.device):
        problems.append(
            f"train.device: {train.device} is one device, but each rank needs its own; cuda, cpu or auto would do"
        )
    size, times = train.batch_size, train.accumulation_steps
    parts = division(times, started.world_size)[1] if started.world_size > 1 <= times else 1
    if size % parts:
        nearest = [str(near) for near in (size // parts * parts, -(-size // parts) * parts) if near > 0]
        problems.append(
            f"train.batch_size: a step of {size} * train.accumulation_steps={times} blocks cannot be divided over "
            f"{started.world_size} ranks; {' or '.join(nearest)} * {times} can"
        )
    return problems


def _loggers(config: TrainRun | EvaluateRun | GenerateRun, prefix: str = "") -> Problems:
    """The loggers whose packages are not installed."""
    specs = {name: find_spec(name) for name in config.loggers if name in EXTRA_LOGGERS}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]  # None: a plain folder
    return [f"loggers: {name} is not installed; pip install -e '.[{name}]', or leave it out" for name in missing]


def _train_run(config: TrainRun, prefix: str) -> Iterator[str]:
    yield from _loggers(config)
    yield from validate_distributed(config.distributed, config.train, dist_env())
    yield from validate_parametrization(config.model, config.train)
    for key in WHEN_LOADED:
        if getattr(config.inference, key) != getattr(InferenceConfig(), key):
            yield f"inference.{key}: only for generate.py; samples during training use the model as it is trained"
    if config.data.max_length > config.model.context_length:
        yield (
            f"data.max_length: blocks of {config.data.max_length} tokens do not fit into "
            f"model.context_length={config.model.context_length}"
        )
    folder = config.train.checkpoint_dir
    if Path(folder).name != folder or folder in ("", "..") or len(folder) > 100:
        yield f"train.checkpoint_dir: {folder!r} must be the plain name of a folder, at most 100 characters"
    if not re.fullmatch(r"(?![.-])(?=.*[^\W_])[\w.-]{1,100}", config.name):
        yield f"name: {config.name!r} must be letters, digits, '.', '_' and '-', at most 100, the first not '.' or '-'"


def _evaluate_run(config: EvaluateRun, prefix: str) -> Iterator[str]:
    length = config.data.max_length
    bounds = {"stride": (1, length, f"between 1 and data.max_length={length}")}
    yield from out_of_bounds(vars(config), bounds, prefix)
    yield from _quantization(config, prefix)
    yield from _loggers(config)
    yield from _tasks(f"{prefix}tasks", config.tasks, config.tasks_folder)
    for key in ("limit", "tasks_folder"):
        if getattr(config, key) is not None and not config.tasks:
            yield f"{prefix}tasks: is empty, but {prefix}{key} is only for tasks=[...]"


def _export_run(config: ExportRun, prefix: str) -> Iterator[str]:
    if config.to is None and config.push is None:
        yield "to: the folder to write is missing, to=FOLDER"
    if config.to is not None and os.path.lexists(config.to):
        yield f"to: {config.to} exists already; name a new folder"
    formats = {
        "push": (r"[\w.-]+/[\w.-]+", "OWNER/NAME of a repository on the Hugging Face Hub"),
        "license": (r"[a-z0-9][a-z0-9.-]*", "the name of a licence on the Hugging Face Hub, such as mit or apache-2.0"),
        "language": (
            r"[a-z]{2,3}(-\w+)*( [a-z]{2,3}(-\w+)*)*",
            "the code of a language, such as en, or of several, such as 'en de'",
        ),
    }
    for key, (pattern, wanted) in formats.items():
        if (value := getattr(config, key)) is not None and not re.fullmatch(pattern, value, re.ASCII):
            yield f"{key}: {value!r} is not {wanted}"


def _generation_benchmark(config: GenerationBenchmark, prefix: str) -> Iterator[str]:
    if not config.batch_sizes or min(config.batch_sizes) < 1:
        yield f"batch_sizes: {config.batch_sizes} are not one or more whole numbers of at least 1"
    context, tokens = config.model.context_length, config.prompt_tokens + config.new_tokens
    if tokens > context:
        yield f"new_tokens: prompt_tokens + new_tokens = {tokens} do not fit into model.context_length={context}"


def _training_benchmark(config: TrainingBenchmark, prefix: str) -> Iterator[str]:
    if not config.precisions:
        yield "precisions: the list is empty; name one or more of auto, fp32, bf16, fp16"
    elif not config.train.mixed_precision and {"bf16", "fp16"} & set(config.precisions):
        yield f"precisions: {config.precisions} contradict train.mixed_precision=false, drop one of the two"
    file, _, function = (config.peer or "").rpartition(":")
    if config.peer is not None and (not Path(file).is_file() or not function.isidentifier()):
        yield f"peer: {config.peer!r} must be FILE.py:FUNCTION with an existing file (in {Path.cwd()})"


def _optuna(config: OptunaConfig, prefix: str) -> Iterator[str]:
    if config.direction not in ("minimize", "maximize"):
        yield f"{prefix}direction: {config.direction!r} is none of minimize, maximize"


RELATIONS: dict[type, Callable[[Any, str], Iterable[str]]] = {
    GPT2Config: _model,
    TrainingConfig: _training,
    DataConfig: _data,
    InferenceConfig: _inference,
    OptunaConfig: _optuna,
    TrainRun: _train_run,
    EvaluateRun: _evaluate_run,
    GenerateRun: _loggers,
    ExportRun: _export_run,
    GenerationBenchmark: _generation_benchmark,
    TrainingBenchmark: _training_benchmark,
}
