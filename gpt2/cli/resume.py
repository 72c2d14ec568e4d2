"""X."""

import logging
import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from gpt2.checkpoint.format import read_record
from gpt2.cli.complete import resumed_checkpoint
from gpt2.cli.compose import compose, parsed
from gpt2.cli.launchers import requeues, uses_submitit
from gpt2.config import StudyConfig, TrainRun
from gpt2.errors import UserError

log = logging.getLogger("gpt2")


def folder_arguments(overrides: list[str]) -> list[str]:
    """What makes Hydra work in the folder of the run that is resumed, and leave its `.hydra` as it was.

    With `train.auto_resume` that is the folder of this very command line, whether anything is in it yet or not.
    """
    composed = compose("train", overrides)
    chosen = [override.value() for override in parsed(overrides) if override.key_or_group == "hydra.run.dir"]
    if composed.resume is None and not composed.train.auto_resume:
        return []
    if chosen and composed.resume is not None:
        raise UserError("hydra.run.dir: a run that is resumed goes on in its own folder; drop one of the two")
    if composed.resume is not None:
        resume = composed.resume
    else:
        resume = plain_name("hydra.run.dir", chosen[-1]) if chosen else own_folder("runs", composed.name, overrides)
    path = resumed_checkpoint(str(resume))
    folder = str(path.parent.parent if path else resume)
    arguments = [in_hydras_quotes("hydra.run.dir", folder), in_hydras_quotes("resume", resume)]
    return [*arguments, "hydra.output_subdir=null"] if path else arguments


def sweep_arguments(overrides: list[str]) -> list[str]:
    """What makes Hydra work in one folder, with `train.auto_resume` that of this very command line, and jobs go on.

    A launcher that starts jobs again brings `train.auto_resume` with it. A study goes on by itself anyway.
    """
    fixed = [override for override in parsed(overrides) if not override.is_sweep_override()]
    composed = compose("train", [str(override.input_line) for override in fixed], with_hydra=True)
    launcher, given = composed.hydra.launcher, {override.key_or_group: override.value() for override in fixed}
    if composed.hydra.sweeper._target_ == StudyConfig._target_:
        return []
    if not composed.train.auto_resume and not requeues(launcher):
        if not uses_submitit(launcher) or "hydra.sweep.dir" in given:
            return []
        folder = composed.hydra.sweep.dir  # said once, or Hydra's copies of it would have suffixes of their own
        return [in_hydras_quotes("hydra.sweep.dir", folder)]
    if given.get("train.auto_resume") is False:
        again = f"hydra.launcher.max_num_timeout={launcher.max_num_timeout}"
        raise UserError(f"train.auto_resume: {again} starts jobs again, which then go on; drop one of the two")
    if "hydra.sweep.dir" in given:
        folder = plain_name("hydra.sweep.dir", given["hydra.sweep.dir"])
    else:
        folder = own_folder("sweeps", composed.name, overrides)
    return ["train.auto_resume=true", in_hydras_quotes("hydra.sweep.dir", folder)]


def plain_name(key: str, folder: Any) -> str:
    """A folder that is the same each time."""
    if "${" in str(folder):
        raise UserError(f"{key}: train.auto_resume needs a plain name, {folder} may be another each time")
    return str(folder)


def own_folder(kind: str, name: str, overrides: list[str]) -> str:
    """The folder of a command line, however its words are ordered and wherever its jobs run."""
    last = {override.key_or_group: override.input_line for override in parsed(overrides)}
    said = [str(text) for key, text in last.items() if not key.startswith(("hydra.launcher.", "hydra/launcher"))]
    return f"outputs/{kind}/{name}/auto-{sha256(chr(10).join(sorted(said)).encode()).hexdigest()[:8]}"


def in_hydras_quotes(key: str, value: Any) -> str:
    return f"{key}={QuotedString(str(value), Quote.single).with_quotes()}"


def refuse_second_run(config: TrainRun, folder: Path) -> None:
    """Raise a UserError if a run that is not resumed would start in the folder of another run."""
    if config.resume or not (folder / "metrics.jsonl").exists():
        return
    place = os.path.relpath(folder)
    if not config.train.auto_resume:
        raise UserError(f"{folder} already holds a run; resume it (resume={place}) or choose another folder")
    log.warning(f"Note: {place} has no checkpoint to resume from, its run starts from the beginning")


def saved_settings(config: TrainRun) -> tuple[dict[str, Any], str | None]:
    """The configuration to save in checkpoints, and the W&B id of a resumed run."""
    settings = asdict(config)
    if not config.resume:
        return settings, None
    record = read_record(Path(config.resume))
    if config.data.tokenizer == config.resume:  # it was read from the checkpoint; save where it came from originally
        settings["data"]["tokenizer"] = record["run"]["data"]["tokenizer"]
    return settings, record.get("wandb_id")
