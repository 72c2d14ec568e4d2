"""Turns a composed configuration into a validated dataclass, filled in from the checkpoint that it names.

A checkpoint provides the model's shape, its tokenizer, its sampling options and its data, or the whole configuration of
a run to resume. These values replace defaults, never values that the command line sets.

A checkpoint may come from an untrusted source. Therefore OmegaConf never resolves its texts, because `${oc.env:NAME}`
would read an environment variable, and it provides only the keys of `SAVED_GROUPS` and `SAVED_KEYS` that are not in
`USER_KEYS`.
"""

import logging
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gpt2.checkpoint import run_folder
from gpt2.checkpoint.pretrained import CheckpointModel, TrainedModel, finetuning_config, open_model, open_tokenizer
from gpt2.cli.compose import (
    KEYS_WITHOUT_EFFECT,
    compose_defaults,
    keyed_error,
    keys_of,
    keys_of_schema,
    leaves,
    parsed,
)
from gpt2.config import (
    PARAMETRIZATION,
    SCHEMAS,
    SHAPE,
    USER_KEYS,
    WHEN_LOADED,
    EvaluateRun,
    GenerateRun,
    GPT2Config,
    Run,
    TrainRun,
)
from gpt2.errors import UserError, collecting
from gpt2.runtime.hub import OPENAI
from gpt2.runtime.plain_values import brief
from gpt2.runtime.repository import CONF
from gpt2.tracking.evaluations import default_output
from gpt2.validation import validate

log = logging.getLogger("gpt2")

Values = dict[str, Any]  # plain values by key, such as `train.seed`

# What a run takes from the configuration in a checkpoint, except for USER_KEYS.
SAVED_GROUPS = ("model", "train", "data", "inference", "distributed")
SAVED_KEYS = ("name", "profile", "sample_prompt", "loggers", "started_with", "choices")
LOADING_KEYS = tuple(f"inference.{key}" for key in WHEN_LOADED)  # train.py refuses them
CORPUS_KEYS = re.compile(r"data(\.(?!tokenizer$)|$)|split$|stride$")  # keys of evaluate.py that choose the text

# The keys that a resumed run may change. They have no effect on its result, decide when it ends, or locate its text,
# whose content `Trainer.load_checkpoint` compares.
CHANGEABLE = KEYS_WITHOUT_EFFECT | {
    *("train.max_steps", "train.max_epochs", "train.max_training_hours", "train.eval_every"),
    *("train.on_nonfinite", "train.nonfinite_limit"),
    *("data.files", "data.exclude", "data.validation_files"),
}

# The keys that no resumed run may change.
FIXED = {
    *(f"model.{key}" for key in (*SHAPE, "activation", *PARAMETRIZATION)),
    *("data.tokenizer", "data.vocab_size", "train.init_from"),
}


def resolve(name: str, composed: DictConfig, overrides: list[str]) -> Run:
    """Return a composed configuration as a validated dataclass, filled in from the checkpoint that it names.

    Raises:
        UserError: The configuration is invalid. The error has all problems.
    """
    try:
        composed = typed(name, composed)
        config, *others = [completed(composed, values) for values in COMPLETIONS[name](composed, overrides)]
    except OmegaConfBaseException as error:
        raise UserError(keyed_error(error)) from error
    if isinstance(config, EvaluateRun):
        config.others = others  # type: ignore
    if isinstance(config, TrainRun) and config.resume is None:
        config.started_with = [text for text in overrides if not text.startswith(("resume=", "hydra.", "study."))]
    if problems := list(dict.fromkeys(chain(*map(validate, [config, *others])))):
        raise UserError(*problems)
    if isinstance(config, TrainRun | GenerateRun):  # shells and Hydra keep a backslash and an n as two characters
        config.inference.stop = [stop.replace("\\n", "\n") for stop in config.inference.stop]
    return config


def completed(composed: DictConfig, values: Values) -> Run:
    """The dataclass of a composed configuration, in which values of a checkpoint replace composed ones."""
    composed = deepcopy(composed)
    for key, value in values.items():
        if isinstance(value, int | float):  # an interpolation on the command line may refer to it
            OmegaConf.update(composed, key, value)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Run)
    for key, value in values.items():
        group, _, field = key.rpartition(".")
        setattr(getattr(config, group) if group else config, field, value)
    return config


def typed(name: str, composed: DictConfig) -> DictConfig:
    """A composed configuration without the `hydra` node. It has no unknown keys, which `+key=value` adds.

    Raises:
        OmegaConfBaseException: It has an unknown key.
        UserError: It has missing values.
    """
    if "hydra" in composed:
        composed = deepcopy(composed)
        with open_dict(composed):
            del composed["hydra"]
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise UserError(*(f"{key}: ??? stands for a value that is missing; give one" for key in missing))
    if leaves(composed, resolve=False).keys() - keys_of_schema(SCHEMAS[name]):
        # It raises, unless the key is in a value of type Any.
        OmegaConf.merge(OmegaConf.structured(SCHEMAS[name]), OmegaConf.to_container(composed))
    return composed


def saved_values(run: Mapping[str, Any]) -> Values:
    """The values that a run takes from a configuration in a checkpoint."""
    values = {f"{group}.{key}": value for group in SAVED_GROUPS for key, value in run[group].items()}
    values |= {key: run[key] for key in SAVED_KEYS}
    return {key: value for key, value in values.items() if key not in (*USER_KEYS, *LOADING_KEYS)}


def saved_group(trained: TrainedModel, group: str, keys: set[str]) -> Values:
    """The saved values of a group that the command line does not set; none if it chooses a file of the group."""
    if not trained.run or group in keys:
        return {}
    values = saved_values(trained.run)
    return {key: value for key, value in values.items() if key.startswith(f"{group}.") and key not in keys}


def fill_from_checkpoint_generate(composed: DictConfig, overrides: list[str]) -> Values:
    """The model's path, and the sampling options of the run that trained it."""
    trained = open_model(composed.checkpoint)
    values = saved_group(trained, "inference", keys_of(overrides))
    return {**values, "checkpoint": trained.source}


def fill_from_checkpoint_evaluate(composed: DictConfig, overrides: list[str]) -> list[Values]:
    """For each model: its tokenizer, windows as long as its training blocks, loggers, and the file for its result.

    All models are evaluated on the data of the first one, so that their losses can be compared. Tasks need no data.
    """
    keys, filled = keys_of(overrides), list[Values]()
    of_corpus = sorted(key for key in keys if CORPUS_KEYS.match(key)) if composed.tasks else []
    problems = [f"{key}: has no effect on tasks=[...], which need no corpus; drop one of the two" for key in of_corpus]
    models = [open_model(name) for name in checkpoints_named(composed)]
    data = {} if composed.tasks else saved_group(models[0], "data", keys)
    if "data.files" in keys:  # the run's validation files are no part of other files
        data.pop("data.validation_files", None)
    data |= loggers_of_run(models[0], composed, keys)
    for trained in models:
        values = {**data, "checkpoint": trained.source, "all_checkpoints": False}
        values["output"] = composed.output or str(default_output(trained.source))
        with collecting(problems):
            values["data.tokenizer"] = tokenizer_name(trained, "checkpoint", composed, keys)
        length = context = trained.config.context_length
        if "data.max_length" in keys:
            length = composed.data.max_length
        elif trained.run:
            length = trained.run["data"]["max_length"]
        values["data.max_length"] = length
        if length > context:
            problems.append(
                f"data.max_length: windows of {length} tokens do not fit into the context of {context} tokens of "
                f"checkpoint={trained.source}"
            )
        filled.append(values)
    if problems:
        raise UserError(*problems)
    return filled


def loggers_of_run(trained: TrainedModel, composed: DictConfig, keys: set[str]) -> Values:
    """Of the loggers of `evaluate.py` those that the run had, unless the command line chooses loggers or W&B's mode."""
    if not trained.run or not keys.isdisjoint(("loggers", "wandb", "wandb.mode")):
        return {}
    unused = {"wandb"} if trained.run["wandb"]["mode"] == "off" else set()
    return {"loggers": [name for name in composed.loggers if name in trained.run["loggers"] and name not in unused]}


def checkpoints_named(composed: DictConfig) -> list[str | None]:
    """The names of the trained models to evaluate; None is the latest run's best checkpoint.

    Raises:
        UserError: `checkpoint` is neither a name nor a list of names, or `all_checkpoints` has no run to refer to.
    """
    value = composed.checkpoint
    names = list(value) if OmegaConf.is_list(value) else [value]
    if not names or any(map(OmegaConf.is_config, names)) or (None in names and len(names) > 1):
        raise UserError(f"checkpoint: {brief(OmegaConf.to_container(value))} is neither a name nor a list of names")
    names = [name if name is None else str(name) for name in names]
    if not composed.all_checkpoints:
        return names
    found: list[str | None] = []
    for name in names:
        folder = run_folder.checkpoint_folder_of(run_folder.latest_run() if name is None else Path(name))
        if folder is None:
            hint = run_folder.newest_run_in(Path(str(name)))
            raise UserError(f"all_checkpoints: {name} is no run folder with a checkpoint in it{hint}")
        found += map(str, run_folder.every_step(folder))
    return found


def fill_from_checkpoint_train(composed: DictConfig, overrides: list[str]) -> Values:
    """The configuration of the run to resume, or the shape and tokenizer of the model in `train.init_from`."""
    if composed.resume is not None:
        path = resumed_checkpoint(composed.resume)
        if path is not None:
            return configuration_of_run(path, composed, overrides)
        if not composed.train.auto_resume:
            hint = run_folder.newest_run_in(Path(composed.resume))
            if Path(composed.resume).is_file():
                hint = "; a run is resumed by its folder, and train.init_from=FILE starts a new run from a checkpoint"
            raise UserError(f"resume: {composed.resume} is no run folder with a checkpoint in it{hint}")
    values: Values = {"resume": None}  # a run that ended before its first checkpoint starts from the beginning
    if composed.train.init_from is None:
        return values
    keys, problems = keys_of(overrides), list[str]()
    if composed.plan and composed.train.init_from in OPENAI:  # no download for a known shape
        known = OmegaConf.load(CONF / "model" / f"{composed.train.init_from.replace('-', '_')}.yaml")
        values |= {f"model.{key!s}": value for key, value in known.items() if f"model.{key!s}" not in keys}
        return {**values, "data.tokenizer": "gpt2"}
    trained = open_model(composed.train.init_from, "train.init_from")
    chosen = {key.removeprefix("model.") for key in keys}
    chosen |= {key for key in vars(GPT2Config()) if OmegaConf.is_interpolation(composed.model, key)}
    for override in parsed(overrides):
        if override.key_or_group == "model":
            chosen |= set(map(str, OmegaConf.load(CONF / "model" / f"{override.value()}.yaml")))
    requested = OmegaConf.to_object(composed.model)
    assert isinstance(requested, GPT2Config)
    with collecting(problems):
        values["data.tokenizer"] = tokenizer_name(trained, "train.init_from", composed, keys)
    with collecting(problems):
        shape = finetuning_config(trained, requested, chosen)
        values |= {f"model.{key}": value for key, value in vars(shape).items()}
    if problems:
        raise UserError(*problems)
    return {**values, "train.init_from": trained.source}


def tokenizer_name(trained: TrainedModel, key: str, composed: DictConfig, keys: set[str]) -> str:
    """The value of `data.tokenizer` for a trained model: its token ids are valid only for its own tokenizer.

    Raises:
        UserError: The command line sets another tokenizer, the model has none, or the tokenizer has too many tokens.
    """
    wanted, model = composed.data.tokenizer, f"{key}={trained.source}"
    if "data.vocab_size" in keys:
        raise UserError(f"data.vocab_size: is for a newly trained tokenizer, but {model} has its own tokenizer")
    if "data.tokenizer" not in keys:
        try:
            tokenizer = trained.tokenizer_for_text()
        except UserError as error:
            raise UserError(f"data.tokenizer: {error}; name the tokenizer that it was trained with") from error
        wanted = trained.source if trained.tokenizer else "gpt2"  # the same choice as in `tokenizer_for_text`
    elif wanted == "train":
        raise UserError(
            f"data.tokenizer: {model} was not trained on the tokens of a new tokenizer; leave it out to use its own"
        )
    else:
        tokenizer = open_tokenizer(wanted)
        if trained.tokenizer is not None and tokenizer.fingerprint != trained.tokenizer.fingerprint:
            raise UserError(f"data.tokenizer: {wanted} is not the tokenizer of {model}; leave it out to use its own")
    if tokenizer.ids_in_use > trained.config.vocab_size:
        known = f"{model}, which has {trained.config.vocab_size}"
        raise UserError(f"data.tokenizer: a tokenizer with {tokenizer.ids_in_use} tokens does not fit {known}")
    return str(wanted)


def resumed_checkpoint(resume: str) -> Path | None:
    """The newest intact checkpoint of a run folder, or of the latest run; None if it has no checkpoint.

    Raises:
        UserError: All checkpoints are damaged.
    """
    place = run_folder.latest_run() if resume == "latest" else Path(resume)
    run_folder.name_if_latest(place)
    folder = run_folder.checkpoint_folder_of(place)
    return folder and run_folder.first_intact(run_folder.newest_first(folder))


def configuration_of_run(path: Path, composed: DictConfig, overrides: list[str]) -> Values:
    """The configuration that a run was started with, and the changes to it that the command line may make."""
    trained = CheckpointModel(path)
    record = trained.record
    assert record is not None
    trained.tokenizer  # noqa: B018  # read now, so that a damaged tokenizer is an error even if it is not used
    if record["run"] is None:
        raise UserError(f"resume: {path} was not written by train.py, so it holds no configuration to resume with")
    values, done = saved_values(record["run"]), record["progress"]["step"]
    values["train.checkpoint_dir"] = path.absolute().parent.name  # new checkpoints are written beside it
    requested = requested_changes(composed, overrides, set(values["started_with"]))
    is_other_text = any(key.startswith("data.") and values.get(key, new) != new for key, new in requested.items())
    problems: list[str] = []
    for key, new in requested.items():
        old = values.get(key, new)  # USER_KEYS have no old value
        is_allowed = key in CHANGEABLE or (composed.resume_changes and key not in FIXED)
        if new != old and is_allowed:
            values[key] = new
        elif new != old:
            remedy = "; resume_changes=true allows the change"
            if key in FIXED:
                remedy = "; it is for a new run" if key == "train.init_from" else ", which its weights require"
            problems.append(f"{key}: {new} was requested, but the run has {old}{remedy}")
    limit = values["train.max_steps"]
    if limit is not None and limit < done:
        problems.append(f"train.max_steps: the run has made {done} steps already, more than {limit}")
    if problems:
        raise UserError(*problems)
    if values["data.tokenizer"] != "bytes" and (values["data.tokenizer"] != "train" or is_other_text):
        # Use the copy in the checkpoint: the tokenizer's folder may be gone, and another text gives another tokenizer.
        values["data.tokenizer"] = str(path)
    return {**values, **settings_of_user(record["run"], composed, requested), "resume": str(path)}


def settings_of_user(run: Mapping[str, Any], composed: DictConfig, requested: Values) -> Values:
    """The user's own settings of a resumed run. Logs the saved values of USER_KEYS that are not used.

    A checkpoint may switch W&B off, but not on.
    """
    values: Values = {"resume_changes": requested.get("resume_changes", False)}
    if composed.train.auto_resume:  # the command line repeats all settings
        return values
    if run["wandb"]["mode"] in ("off", "offline") and "wandb.mode" not in requested:
        values["wandb.mode"] = run["wandb"]["mode"]
    saved = {key: run[group][name] for key in USER_KEYS for group, _, name in [key.partition(".")]}
    unused = [
        key
        for key in USER_KEYS
        if not key.endswith("workers")  # their number affects only the speed
        and key not in requested
        and saved[key] != values.get(key, OmegaConf.select(composed, key))
    ]
    if unused:
        log.info(f"Note    not taken from the checkpoint: {', '.join(unused)}. Repeat them on the command line.")
    return values


def requested_changes(composed: DictConfig, overrides: list[str], known: set[str]) -> Values:
    """The values that a command line requests, key by key, including those of the groups and presets that it chooses.

    An argument that the run was started with (`known`) is no request, unless its key is in CHANGEABLE: an earlier
    resumption may have changed the value, so repeating the argument changes it back. With `train.auto_resume` the whole
    command line is repeated, and no argument is a request.
    """
    wanted, default = leaves(composed), leaves(compose_defaults("train"))
    requested: Values = {}
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


# The values that complete a configuration; for evaluate.py one set for each checkpoint.
COMPLETIONS: dict[str, Callable[[DictConfig, list[str]], list[Values]]] = {
    "train": lambda *composed: [fill_from_checkpoint_train(*composed)],
    "evaluate": fill_from_checkpoint_evaluate,
    "generate": lambda *composed: [fill_from_checkpoint_generate(*composed)],
    **dict.fromkeys(("export", "benchmark_generation", "benchmark_training", "doctor"), lambda *_: [{}]),
}
