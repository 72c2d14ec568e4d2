"""From a command line to a checked configuration: what stands between Hydra and the library.

Hydra composes the configuration; this module adds what Hydra leaves out. The whole command line is checked before
anything runs: every fault in one line, exit code 2, and no run folder left behind. A prompt is kept out of Hydra's
hands, for it is text and no expression. And what a trained model brings with it, its shape, its tokenizer, its
sampling, its data, the configuration of a run to resume, takes the place of defaults, never of what was asked for.
"""

import logging
import os
import re
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice, product
from math import inf
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser  # private, hence the exact pin of hydra-core
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2 import checkpoint
from gpt2.config import SCHEMAS, GenerateRun, GPT2Config, Run, TrainRun, UserError, faults
from gpt2.pretrained import TrainedModel, following, open_model, open_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
TRUSTED = ["gpt2.*"]  # what a configuration may have Hydra instantiate

# What a resumed run may be told anew: how long it goes on, and what has no part in its result.
CHANGEABLE = {
    *("train.max_steps", "train.max_epochs", "train.max_training_hours", "sample_prompt"),
    *("train.save_every", "train.eval_every", "train.log_every"),
    *("train.device", "train.num_workers", "train.pin_memory", "train.compile", "train.gradient_checkpointing"),
    *("wandb.mode", "wandb.project", "wandb.entity"),
}

MOST_COMBINATIONS = 32  # of a sweep that are checked before it begins; more would take longer than they save

log = logging.getLogger(__name__)

Task = Callable[[Any], Any]


def script(name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a function of a checked configuration into the command line that `conf/<name>.yaml` describes."""

    def decorate(task: Task) -> Callable[[], None]:
        def main() -> None:
            arguments, prompt = take_prompt(sys.argv[1:]) if name == "generate" else (sys.argv[1:], None)
            options = get_args_parser().parse_intermixed_args(arguments)
            with faults_as_lines():
                if runs_something(options):
                    check_command_line(name, options)
                    arguments += resume_arguments(options.overrides)

            def job(composed: DictConfig) -> Any:
                return run_job(name, task, composed, prompt)

            sys.argv[1:] = arguments
            with faults_as_lines():
                hydra.main(config_path=str(CONF), config_name=name, execution_whitelist=TRUSTED)(job)()

        return main

    return decorate


def run_job(name: str, task: Task, composed: DictConfig, prompt: str | None) -> Any:
    """What Hydra calls, once a run."""
    job = HydraConfig.get()
    in_sweep = job.mode == RunMode.MULTIRUN
    with faults_as_lines():
        config = resolve(name, composed, list(job.overrides.task))
        if isinstance(config, GenerateRun):
            config.prompt = prompt or ""
        try:
            return task(config)
        except (UserError, KeyboardInterrupt) as error:
            if in_sweep and isinstance(error, UserError):  # the others go on; infinity is what this one is worth
                log.error("error: %s", error)
                return inf
            if job.output_subdir is not None:
                remove_if_nothing_happened(run_folder())
            raise


def run_folder() -> Path:
    """Where the run under way keeps everything."""
    return Path(HydraConfig.get().runtime.output_dir)


def remove_if_nothing_happened(folder: Path) -> None:
    """Remove the folder of a run that found out, before it began, that it cannot: only Hydra has written to it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    if all(path.parent.name == ".hydra" or path.suffix == ".log" for path in files):
        shutil.rmtree(folder)
        with suppress(OSError):  # other runs of that name are there
            folder.parent.rmdir()


@contextmanager
def faults_as_lines() -> Iterator[None]:
    """Print a user's mistake as lines and exit with 2; leave quietly where nobody reads on, or on Ctrl-C."""
    try:
        yield
    except UserError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        sys.exit(0)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)


def take_prompt(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split `prompt=...` off a command line, as the shell passed it; bytes that are not UTF-8 become U+FFFD."""
    is_prompt = [argument.lstrip("+").startswith("prompt=") for argument in arguments]
    rest = [argument for argument, taken in zip(arguments, is_prompt, strict=True) if not taken]
    texts = [argument.split("=", 1)[1] for argument, taken in zip(arguments, is_prompt, strict=True) if taken]
    return rest, os.fsencode(texts[-1]).decode("utf-8", "replace") if texts else None


# ---------------------------------------------------------------------------------------------------------------------
# Checking a command line before anything runs


def runs_something(options: Namespace) -> bool:
    """Whether this is a run, and not a question such as --help or --cfg, which Hydra answers itself."""
    questions = (options.help, options.hydra_help, options.cfg, options.info, options.shell_completion)
    return not any(questions)


def check_command_line(name: str, options: Namespace) -> None:
    """Compose and check everything that would run.

    Raises:
        UserError: With all the faults there are.
    """
    found: list[str] = []
    fixed: list[str] = []
    swept: list[Override] = []
    if any((options.config_path, options.config_dir, options.config_name, options.experimental_rerun)):
        found.append(
            "--config-path, --config-dir, --config-name, --experimental-rerun: a preset goes to conf/experiment"
        )
    if options.multirun and name != "train":
        found.append("-m: only train.py makes several runs")
    for text in options.overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            found.append(f"{text}: not of the form key=value (a value with special characters needs quotes: key='a,b')")
            continue
        if override.is_delete():
            found.append(f"{text}: nothing can be taken out; null switches an optional value off")
        elif override.key_or_group == "resume" and options.multirun:
            found.append(f"{text}: one run at a time, without -m")
        elif override.key_or_group == "hparams_search" and override.value() and not options.multirun:
            found.append(f"{text}: a search is many runs, it needs -m")
        elif override.is_sweep_override() and options.multirun:
            swept.append(override)
        else:
            fixed.append(text)

    if not swept or found:
        found += command_line_faults(name, fixed)
    else:
        for combination in islice(product(*map(candidates, swept)), MOST_COMBINATIONS):
            found += command_line_faults(name, [*fixed, *combination])
    if found:
        raise UserError(*dict.fromkeys(found))


def candidates(override: Override) -> list[str]:
    """The overrides that a sweep over one key amounts to: every choice, or both ends of an interval."""
    value = override.value()
    key = override.get_key_element()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    if isinstance(value, Glob):  # names files of the group, which exist
        names = sorted(path.stem for path in (CONF / override.key_or_group).glob("*.yaml"))
        return [f"{key}={choice}" for choice in value.filter(names)]
    return [f"{key}={text}" for text in override.sweep_string_iterator()]


def command_line_faults(name: str, overrides: list[str]) -> list[str]:
    """All that is wrong with a composition: each override that does not fit, and what contradicts what in the rest."""
    accepted: list[str] = []
    found: list[str] = []
    try:
        composed = compose(name, overrides)
        accepted = overrides
    except (HydraException, OmegaConfBaseException):
        composed = compose_or_refuse(name)
        for override in overrides:
            try:
                composed = compose(name, [*accepted, override])
                accepted.append(override)
            except (HydraException, OmegaConfBaseException) as error:
                found.append(f"{override}: {explain(error)}")
    try:
        resolve(name, composed, accepted)
    except UserError as error:
        found += error.faults
    return found


def compose(name: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), job_name=name):
        return hydra.compose(name, overrides)


def compose_or_refuse(name: str) -> DictConfig:
    """The configuration without overrides. A fault in it lies in a file of `conf/`."""
    try:
        return compose(name, [])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{CONF}: {explain(error)}") from error


def explain(error: Exception) -> str:
    """What is wrong, in one line out of Hydra's several: the choices there are, but not where they were looked for."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        return str(cause).splitlines()[0]
    text = str(error).split("Config search path")[0].split(": ", 1)[-1]
    problem, *choices = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{problem}. {choices[0]} {', '.join(choices[1:])}" if choices else problem


# ---------------------------------------------------------------------------------------------------------------------
# From what Hydra composed to what runs


def resolve(name: str, composed: DictConfig, overrides: list[str]) -> Run:
    """A composed configuration as dataclasses, completed by the trained model that it names.

    Raises:
        UserError: With all that is wrong with it.
    """
    try:
        plain = OmegaConf.to_container(composed)
        composed = merged(SCHEMAS[name], plain)  # refuses what `+key=value` brought in past the schema
        composed = COMPLETIONS[name](composed, overrides)
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(config, Run)
    if found := faults(config):
        raise UserError(*found)
    return config


def merged(schema: type, *layers: Any) -> DictConfig:
    """The layers over a schema's defaults, each checked against it."""
    return OmegaConf.merge(OmegaConf.structured(schema), *layers)  # type: ignore[return-value]


def keys_of(overrides: list[str]) -> set[str]:
    """The keys and groups that a command line names."""
    return {override.key_or_group for override in parsed(overrides)}


def with_group_of(saved: dict[str, Any], group: str, composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Take a group from a saved configuration, but for what the command line says of it; none of it if it chose one."""
    if group in keys_of(overrides):
        return composed
    result = merged(OmegaConf.get_type(composed), composed, {group: saved[group]})  # type: ignore[arg-type]
    for override in parsed(overrides):
        if override.key_or_group.startswith(f"{group}."):
            OmegaConf.update(result, override.key_or_group, override.value())
    return result


def complete_generate(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Sample as the model's own run did."""
    trained = open_model(composed.checkpoint)
    composed.checkpoint = trained.source
    run = trained.record and trained.record["run"]
    return with_group_of(run, "inference", composed, overrides) if run else composed


def complete_evaluate(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Evaluate on the data of the model's own run, by its own tokenizer, in windows of the length it was trained on."""
    trained = open_model(composed.checkpoint)
    composed.checkpoint = trained.source
    run = trained.record and trained.record["run"]
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


def complete_train(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Go on with the configuration of the run that is resumed, or take the shape of the model that is started from."""
    if composed.resume is not None:
        return with_configuration_of_run(composed, overrides)
    if composed.train.init_from is None:
        return composed
    trained = open_model(composed.train.init_from)
    keys = keys_of(overrides)
    chosen = set(vars(GPT2Config())) if "model" in keys else {key.removeprefix("model.") for key in keys}
    asked = OmegaConf.to_object(composed.model)
    assert isinstance(asked, GPT2Config)
    found = use_tokenizer_of(trained, "train.init_from", composed, keys)
    try:
        composed.model = following(trained, asked, chosen)
    except UserError as error:
        found += error.faults
    if found:
        raise UserError(*found)
    composed.train.init_from = trained.source
    return composed


def use_tokenizer_of(trained: TrainedModel, key: str, composed: DictConfig, keys: set[str]) -> list[str]:
    """Tokenize as a trained model learned to: to it, the tokens of any other tokenizer are other words.

    Returns the fault if the command line asks for another one.
    """
    wanted = composed.data.tokenizer
    if trained.tokenizer is None:  # nobody can say which it was
        return []
    if "data.tokenizer" not in keys:
        composed.data.tokenizer = trained.source
    elif wanted == "train" or open_tokenizer(wanted).fingerprint != trained.tokenizer.fingerprint:
        return [f"data.tokenizer: {wanted} is not the tokenizer of {key}={trained.source}; left out, it is"]
    return []


def complete_export(composed: DictConfig, _overrides: list[str]) -> DictConfig:
    composed.checkpoint = open_model(composed.checkpoint).source
    return composed


def resume_arguments(overrides: list[str]) -> list[str]:
    """What makes Hydra work in the folder of the run that is resumed, and leave its `.hydra` as it was."""
    values = [override.value() for override in parsed(overrides) if override.key_or_group == "resume"]
    if not values or values[-1] is None:
        return []
    folder = str(resumed_checkpoint(str(values[-1])).parent.parent)
    return [f"hydra.run.dir={QuotedString(folder, Quote.single).with_quotes()}", "hydra.output_subdir=null"]


def resumed_checkpoint(resume: str) -> Path:
    folder = checkpoint.latest_run() if resume == "latest" else Path(resume)
    path = next(folder.glob(f"*/{checkpoint.LAST}"), None)
    if path is None:
        raise UserError(f"resume: {folder} is no run folder with a checkpoint {checkpoint.LAST} in it")
    return path


def with_configuration_of_run(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration that a run was started with, changed where the command line may change it."""
    path = resumed_checkpoint(composed.resume)
    record = checkpoint.read_record(path)
    saved, done = record["run"], record["progress"]["step"]
    if saved is None:
        raise UserError(f"resume: {path} was not written by train.py, so it holds no configuration to go on with")
    result = merged(TrainRun, saved)
    refused = []
    for override in parsed(overrides):
        key = override.key_or_group
        if key in CHANGEABLE:
            OmegaConf.update(result, key, override.value())
        elif key != "resume" and not key.startswith("hydra."):
            refused.append(f"{override.input_line}: a resumed run keeps its {key}{_as_it_was(result, key)}")
    if result.train.max_steps is not None and result.train.max_steps < done:
        refused.append(f"train.max_steps: the run has made {done} steps already, {result.train.max_steps} is less")
    if refused:
        raise UserError(*refused)
    result.resume = str(path.parent.parent)
    if result.data.tokenizer not in ("train", "bytes"):  # the checkpoint holds what may be gone elsewhere by now
        result.data.tokenizer = str(path)
    return result


def _as_it_was(config: DictConfig, key: str) -> str:
    value = OmegaConf.select(config, key)
    return "" if OmegaConf.is_config(value) else f"={value}"


COMPLETIONS: dict[str, Callable[[DictConfig, list[str]], DictConfig]] = {
    "train": complete_train,
    "evaluate": complete_evaluate,
    "generate": complete_generate,
    "export": complete_export,
}


def as_argument(key: str, value: str) -> str:
    """`key=value` as one has to type it, past the shell's grammar and Hydra's."""
    plain = re.fullmatch(r"[\w./:-]+", value)
    return shlex.quote(f"{key}={value if plain else QuotedString(value, Quote.double).with_quotes()}")


def parsed(overrides: list[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(overrides)
