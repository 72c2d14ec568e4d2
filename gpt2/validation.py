"""What composition cannot see: values out of range, keys that contradict each other, files that are not there.

Each fault reads `key: what is wrong, what would be right`. All of them are found at once, before torch is loaded.
"""

import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.config import (
    WHEN_LOADED,
    DataBenchmark,
    DataConfig,
    DistributedConfig,
    EvaluateRun,
    ExportRun,
    GenerateRun,
    GenerationBenchmark,
    GPT2Config,
    InferenceConfig,
    OptunaConfig,
    Run,
    StartupBenchmark,
    TrainingBenchmark,
    TrainingConfig,
    TrainRun,
)
from gpt2.errors import UserError
from gpt2.runtime.dist_env import DistEnv, dist_env, division

Problems = list[str]


def _outside(values: dict[str, Any], bounds: Mapping[str, tuple[float, float, str]], prefix: str) -> Problems:
    """Faults of the numbers that are not within their bounds, both ends included. None (null) is never at fault."""
    return [
        f"{prefix}{key}: {values[key]} is not {wanted}"
        for key, (low, high, wanted) in bounds.items()
        if values[key] is not None and not (low <= values[key] <= high and values[key] < _INFINITY)
    ]


_INFINITY = float("inf")
_TINY = 5e-324  # the smallest positive float: "above 0" as a closed bound
_BELOW_ONE = 1 - 2**-53
COUNT = (1, _INFINITY, "a whole number of at least 1")
COUNT_OR_ZERO = (0, _INFINITY, "a whole number of at least 0")
POSITIVE = (_TINY, _INFINITY, "a finite number above 0")
NOT_NEGATIVE = (0, _INFINITY, "a finite number of at least 0")
PROBABILITY = (0, _BELOW_ONE, "at least 0 and below 1")
FRACTION = (_TINY, _BELOW_ONE, "above 0 and below 1")

_MODEL_BOUNDS = {
    **dict.fromkeys(("vocab_size", "context_length", "d_model", "num_heads", "d_ff"), (1, 10**7, "between 1 and 10^7")),
    "num_layers": (1, 10**4, "between 1 and 10^4"),
    **dict.fromkeys(("dropout", "attention_dropout", "residual_dropout"), PROBABILITY),
    "layer_norm_epsilon": POSITIVE,
    "initializer_range": POSITIVE,
}
_TRAINING_BOUNDS = {
    **dict.fromkeys(("batch_size", "accumulation_steps", "max_epochs", "max_steps", "eval_batches"), COUNT),
    **dict.fromkeys(("save_every", "eval_every", "log_every", "keep_checkpoints"), COUNT),
    **dict.fromkeys(("warmup_steps", "num_workers", "nonfinite_limit"), COUNT_OR_ZERO),
    **dict.fromkeys(("weight_decay", "gradient_clip", "min_learning_rate"), NOT_NEGATIVE),
    **dict.fromkeys(("learning_rate", "epsilon", "max_training_hours"), POSITIVE),
    **dict.fromkeys(("beta1", "beta2", "muon_momentum"), PROBABILITY),
    "decay_fraction": (0, 1, "between 0 and 1"),
    "seed": (0, 2**63 - 1, "between 0 and 2^63 - 1"),
}
_TRAINING_CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "optimizer": ("adamw", "muon"),
    "lr_schedule": ("cosine", "linear", "wsd"),
    "on_nonfinite": ("stop", "skip"),
}
_DATA_BOUNDS = {
    "max_length": COUNT,
    "preprocessing_num_workers": COUNT,
    "vocab_size": (257, 2**31 - 1, "at least 257 (the 256 bytes and <|endoftext|>)"),
    "validation_fraction": FRACTION,
}
_INFERENCE_BOUNDS = {
    **dict.fromkeys(("max_new_tokens", "num_return_sequences", "top_k"), COUNT),
    "temperature": NOT_NEGATIVE,
    "top_p": (_TINY, 1, "above 0 and at most 1"),
    "min_p": (0, 1, "between 0 and 1"),
    "repetition_penalty": (1e-3, 1e3, "between 0.001 and 1000"),
    "seed": (0, 2**63 - 1, "between 0 and 2^63 - 1"),
}
_OPTUNA_BOUNDS: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("n_trials", "timeout"), COUNT),
    **dict.fromkeys(("n_startup_trials", "n_warmup_steps"), COUNT_OR_ZERO),
}
SAMPLERS = ["TPE", "Random", "CmaEs", "GP", "QMC"]
PRUNERS = {  # by Optuna's name: the short one
    "MedianPruner": "median",
    "SuccessiveHalvingPruner": "asha",
    "HyperbandPruner": "hyperband",
    "NopPruner": "none",
}


def validate_model(config: GPT2Config, prefix: str = "model.") -> Problems:
    found = _outside(vars(config), _MODEL_BOUNDS, prefix)
    if not found and config.d_model % config.num_heads:
        fitting = [heads for heads in range(1, config.d_model + 1) if config.d_model % heads == 0]
        nearest = min(fitting, key=lambda heads: abs(heads - config.num_heads))
        found.append(
            f"{prefix}num_heads: {config.num_heads} heads do not divide {prefix}d_model={config.d_model}, "
            f"{nearest} would"
        )
    return found


def typed(defaults: Any, values: dict[str, Any], check: Callable[[Any], Problems]) -> Any:
    """A dataclass with some of its fields replaced, each value held against its field's type, and all against `check`.

    Raises:
        UserError: With all that is wrong with them.
    """
    config, found = OmegaConf.structured(defaults), []
    result = defaults
    for key, value in values.items():
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            found.append(f"{key}: {str(error).splitlines()[0]}")
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a value that refers to another one, which is not there
        found.append(str(error).splitlines()[0])
    if found := found or check(result):
        raise UserError(*found)
    return result


def model_from_file(values: dict[str, Any]) -> GPT2Config:
    """A model's configuration from fields that a file held. Raises UserError with all that is wrong with them."""
    return typed(GPT2Config(), values, lambda config: validate_model(config, prefix=""))


def validate_training(config: TrainingConfig, prefix: str = "train.") -> Problems:
    found = _outside(vars(config), _TRAINING_BOUNDS, prefix)
    lowest = config.min_learning_rate
    if not found and lowest is not None and lowest > config.learning_rate:
        found.append(
            f"{prefix}min_learning_rate: {lowest} is above {prefix}learning_rate={config.learning_rate}, "
            f"the schedule only falls"
        )
    if not isinstance(config.compile, bool) and config.compile != "auto":
        found.append(f"{prefix}compile: {config.compile!r} is none of auto, true, false")
    for key, choices in _TRAINING_CHOICES.items():
        if (value := getattr(config, key)) not in choices:
            found.append(f"{prefix}{key}: {value!r} is none of {', '.join(choices)}")
    if not config.mixed_precision and config.precision in ("bf16", "fp16"):
        found.append(
            f"{prefix}precision: {config.precision} contradicts {prefix}mixed_precision=false, drop one of the two"
        )
    return found + validate_device(config.device, f"{prefix}device")


def validate_device(device: str, key: str) -> Problems:
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        return []
    return [f"{key}: {device!r} is none of auto, cuda, cuda:N, mps, cpu"]


def validate_distributed(distributed: DistributedConfig, train: TrainingConfig, started: DistEnv) -> Problems:
    found = _outside(vars(distributed), {"timeout": (5, 86400, "between 5 and 86400 seconds")}, "distributed.")
    fsdp = "distributed.strategy: fsdp"
    if distributed.strategy == "fsdp" and started.world_size > 1:
        if train.precision == "fp16":
            found.append(f"{fsdp} is for bf16 and fp32, not for train.precision=fp16")
        if train.optimizer == "muon":
            found.append(f"{fsdp} divides the matrices that train.optimizer=muon needs whole; adamw or ddp would do")
        if train.compile is True:
            found.append(f"{fsdp} is not compiled; drop train.compile=true, or take ddp")
    if started.by_torchrun and re.fullmatch(r"mps|cuda:\d+", train.device):
        found.append(f"train.device: {train.device} is one device, each rank needs its own; cuda, cpu or auto would do")
    size, times = train.batch_size, train.accumulation_steps
    parts = division(times, started.world_size)[1] if started.world_size > 1 <= times else 1
    if size % parts:
        nearest = [str(near) for near in (size // parts * parts, -(-size // parts) * parts) if near > 0]
        found.append(
            f"train.batch_size: a step of {size} * train.accumulation_steps={times} blocks cannot be divided over "
            f"{started.world_size} ranks, {' or '.join(nearest)} * {times} can"
        )
    return found


OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def is_on_hub(name: str) -> bool:
    """Whether a trained model of that name is looked for on the Hugging Face Hub: OpenAI's four, and OWNER/NAME.

    A path comes first, also one that leads nowhere from a folder that is here; but not before OpenAI's names: the
    package of this repository is a folder `gpt2`.
    """
    is_named_like_it = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    is_path = Path(name).parent.exists() or Path(name).suffix == ".pth"
    return name in OPENAI or (is_named_like_it and not is_path)


@cache
def files_matching(pattern: str) -> list[str]:
    """The file of that name, or else the files that match it as a pattern; `**` stands for any folders between."""
    return [pattern] if Path(pattern).is_file() else glob(pattern, recursive=True)


def validate_data(config: DataConfig, prefix: str = "data.") -> Problems:
    found = _outside(vars(config), _DATA_BOUNDS, prefix)
    if config.files is not None and not config.files:
        found.append(f"{prefix}files: none is named, a file or a pattern such as 'corpus/**/*.txt' would do")
    if config.files is None and config.dataset_name.startswith((".", "/")) and not Path(config.dataset_name).is_dir():
        found.append(f"{prefix}dataset_name: there is no folder {config.dataset_name} (looked from {Path.cwd()})")
    for pattern in config.files or []:
        if not files_matching(pattern):
            found.append(f"{prefix}files: no file matches {pattern!r} (looked from {Path.cwd()})")
    try:
        re.compile(config.document_start or "")
    except re.error as error:
        found.append(f"{prefix}document_start: {config.document_start!r} is no regular expression: {error}")
    name = config.tokenizer
    if name not in ("bytes", "train") and not is_on_hub(name) and not Path(name).exists():
        found.append(f"{prefix}tokenizer: {name!r} is neither gpt2, bytes nor train, and no folder has that name")
    return found


def validate_inference(config: InferenceConfig, prefix: str = "inference.") -> Problems:
    found = _outside(vars(config), _INFERENCE_BOUNDS, prefix)
    if isinstance(config.stop, str):
        found.append(f"{prefix}stop: a list of texts is wanted, not {config.stop!r}")
    elif "" in config.stop:
        found.append(f"{prefix}stop: an empty text stands everywhere, so nothing would ever be written")
    if config.precision not in ("fp32", "bf16"):
        found.append(f"{prefix}precision: {config.precision!r} is none of fp32, bf16")
    if config.quantization not in (None, "int8"):
        found.append(f"{prefix}quantization: {config.quantization!r} is neither int8 nor none")
    if config.quantization and config.precision != "fp32":
        found.append(
            f"{prefix}precision: {config.precision} contradicts {prefix}quantization={config.quantization}, "
            f"drop one of the two"
        )
    return found


def validate_optuna(config: OptunaConfig, prefix: str = "optuna.") -> Problems:
    found = _outside(vars(config), _OPTUNA_BOUNDS, prefix)
    if config.direction not in ("minimize", "maximize"):
        found.append(f"{prefix}direction: {config.direction!r} is neither minimize nor maximize")
    for key, choices in (("sampler", SAMPLERS), ("pruner", [name for names in PRUNERS.items() for name in names])):
        value = getattr(config, key)
        if value.lower() not in map(str.lower, choices):
            found.append(f"{prefix}{key}: {value!r} is none of {', '.join(choices)}")
    return found


def validate(config: Run) -> Problems:
    """All that is wrong with a composed configuration, a line each; empty when it can run."""
    if isinstance(config, GenerateRun):
        found = _outside(vars(config), {"batch_size": COUNT}, "")
        return found + validate_inference(config.inference) + validate_device(config.device, "device")
    if isinstance(config, EvaluateRun):
        return validate_evaluation(config)
    if isinstance(config, ExportRun):
        return validate_export(config)
    if isinstance(config, GenerationBenchmark):
        return validate_generation_benchmark(config)
    if isinstance(config, TrainingBenchmark):
        return validate_training_benchmark(config)
    if isinstance(config, DataBenchmark):
        found = validate_data(config.data) + validate_training(config.train) + validate_json(config.json)
        return found + _outside(vars(config), {"repetitions": COUNT, "batches": COUNT}, "")
    if isinstance(config, StartupBenchmark):
        return _outside(vars(config), {"repetitions": COUNT}, "") + validate_json(config.json)
    return validate_training_run(config)


def validate_evaluation(config: EvaluateRun) -> Problems:
    length = config.data.max_length
    bounds = {"batch_size": COUNT, "stride": (1, length, f"between 1 and data.max_length={length}")}
    found = _outside(vars(config), bounds, "") + validate_data(config.data) + validate_device(config.device, "device")
    if config.quantization and config.precision != "fp32":
        found.append(f"precision: {config.precision} contradicts quantization={config.quantization}, take fp32")
    if config.output is not None and not _can_be_written(Path(config.output)):
        found.append(f"output: {config.output!r} cannot be written; name a file, in a folder that may be written to")
    return found


def _can_be_written(file: Path) -> bool:
    """Whether a file can be made, and the folders that it lies in."""
    there = next(path for path in (file.absolute(), *file.absolute().parents) if path.exists())
    return (there.is_file() if there == file.absolute() else there.is_dir()) and os.access(there, os.W_OK)


def validate_export(config: ExportRun) -> Problems:
    if config.to is None:
        return ["to: the folder to write is missing, to=FOLDER"]
    if Path(config.to).exists():
        return [f"to: {config.to} is there already; name a folder that is not"]
    return []


def validate_generation_benchmark(config: GenerationBenchmark) -> Problems:
    counts = {"prompt_tokens": COUNT, "new_tokens": (2, _INFINITY, "at least 2"), "repetitions": COUNT}
    found = validate_model(config.model) + validate_device(config.device, "device") + _outside(vars(config), counts, "")
    if not config.batch_sizes or min(config.batch_sizes) < 1:
        found.append(f"batch_sizes: {config.batch_sizes} are not one or more whole numbers of at least 1")
    if not config.formats or set(config.formats) - {"fp32", "bf16", "int8"}:
        found.append(f"formats: {config.formats} are not one or more of fp32, bf16, int8")
    context, prompt = config.model.context_length, config.prompt_tokens
    if not found and prompt + config.new_tokens > context:
        found.append(
            f"new_tokens: {prompt} tokens of a prompt and {config.new_tokens} new ones do not fit into "
            f"model.context_length={context}, prompt_tokens={context // 2} new_tokens={context - context // 2} would"
        )
    return found + validate_json(config.json)


def validate_json(name: str | None) -> Problems:
    if name is None or _can_be_written(Path(name)):
        return []
    return [f"json: {name!r} cannot be written; name a file, in a folder that may be written to"]


def validate_training_benchmark(config: TrainingBenchmark) -> Problems:
    counts = dict.fromkeys(("context", "repetitions", "steps", "warmup", "overhead_steps"), COUNT)
    found = validate_model(config.model) + validate_training(config.train) + _outside(vars(config), counts, "")
    if not config.precisions or set(config.precisions) - {"auto", "fp32", "bf16", "fp16"}:
        found.append(f"precisions: {config.precisions} are not one or more of auto, fp32, bf16, fp16")
    elif not config.train.mixed_precision and {"bf16", "fp16"} & set(config.precisions):
        found.append(f"precisions: {config.precisions} contradict train.mixed_precision=false, drop one of the two")
    if config.context is not None and config.context > config.model.context_length:
        found.append(f"context: {config.context} is above model.context_length={config.model.context_length}")
    file, _, function = (config.peer or "").rpartition(":")
    if config.peer is not None and (not Path(file).is_file() or not function.isidentifier()):
        found.append(f"peer: {config.peer!r} is no FILE.py:FUNCTION, or there is no such file (from {Path.cwd()})")
    return found + validate_json(config.json)


def validate_training_run(config: TrainRun) -> Problems:
    found = [
        *validate_model(config.model),
        *validate_training(config.train),
        *validate_data(config.data),
        *validate_inference(config.inference),
    ]
    for key in WHEN_LOADED:
        if getattr(config.inference, key) != getattr(InferenceConfig(), key):
            found.append(
                f"inference.{key}: the samples of a training are written by the model as it is trained, "
                f"this is for generate.py"
            )
    if config.data.max_length > config.model.context_length:
        found.append(
            f"data.max_length: blocks of {config.data.max_length} tokens do not fit into "
            f"model.context_length={config.model.context_length}"
        )
    found += validate_distributed(config.distributed, config.train, dist_env())
    folder = config.train.checkpoint_dir
    if Path(folder).name != folder or folder in ("", ".."):
        found.append(f"train.checkpoint_dir: {folder!r} must be the plain name of a folder")
    name_is_plain = config.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if not name_is_plain or config.name.startswith(".") or len(config.name) > 100:
        found.append(f"name: {config.name!r} must be letters, digits, '.', '_' and '-', at most 100")
    return found
