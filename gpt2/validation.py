"""Validation that the schema cannot express: ranges, relations between fields, missing files.

Each problem reads `key: what is wrong, what would be right`. All problems are reported at once. The scripts validate
before they import torch; the constructors of the Python API validate what they are given.
"""

import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import count
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
    StudyConfig,
    TrainingBenchmark,
    TrainingConfig,
    TrainRun,
)
from gpt2.errors import UserError, without_password
from gpt2.runtime.dist_env import DistEnv, dist_env, division
from gpt2.runtime.hub import is_on_hub
from gpt2.runtime.patterns import no_expression, no_file

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
FRACTION = (_TINY, _BELOW_ONE, "above 0 and below 1")
SEED = (0, 2**63 - 1, "between 0 and 2^63 - 1")
MOST_WEIGHTS = 10**12  # of a model: 4 terabytes
NO_PASSWORD = "a URL with a user or a password; it would be in all files of the run"
HOLDS_ANY_TEXT = ("prompt", "sample_prompt", "stop", "document_start", "started_with", "storage")

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
        "validation_fraction": FRACTION,
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
    """Problems of the numbers that are not within their bounds, both ends included. None (null) is always legal."""
    return [
        f"{prefix}{key}: {reprlib.repr(values[key])} is not {wanted}"
        for key, (low, high, wanted) in bounds.items()
        if values[key] is not None and not (low <= values[key] <= high and values[key] < inf)
    ]


def validate_lists(config: Any, prefix: str) -> Problems:
    """Problems of lists: OmegaConf accepts a list or a mapping inside a list, and Python accepts everything."""
    problems, words = [], {str: "texts", int: "whole numbers"}
    for key, hint in get_type_hints(type(config)).items():
        items = [get_args(option)[0] for option in _options(hint) if get_origin(option) is list]
        kind = next((words_of for words_of in (str, int) if words_of in items), None)
        value = getattr(config, key)
        if kind and value is not None and not (isinstance(value, list) and all(type(item) is kind for item in value)):
            problems.append(f"{prefix}{key}: {value!r} is not a list of {words[kind]}")
    return problems


def validate_fields(config: Any, prefix: str) -> Problems:
    """Problems of single fields: numbers out of bounds, values that are not among the choices, names of no device."""
    problems = out_of_bounds(vars(config), BOUNDS.get(type(config), {}), prefix)
    for key, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, key), choices_of(hint)
        if choices and value not in choices:
            problems.append(f"{prefix}{key}: {value!r} is none of {', '.join(map(_shown, choices))}")
        elif key == "device" and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            problems.append(f"{prefix}{key}: {value!r} is none of auto, cuda, cuda:N, mps, cpu")
        elif key not in HOLDS_ANY_TEXT and has_password(value):
            problems.append(f"{prefix}{key}: {NO_PASSWORD}")
    return problems


def has_password(value: Any) -> bool:
    """Whether there is a URL with a user or a password in a text or a list of texts."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return any(":/" in text and without_password(text) != text for text in texts)


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of `Literal[...]`, and None where it is optional; empty for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    inner = [choice for option in _options(hint) if option is not hint for choice in choices_of(option)]
    return (*inner, None) if inner else ()


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; otherwise the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _shown(choice: Any) -> str:
    return "null" if choice is None else str(choice)


# ---------------------------------------------------------------------------------------------------------------------
# Values from files and from a session


def replace_checked(config: Any, values: Mapping[str, Any]) -> Any:
    """`dataclasses.replace` for plain values from a file or a terminal, whose keys, types and ranges may be wrong.

    Raises:
        UserError: With all problems.
    """
    result = from_plain(type(config), {**vars(config), **values})
    if problems := validate(result):
        raise UserError(*problems)
    return result


NO_SUCH_KEY = "there is no such key"


def from_plain(kind: type, values: Any, prefix: str = "") -> Any:
    """An instance of a dataclass from the plain values of a file, whose keys and types may be wrong. Ranges may be too.

    A value that is missing is the default of its field; a dataclass inside must not be missing.

    Raises:
        UserError: With all problems.
    """
    problems: Problems = []
    result = _instance(kind, values, prefix, problems)
    if problems:
        raise UserError(*problems)
    return result


def _instance(kind: type, values: Any, prefix: str, problems: Problems) -> Any:
    """See `from_plain`; None if anything was added to `problems`."""
    if not isinstance(values, dict):
        problems.append(f"{prefix.rstrip('.')}: {brief(values)} is not a group of keys and values")
        return None
    hints, arguments = get_type_hints(kind), {}
    unknown = [key for key in values if key not in hints]
    problems += [f"{prefix}{key}: {NO_SUCH_KEY}; there are {', '.join(hints)}" for key in map(brief, unknown)]
    for field in fields(kind):
        key, options = field.name, _options(hints[field.name])
        nested = next(filter(is_dataclass, options), None)
        if key not in values:
            if nested or field.default is field.default_factory is MISSING:
                problems.append(f"{prefix}{key}: missing")
        elif nested and not (values[key] is None and NoneType in options):
            arguments[key] = _instance(nested, values[key], f"{prefix}{key}.", problems)  # type: ignore[arg-type]
        else:
            try:
                arguments[key] = _as_type(values[key], hints[key])
            except ValueError as error:
                problems.append(f"{prefix}{key}: {error}")
    return None if problems else kind(**arguments)


def brief(value: Any) -> str:
    """A value of a file in a message: short, in one line, and a name without quotes."""
    return value if isinstance(value, str) and value.isidentifier() and len(value) < 30 else reprlib.repr(value)


_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
_IN_WORDS |= {list: "a list", dict: "a group of keys and values"}


def _as_type(value: Any, hint: Any) -> Any:
    """A value as an instance of a field's type. A text that is a number counts: YAML reads 1e-3 as a text.

    Raises:
        ValueError: It has another type; the message says in words which one is expected.
    """
    for option in _options(hint):
        kind, inner = get_origin(option), get_args(option)
        if option is Any or type(value) is option or value in choices_of(option):
            return value
        if kind is list and isinstance(value, list):
            return [_as_type(item, inner[0]) for item in value]
        if kind is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: _as_type(item, inner[1]) for key, item in value.items()}
        if option is float and type(value) in (int, str):
            with suppress(ValueError, OverflowError):
                return float(value)
    words = (
        _IN_WORDS.get(option) or ", ".join(map(_shown, choices_of(option))) or _IN_WORDS[get_origin(option)]
        for option in _options(hint)
    )
    raise ValueError(f"{reprlib.repr(value)} is not {' or '.join(words)}")


# ---------------------------------------------------------------------------------------------------------------------
# Relations between fields, and files that must exist


def validate(config: Any, prefix: str = "") -> Problems:
    """All problems of a configuration dataclass and of those in it, one line each; empty if it can run."""
    problems = validate_lists(config, prefix)
    if not problems:
        problems += validate_fields(config, prefix)
        problems += RELATIONS.get(type(config), lambda *_: [])(config, prefix)
    for field in fields(config):
        if is_dataclass(value := getattr(config, field.name)):
            problems += validate(value, f"{prefix}{field.name}.")
    return list(dict.fromkeys(problems))


def _model(config: GPT2Config, prefix: str) -> Problems:
    width, heads = config.d_model, min(config.num_heads, config.d_model)
    if out_of_bounds(vars(config), BOUNDS[GPT2Config], prefix):
        return []
    tables, block = (config.vocab_size + config.context_length) * width, width * (4 * width + 2 * config.d_ff)
    if (weights := tables + config.num_layers * block) > MOST_WEIGHTS:
        return [
            f"{prefix}d_model: {width} makes a model of {weights:.0e} weights, at most {MOST_WEIGHTS:.0e} are allowed"
        ]
    if width % config.num_heads == 0:
        return []
    nearest = next(n for away in count() for n in (heads - away, heads + away) if n > 0 and width % n == 0)
    return [f"{prefix}num_heads: {config.num_heads} heads do not divide {prefix}d_model={width}, {nearest} would"]


def _training(config: TrainingConfig, prefix: str) -> Iterator[str]:
    lowest = config.min_learning_rate
    if lowest is not None and config.learning_rate < lowest < inf:
        yield (
            f"{prefix}min_learning_rate: {lowest} is above {prefix}learning_rate={config.learning_rate}, "
            f"but the schedule only falls"
        )
    if not isinstance(config.compile, bool) and config.compile != "auto":
        yield f"{prefix}compile: {config.compile!r} is none of auto, true, false"
    if (traits := OPTIMIZERS.get(config.optimizer)) and find_spec(traits.package) is None:
        included = ", ".join(name for name, others in OPTIMIZERS.items() if others.package == "torch")
        needed = f"needs the package {traits.package}, pip install -e '.[{config.optimizer}]'"
        yield f"{prefix}optimizer: {config.optimizer} {needed}; {included} need nothing more"
    if config.optimizer == "schedule_free" and not config.beta1:
        yield f"{prefix}beta1: 0 leaves schedule_free nothing to average, a value above 0 would do"
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
    if config.files == []:
        yield f"{prefix}files: the list is empty; name a file, or a pattern: 'corpus/**/*.txt', or 'tokens/*.bin'"
    if config.dataset_name.startswith((".", "/")) and not Path(config.dataset_name).is_dir():
        yield f"{prefix}dataset_name: there is no folder {config.dataset_name} (looked from {Path.cwd()})"
    for pattern in config.files or []:
        if reason := no_file(pattern):
            yield f"{prefix}files: {reason}"
    if config.document_start and (reason := no_expression(config.document_start)):
        yield f"{prefix}document_start: {brief(config.document_start)} is not a regular expression: {reason}"
    name = config.tokenizer
    if name not in ("bytes", "train") and not is_on_hub(name) and not Path(name).exists():
        yield f"{prefix}tokenizer: {name!r} is neither gpt2, bytes nor train, and no folder has that name"


def _inference(config: InferenceConfig, prefix: str) -> Iterator[str]:
    if isinstance(config.stop, str):
        yield f"{prefix}stop: a list of texts is wanted, not {config.stop!r}"
    elif "" in config.stop:
        yield f"{prefix}stop: an empty text matches everywhere, so nothing would be generated"
    yield from _quantization(config, prefix)


def _quantization(config: InferenceConfig | EvaluateRun, prefix: str) -> Problems:
    if not config.quantization or config.precision in ("auto", "fp32"):
        return []
    quantization = f"{prefix}quantization={config.quantization}"
    return [f"{prefix}precision: {config.precision} contradicts {quantization}, drop one of the two"]


def validate_parametrization(model: GPT2Config, train: TrainingConfig) -> Problems:
    if model.parametrization != "mup" or train.optimizer not in OPTIMIZERS or OPTIMIZERS[train.optimizer].scales:
        return []
    scaling = ", ".join(name for name, traits in OPTIMIZERS.items() if traits.scales)
    return [
        f"train.optimizer: {train.optimizer} has no rate by width, as model.parametrization=mup needs; use {scaling}"
    ]


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
            f"{started.world_size} ranks, {' or '.join(nearest)} * {times} can"
        )
    return problems


def _loggers(config: TrainRun | EvaluateRun | GenerateRun, prefix: str = "") -> Problems:
    """Loggers whose packages are not installed."""
    specs = {name: find_spec(name) for name in config.loggers if name in EXTRA_LOGGERS}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]  # None: just a folder
    return [f"loggers: {name} is not installed; pip install -e '.[{name}]', or leave it out" for name in missing]


def _train_run(config: TrainRun, prefix: str) -> Iterator[str]:
    yield from _loggers(config)
    yield from validate_distributed(config.distributed, config.train, dist_env())
    yield from validate_parametrization(config.model, config.train)
    for key in WHEN_LOADED:
        if getattr(config.inference, key) != getattr(InferenceConfig(), key):
            yield f"inference.{key}: only for generate.py; samples during training use the weights that are trained"
    if config.data.max_length > config.model.context_length:
        yield (
            f"data.max_length: blocks of {config.data.max_length} tokens do not fit into "
            f"model.context_length={config.model.context_length}"
        )
    folder = config.train.checkpoint_dir
    if Path(folder).name != folder or folder in ("", "..") or len(folder) > 100:
        yield f"train.checkpoint_dir: {folder!r} must be the plain name of a folder, at most 100 characters"
    if not re.fullmatch(r"(?![.-])(?=.*[^\W_])[\w.-]{1,100}", config.name):
        yield f"name: {config.name!r} must be letters, digits, '.', '_' and '-', at most 100, the first no '.' or '-'"


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
        yield f"to: {config.to} exists already; name a folder that does not"
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
    if not config.precisions or set(config.precisions) - {"auto", "fp32", "bf16", "fp16"}:
        yield f"precisions: {config.precisions} are not one or more of auto, fp32, bf16, fp16"
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
    StudyConfig: _optuna,
    TrainRun: _train_run,
    EvaluateRun: _evaluate_run,
    GenerateRun: _loggers,
    ExportRun: _export_run,
    GenerationBenchmark: _generation_benchmark,
    TrainingBenchmark: _training_benchmark,
}
