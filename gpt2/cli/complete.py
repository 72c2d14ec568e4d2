"""X."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.checkpoint.pretrained import TrainedModel, finetuning_config, open_model, open_tokenizer
from gpt2.cli.compose import CONF, WITHOUT_PART, compose_or_refuse, composition_error, keys_of, leaves, merged, parsed
from gpt2.cli.schema import SCHEMAS
from gpt2.config import WHEN_LOADED, GenerateRun, GPT2Config, Run, TrainRun
from gpt2.errors import UserError
from gpt2.validation import validate

# What a resumed run may be told anew: that, and how long it goes on.
CHANGEABLE = WITHOUT_PART | {
    *("train.max_steps", "train.max_epochs", "train.max_training_hours", "train.eval_every"),
    *("train.on_nonfinite", "train.nonfinite_limit"),
}


def resolve(name: str, composed: DictConfig, overrides: list[str]) -> Run:
    """A composed configuration as dataclasses, completed by the trained model that it names.

    Raises:
        UserError: With all that is wrong with it.
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
    if isinstance(config, TrainRun | GenerateRun):  # neither a shell nor Hydra makes a line break of it
        config.inference.stop = [stop.replace("\\n", "\n") for stop in config.inference.stop]
    if found := validate(config):
        raise UserError(*found)
    return config


def with_group_of(saved: dict[str, Any], group: str, composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Take a group from a saved configuration, but for what the command line says of it; none of it if it chose one."""
    if group in keys_of(overrides):
        return composed
    result = merged(OmegaConf.get_type(composed), composed, {group: saved[group]})  # type: ignore[arg-type]
    for override in parsed(overrides):
        if override.key_or_group.startswith(f"{group}."):
            OmegaConf.update(result, override.key_or_group, override.value())
    return result


def fill_from_checkpoint_generate(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Sample as the model's own run did."""
    trained = open_model(composed.checkpoint)
    composed.checkpoint = trained.source
    if not trained.run:
        return composed
    sampling = {key: value for key, value in trained.run["inference"].items() if key not in WHEN_LOADED}
    return with_group_of({"inference": sampling}, "inference", composed, overrides)


def fill_from_checkpoint_evaluate(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Evaluate on the data of the model's own run, by its own tokenizer, in windows of the length it was trained on."""
    trained = open_model(composed.checkpoint)
    composed.checkpoint = trained.source
    run = trained.run
    if run:
        composed = with_group_of(run, "data", composed, overrides)
    keys, context = keys_of(overrides), trained.config.context_length
    found = use_tokenizer_of(trained, "checkpoint", composed, keys)
    if "data.max_length" not in keys:
        composed.data.max_length = run["data"]["max_length"] if run else context
    elif composed.data.max_length > context:
        found.append(
            f"data.max_length: windows of {composed.data.max_length} tokens do not fit into the context of "
            f"checkpoint={trained.source}, {context}"
        )
    if found:
        raise UserError(*found)
    return composed


def fill_from_checkpoint_train(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Go on with the configuration of the run that is resumed, or take the shape of the model that is started from."""
    if composed.resume is not None:
        path = resumed_checkpoint(composed.resume)
        if path is not None:
            return with_configuration_of_run(path, composed, overrides)
        if not composed.train.auto_resume:
            raise UserError(f"resume: {composed.resume} is no run folder with a checkpoint in it")
        composed.resume = None  # it ended before its first checkpoint, so it begins anew
    if composed.train.init_from is None:
        return composed
    trained = open_model(composed.train.init_from, "train.init_from")
    keys = keys_of(overrides)
    chosen = {key.removeprefix("model.") for key in keys}
    chosen |= {key for key in vars(GPT2Config()) if OmegaConf.is_interpolation(composed.model, key)}
    for override in parsed(overrides):
        if override.key_or_group == "model":
            chosen |= set(map(str, OmegaConf.load(CONF / "model" / f"{override.value()}.yaml")))
    asked = OmegaConf.to_object(composed.model)
    assert isinstance(asked, GPT2Config)
    found = use_tokenizer_of(trained, "train.init_from", composed, keys)
    try:
        composed.model = finetuning_config(trained, asked, chosen)
    except UserError as error:
        found += error.problems
    if found:
        raise UserError(*found)
    composed.train.init_from = trained.source
    return composed


def use_tokenizer_of(trained: TrainedModel, key: str, composed: DictConfig, keys: set[str]) -> list[str]:
    """Tokenize as a trained model learned to: to it, the tokens of any other tokenizer are other words.

    Returns what is wrong: the command line asks for another one, the model has none, or fewer tokens.
    """
    wanted, model = composed.data.tokenizer, f"{key}={trained.source}"
    if "data.vocab_size" in keys:
        return [f"data.vocab_size: it is for a tokenizer that is made, and {model} has its own"]
    if "data.tokenizer" not in keys:
        try:
            tokenizer = trained.tokenizer_for_text()
        except UserError as error:
            return [f"data.tokenizer: {error}; name the one that it was trained with"]
        composed.data.tokenizer = trained.source if trained.tokenizer else "gpt2"  # what `tokenizer_for_text` gave
    elif wanted == "train":
        return [f"data.tokenizer: the tokens of a new one mean nothing to {model}; left out, it is the model's own"]
    else:
        try:
            tokenizer = open_tokenizer(wanted)
        except UserError as error:
            return error.problems
        if trained.tokenizer is not None and tokenizer.fingerprint != trained.tokenizer.fingerprint:
            return [f"data.tokenizer: {wanted} is not that of {model}; left out, it is"]
    if tokenizer.ids_in_use > trained.config.vocab_size:
        known = trained.config.vocab_size
        return [f"data.tokenizer: its {tokenizer.ids_in_use} tokens are more than the {known} that {model} knows"]
    return []


def fill_from_checkpoint_export(composed: DictConfig, _overrides: list[str]) -> DictConfig:
    composed.checkpoint = open_model(composed.checkpoint).source
    return composed


def fill_from_checkpoint_benchmark(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Take the shape of the trained model, if one is named."""
    if composed.checkpoint is not None:
        if any(key.split(".")[0] == "model" for key in keys_of(overrides)):
            raise UserError("model: checkpoint= brings a model of its own, drop one of the two")
        trained = open_model(composed.checkpoint)
        composed.checkpoint, composed.model = trained.source, trained.config
    return composed


def resumed_checkpoint(resume: str) -> Path | None:
    """The newest intact checkpoint of a run folder, or of the latest run; None if it has none.

    Raises:
        UserError: All that it has are damaged.
    """
    folder = run_folder.checkpoint_folder_of(run_folder.latest_run() if resume == "latest" else Path(resume))
    return folder and run_folder.first_intact(run_folder.newest_first(folder))


def with_configuration_of_run(path: Path, composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration that a run was started with, changed where the command line may change it."""
    record = checkpoint.read_record(path)
    saved, done = record["run"], record["progress"]["step"]
    if saved is None:
        raise UserError(f"resume: {path} was not written by train.py, so it holds no configuration to go on with")
    result = merged(TrainRun, saved)
    result.resume_changes = False
    found: list[str] = []
    asked = requested_changes(composed, overrides, set(saved["started_with"]))
    for key, new in asked.items():
        old = OmegaConf.select(result, key)
        if key in CHANGEABLE or (new != old and composed.resume_changes):
            OmegaConf.update(result, key, new)
        elif new != old:
            found.append(f"{key}: {new} was asked for, the run has {old}; it keeps that unless resume_changes=true")
    if result.train.max_steps is not None and result.train.max_steps < done:
        found.append(f"train.max_steps: the run has made {done} steps already, {result.train.max_steps} is less")
    if found:
        raise UserError(*found)
    result.resume, result.study = str(path), composed.study
    if result.data.tokenizer not in ("train", "bytes") and "data.tokenizer" not in asked:
        result.data.tokenizer = str(path)  # the checkpoint holds what may be gone elsewhere by now
    return result


def requested_changes(composed: DictConfig, overrides: list[str], known: set[str]) -> dict[str, Any]:
    """What a command line says of single values, key by key, also by the groups and presets that it chooses.

    What it was told in the same words when it began (`known`) is no news to a run, but for what may change any time;
    and that is none to one that goes on by itself, for it may have been told since.
    """
    wanted, default = leaves(composed), leaves(compose_or_refuse("train"))
    asked: dict[str, Any] = {}
    for override in parsed(overrides):
        key = override.key_or_group
        may_be_news = key in CHANGEABLE and not composed.train.auto_resume
        if key.startswith(("hydra.", "study.")) or (override.input_line in known and not may_be_news):
            continue
        if key in wanted:
            asked[key] = wanted[key]
        elif key in composed and OmegaConf.is_dict(composed[key]):
            asked |= {leaf: value for leaf, value in wanted.items() if leaf.startswith(f"{key}.")}
        else:  # a preset
            asked |= {leaf: value for leaf, value in wanted.items() if value != default.get(leaf)}
    return asked


COMPLETIONS: dict[str, Callable[[DictConfig, list[str]], DictConfig]] = {
    "train": fill_from_checkpoint_train,
    "evaluate": fill_from_checkpoint_evaluate,
    "generate": fill_from_checkpoint_generate,
    "export": fill_from_checkpoint_export,
    "benchmark_generation": fill_from_checkpoint_benchmark,
    **dict.fromkeys(("benchmark_training", "benchmark_data"), lambda composed, _: composed),
}
