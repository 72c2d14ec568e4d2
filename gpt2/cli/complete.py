"""Turns what Hydra composed into the dataclass that runs: typed, validated, and filled in from a checkpoint.

From a checkpoint come the model's shape, its tokenizer, sampling options and data, or the whole configuration of a run
to resume. They replace defaults, never what the command line sets.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.checkpoint.pretrained import TrainedModel, finetuning_config, open_model, open_tokenizer
from gpt2.cli.compose import CONF, WITHOUT_EFFECT, compose_defaults, composition_error, keys_of, leaves, merged, parsed
from gpt2.cli.schema import SCHEMAS
from gpt2.config import WHEN_LOADED, GenerateRun, GPT2Config, Run, TrainRun
from gpt2.errors import UserError
from gpt2.validation import validate

# The keys that a resumed run may change: those without effect on its result, and those that say how long it trains.
CHANGEABLE = WITHOUT_EFFECT | {
    *("train.max_steps", "train.max_epochs", "train.max_training_hours", "train.eval_every"),
    *("train.on_nonfinite", "train.nonfinite_limit"),
}


def resolve(name: str, composed: DictConfig, overrides: list[str]) -> Run:
    """A composed configuration as a validated dataclass, filled in from the checkpoint that it names.

    Raises:
        UserError: With all problems.
    """
    try:
        plain = {key: value for key, value in OmegaConf.to_container(composed).items() if key != "hydra"}  # type: ignore
        composed = merged(SCHEMAS[name], plain)  # rejects keys that `+key=value` added past the schema
        composed = COMPLETIONS[name](composed, overrides)
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(composition_error(error)) from error
    assert isinstance(config, Run)
    if isinstance(config, TrainRun) and config.resume is None:
        config.started_with = [text for text in overrides if not text.startswith(("resume=", "hydra.", "study."))]
    if isinstance(config, TrainRun | GenerateRun):  # shells and Hydra keep a backslash and an n as two characters
        config.inference.stop = [stop.replace("\\n", "\n") for stop in config.inference.stop]
    if problems := validate(config):
        raise UserError(*problems)
    return config


def with_group_of(saved: dict[str, Any], group: str, composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Take a group from a saved configuration, except for keys that the command line sets.

    If the command line chooses a file of the group, the saved one is ignored.
    """
    if group in keys_of(overrides):
        return composed
    result = merged(OmegaConf.get_type(composed), composed, {group: saved[group]})  # type: ignore[arg-type]
    for override in parsed(overrides):
        if override.key_or_group.startswith(f"{group}."):
            OmegaConf.update(result, override.key_or_group, override.value())
    return result


def fill_from_checkpoint_generate(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Sampling options of the run that trained the model."""
    trained = open_model(composed.checkpoint)
    composed.checkpoint = trained.source
    if not trained.run:
        return composed
    sampling = {key: value for key, value in trained.run["inference"].items() if key not in WHEN_LOADED}
    return with_group_of({"inference": sampling}, "inference", composed, overrides)


def fill_from_checkpoint_evaluate(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Data and tokenizer of the run that trained the model, and windows as long as its blocks."""
    trained = open_model(composed.checkpoint)
    composed.checkpoint = trained.source
    run = trained.run
    if run:
        composed = with_group_of(run, "data", composed, overrides)
    keys, context = keys_of(overrides), trained.config.context_length
    problems = use_tokenizer_of(trained, "checkpoint", composed, keys)
    if "data.max_length" not in keys:
        composed.data.max_length = run["data"]["max_length"] if run else context
    elif composed.data.max_length > context:
        problems.append(
            f"data.max_length: windows of {composed.data.max_length} tokens do not fit into the context of "
            f"checkpoint={trained.source}, {context}"
        )
    if problems:
        raise UserError(*problems)
    return composed


def fill_from_checkpoint_train(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of the run to resume, or the shape and tokenizer of the model in `train.init_from`."""
    if composed.resume is not None:
        path = resumed_checkpoint(composed.resume)
        if path is not None:
            return with_configuration_of_run(path, composed, overrides)
        if not composed.train.auto_resume:
            raise UserError(f"resume: {composed.resume} is no run folder with a checkpoint in it")
        composed.resume = None  # it ended before its first checkpoint: start from the beginning
    if composed.train.init_from is None:
        return composed
    trained = open_model(composed.train.init_from, "train.init_from")
    keys = keys_of(overrides)
    chosen = {key.removeprefix("model.") for key in keys}
    chosen |= {key for key in vars(GPT2Config()) if OmegaConf.is_interpolation(composed.model, key)}
    for override in parsed(overrides):
        if override.key_or_group == "model":
            chosen |= set(map(str, OmegaConf.load(CONF / "model" / f"{override.value()}.yaml")))
    requested = OmegaConf.to_object(composed.model)
    assert isinstance(requested, GPT2Config)
    problems = use_tokenizer_of(trained, "train.init_from", composed, keys)
    try:
        composed.model = finetuning_config(trained, requested, chosen)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    composed.train.init_from = trained.source
    return composed


def use_tokenizer_of(trained: TrainedModel, key: str, composed: DictConfig, keys: set[str]) -> list[str]:
    """Set `data.tokenizer` to that of a trained model, whose token ids mean nothing under another tokenizer.

    Returns the problems: the command line sets another tokenizer, the model has none, or it has fewer tokens.
    """
    wanted, model = composed.data.tokenizer, f"{key}={trained.source}"
    if "data.vocab_size" in keys:
        return [f"data.vocab_size: only a newly trained tokenizer has it, and {model} has its own tokenizer"]
    if "data.tokenizer" not in keys:
        try:
            tokenizer = trained.tokenizer_for_text()
        except UserError as error:
            return [f"data.tokenizer: {error}; name the tokenizer that it was trained with"]
        composed.data.tokenizer = trained.source if trained.tokenizer else "gpt2"  # the result of `tokenizer_for_text`
    elif wanted == "train":
        return [
            f"data.tokenizer: {model} does not know the tokens of a new tokenizer; leave it out to use the model's own"
        ]
    else:
        try:
            tokenizer = open_tokenizer(wanted)
        except UserError as error:
            return error.problems
        if trained.tokenizer is not None and tokenizer.fingerprint != trained.tokenizer.fingerprint:
            return [f"data.tokenizer: {wanted} is not the tokenizer of {model}; leave it out to use that one"]
    if tokenizer.ids_in_use > trained.config.vocab_size:
        known = trained.config.vocab_size
        return [f"data.tokenizer: its {tokenizer.ids_in_use} tokens are more than the {known} that {model} knows"]
    return []


def resumed_checkpoint(resume: str) -> Path | None:
    """The newest intact checkpoint of a run folder, or of the latest run; None if it has no checkpoint.

    Raises:
        UserError: All checkpoints are damaged.
    """
    folder = run_folder.checkpoint_folder_of(run_folder.latest_run() if resume == "latest" else Path(resume))
    return folder and run_folder.first_intact(run_folder.newest_first(folder))


def with_configuration_of_run(path: Path, composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration that a run was started with, and the changes to it that the command line may make."""
    record = checkpoint.read_record(path)
    saved, done = record["run"], record["progress"]["step"]
    if saved is None:
        raise UserError(f"resume: {path} was not written by train.py, so it holds no configuration to resume with")
    result = merged(TrainRun, saved)
    result.resume_changes = False
    problems: list[str] = []
    requested = requested_changes(composed, overrides, set(saved["started_with"]))
    for key, new in requested.items():
        old = OmegaConf.select(result, key)
        if key in CHANGEABLE or (new != old and composed.resume_changes):
            OmegaConf.update(result, key, new)
        elif new != old:
            problems.append(f"{key}: {new} was requested, but the run has {old}; resume_changes=true allows the change")
    if result.train.max_steps is not None and result.train.max_steps < done:
        problems.append(f"train.max_steps: the run has made {done} steps already, more than {result.train.max_steps}")
    if problems:
        raise UserError(*problems)
    result.resume, result.study = str(path), composed.study
    if result.data.tokenizer not in ("train", "bytes") and "data.tokenizer" not in requested:
        result.data.tokenizer = str(path)  # its folder may be gone, the checkpoint holds a copy
    return result


def requested_changes(composed: DictConfig, overrides: list[str], known: set[str]) -> dict[str, Any]:
    """The values that a command line requests, key by key, including those of the groups and presets that it chooses.

    An argument that the run was started with (`known`) requests nothing, unless its key is in CHANGEABLE: an earlier
    resumption may have changed it, so repeating it changes it back. With auto_resume the whole command line is repeated
    and requests nothing.
    """
    wanted, default = leaves(composed), leaves(compose_defaults("train"))
    requested: dict[str, Any] = {}
    for override in parsed(overrides):
        key = override.key_or_group
        may_differ = key in CHANGEABLE and not composed.train.auto_resume
        if key.startswith(("hydra.", "study.")) or (override.input_line in known and not may_differ):
            continue
        if key in wanted:
            requested[key] = wanted[key]
        elif key in composed and OmegaConf.is_dict(composed[key]):
            requested |= {leaf: value for leaf, value in wanted.items() if leaf.startswith(f"{key}.")}
        else:  # a preset
            requested |= {leaf: value for leaf, value in wanted.items() if value != default.get(leaf)}
    return requested


COMPLETIONS: dict[str, Callable[[DictConfig, list[str]], DictConfig]] = {
    "train": fill_from_checkpoint_train,
    "evaluate": fill_from_checkpoint_evaluate,
    "generate": fill_from_checkpoint_generate,
    **dict.fromkeys(("export", "benchmark_generation", "benchmark_training"), lambda composed, _: composed),
}
