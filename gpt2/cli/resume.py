"""Chooses the folder of a run or a sweep: a new one, that of a resumed run, or one named after the command line.

With `train.auto_resume` its name is a hash of the command line, so a repeated command finds its own checkpoints.
"""

import logging
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gpt2.checkpoint.record import read_record
from gpt2.checkpoint.run_folder import refuse_links
from gpt2.cli.complete import resumed_checkpoint
from gpt2.cli.compose import compose, escaped, hydra_syntax, parsed, without_sweeps
from gpt2.cli.launchers import requeues, uses_submitit
from gpt2.config import StudyConfig, TrainRun
from gpt2.errors import UserError

log = logging.getLogger("gpt2")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a single run."""

    path: str
    resume: str | None = None  # the new value of `resume` in the configuration
    is_new: bool = True  # false: `.hydra/` of the run that is resumed is left unchanged

    def apply(self, composed: DictConfig) -> None:
        """Put the folder into a composed configuration, which has its `hydra` node."""
        composed.hydra.run.dir = self.path
        if "resume" in composed:
            if "${" in str(Path(self.path).absolute()):
                raise UserError(f"hydra.run.dir: {self.path}: Hydra would interpolate ${{ in its name; rename it")
            composed.resume = escaped(self.resume)
        if not self.is_new:
            composed.hydra.output_subdir = None


def folder_of_run(composed: DictConfig, overrides: list[str]) -> RunFolder:
    """The folder that a composed run of train.py writes to.

    Raises:
        UserError: The command line contradicts itself.
    """
    resume = composed.resume
    if resume is None and not composed.train.auto_resume:
        return RunFolder(str(composed.hydra.run.dir))
    if resume is None:
        resume = resumable_folder("hydra.run.dir", composed.name, overrides)
    elif any(override.key_or_group == "hydra.run.dir" for override in parsed(overrides)):
        raise UserError("hydra.run.dir: a resumed run writes to its own folder; drop one of the two")
    path = resumed_checkpoint(str(resume))
    if path:
        refuse_links(path.parent.parent, "resume")
    return RunFolder(str(path.parent.parent if path else resume), str(resume), is_new=path is None)


def sweep_arguments(overrides: list[str]) -> list[str]:
    """Arguments that fix the folder of a sweep; with `train.auto_resume`, it is named after the command line.

    A launcher that requeues jobs implies `train.auto_resume`. A study has its own way to resume.
    """
    fixed = without_sweeps(overrides)
    composed = compose("train", fixed, with_hydra=True)
    launcher = composed.hydra.launcher
    given = {override.key_or_group: override.value() for override in parsed(fixed)}
    if composed.hydra.sweeper._target_ == StudyConfig._target_:
        return []
    if not composed.train.auto_resume and not requeues(launcher):
        if not uses_submitit(launcher) or "hydra.sweep.dir" in given:
            return []
        folder = composed.hydra.sweep.dir  # resolved here once: each job would resolve another random suffix
        return [f"hydra.sweep.dir={hydra_syntax(folder)}"]
    if given.get("train.auto_resume") is False:
        requeueing = f"hydra.launcher.max_num_timeout={launcher.max_num_timeout}"
        raise UserError(f"train.auto_resume: {requeueing} restarts jobs, which then resume; drop one of the two")
    folder = resumable_folder("hydra.sweep.dir", composed.name, overrides)
    return ["train.auto_resume=true", f"hydra.sweep.dir={hydra_syntax(folder)}"]


def resumable_folder(key: str, name: str, overrides: list[str]) -> str:
    """The folder of a command line with `train.auto_resume`: the value of `key`, or else one named after the command.

    The order of the arguments and the launcher do not change the name.

    Raises:
        UserError: The value of `key` has interpolations, which may resolve to another folder next time.
    """
    last = {override.key_or_group: override for override in parsed(overrides)}
    if key in last:
        folder = str(last[key].value())
        if "${" in folder:
            raise UserError(
                f"{key}: train.auto_resume needs a plain name; {folder} may be another folder at each start"
            )
        return folder
    lines = [str(one.input_line) for k, one in last.items() if not k.startswith(("hydra.launcher.", "hydra/launcher"))]
    kind = "runs" if key == "hydra.run.dir" else "sweeps"
    return f"outputs/{kind}/{name}/auto-{sha256(chr(10).join(sorted(lines)).encode()).hexdigest()[:8]}"


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
    if config.data.tokenizer == config.resume:  # read from the checkpoint: save its original source
        settings["data"]["tokenizer"] = record["run"]["data"]["tokenizer"]
    return settings, record.get("wandb_id")
