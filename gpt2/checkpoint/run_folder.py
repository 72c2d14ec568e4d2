"""The checkpoints of a run: their names, which one to load, and which ones to delete.

A run keeps its newest checkpoints as `step_<number>.pth`. `last.pth` and `best_model.pth` are hard links to the newest
and the best.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.record import Progress, check_progress, read_record
from gpt2.config import TrainingConfig
from gpt2.errors import UserError, counted, few
from gpt2.runtime.files import atomic_write, fsync, temporary_name

log = logging.getLogger(__name__)

BEST, LAST = "best_model.pth", "last.pth"  # safetensors files, despite their names
STEP_NAME = re.compile(r"step_(\d{8,})\.pth")

# The folders that `latest_run` returned, with the times of their checkpoints; None after `name_if_latest` logged it.
_found: dict[Path, float | None] = {}


def step_name(step: int) -> str:
    return f"step_{step:08}.pth"


def step_of(path: Path) -> int | None:
    """The step in a file name made by `step_name`; None for any other name."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints that are named by their step, oldest first."""
    return sorted((step, path) for path in folder.glob("step_*") if (step := step_of(path)) is not None)


def add_name(path: Path, name: str) -> None:
    """Give a checkpoint an additional name in its folder: a hard link, or a copy on a filesystem without hard links.

    A link is safe because checkpoints are replaced, never changed in place.
    """
    target = path.with_name(name)
    try:
        with temporary_name(target, partial(os.link, path)) as temporary:
            temporary.replace(target)
        fsync(path.parent)
    except OSError:  # a filesystem without hard links
        with path.open("rb") as source, atomic_write(target) as copy:
            shutil.copyfileobj(source, copy)


def prune(folder: Path, keep: int, step: int, spared: Collection[Path] = ()) -> None:
    """Delete all checkpoints but the newest `keep` up to `step`.

    Checkpoints of later steps are obsolete, because the run was resumed from an earlier one.

    Args:
        spared: Checkpoints of another run in this folder, which are neither counted nor deleted.
    """
    numbered = [(number, path) for number, path in _numbered(folder) if path not in spared]
    retained = [path for number, path in numbered if number <= step][-keep:]
    for _, path in numbered:
        if path not in retained:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("Cannot delete the old checkpoint %s: %s", path, error.strerror)


def first_intact(candidates: Iterable[Path], prefix: str = "") -> Path | None:
    """Return the first of some checkpoints that exists and is not damaged; None if none exists.

    Logs a warning for each damaged one before it.

    Args:
        prefix: Check only tensors whose names begin with it.

    Raises:
        UserError: All of them are damaged, or one before the first intact one is of a newer version of this program.
    """
    problems: list[str] = []
    damaged: list[Path] = []
    for path in candidates:
        if any(path.exists() and path.samefile(other) for other in damaged if other.exists()):
            continue
        try:
            progress = check_progress(path, checkpoint.verify(path, prefix))
        except checkpoint.NewerVersionError:  # resuming from an older checkpoint would delete this one
            raise
        except UserError as error:
            damaged.append(path)
            problems += error.problems
            continue
        if problem := _wrong_name(path, progress):
            problems.append(problem)
            continue
        for problem in problems:
            log.warning("%s", problem)
        if problems:
            log.warning("Using instead: %s", path)
        return path
    if problems:
        raise UserError(*problems)
    return None


def _wrong_name(path: Path, progress: Progress) -> str | None:
    """Say why an intact checkpoint should not have its name; None if the name is right."""
    number = step_of(path)
    if number is not None and number != progress.step:
        return f"checkpoint: {path} is not of step {number}, but of step {progress.step}"
    is_best = progress.evaluated_at == progress.step and progress.val_loss == progress.best_val_loss
    if path.name == BEST and progress.evaluated_at and not is_best:
        return f"checkpoint: {path} is not the best checkpoint of its run"
    return None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order in which resuming tries them."""
    numbered = [path for _, path in reversed(_numbered(folder))]
    return [*numbered, *(path for name in (LAST, BEST) if (path := folder / name).exists())]


def best_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order in which generation and evaluation try them."""
    return sorted(newest_first(folder), key=lambda path: path.name != BEST)


def every_step(folder: Path) -> list[Path]:
    """Return one checkpoint of each step in a folder, oldest first.

    Raises:
        UserError: A checkpoint is damaged.
    """
    by_step: dict[int, Path] = {}
    for path in newest_first(folder):  # the best checkpoint may have no other name
        by_step.setdefault(read_record(path)["progress"]["step"], path)
    return [path for _, path in sorted(by_step.items())]


def refuse_links(folder: Path, key: str) -> None:
    """Raise a UserError if files of a run folder are symbolic links: writing to them would change files elsewhere."""
    if linked := sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.is_dir()):
        raise UserError(f"{key}: files in {folder} are symbolic links: {few(linked)}; replace them by files")


def checkpoint_folder_of(run: Path) -> Path | None:
    """Return the folder with the checkpoints of a run, which may be `run` itself; None if there are no checkpoints."""
    folders = {path.parent for pattern in ("[!.]*.pth", "*/[!.]*.pth") for path in run.glob(pattern)}
    default = TrainingConfig().checkpoint_dir  # preferred to other folders, such as a backup of it
    return min(folders, key=lambda folder: (folder != run, folder.name != default, folder.name), default=None)


def latest_run(runs: Path = Path("outputs/runs")) -> Path:
    """Return the run folder with the most recently saved checkpoint.

    Raises:
        UserError: There is no checkpoint.
    """
    checkpoints = list(runs.glob("*/*/*/[!.]*.pth"))
    if not checkpoints:
        raise UserError(
            f"checkpoint: no run with a checkpoint in {runs.absolute()}; train one with "
            f"`python train.py experiment=quickstart`, or name one with checkpoint=PATH"
        )
    saved, newest = max((path.stat().st_mtime, path) for path in checkpoints)
    folder = newest.parent.parent
    _found.setdefault(folder, saved)
    return folder


def newest_run_in(place: Path) -> str:
    """A hint for an error message: the newest run in a folder of runs; empty if the folder holds no run."""
    checkpoints = [path for runs in ("*", "*/*") for path in place.glob(f"{runs}/*/[!.]*.pth")]
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
    return "" if newest is None else f"; the newest run in it is {newest.parent.parent}"


def name_if_latest(folder: Path) -> None:
    """If `latest_run` chose a run, log its name and age, once: the user may expect another run."""
    if (saved := _found.get(folder)) is not None:
        log.info("latest run: %s, %s", folder, ago(time.time() - saved))
        _found[folder] = None


def ago(seconds: float) -> str:
    """Format a past duration in its largest unit, such as `3 minutes ago`."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, number = next(((unit, int(seconds // size)) for unit, size in units if seconds >= size), ("second", 0))
    return f"{counted(number, unit)} ago"


def find_checkpoint(path: str | None, key: str = "checkpoint") -> Path:
    """Find the checkpoint that a path names: a file, or the best in a run folder. None is the latest run.

    If a run has no best checkpoint, its newest is used. If the best is damaged, a warning is logged too.

    Args:
        key: The option that names the checkpoint, for the error message.

    Raises:
        UserError: There is no checkpoint, or all of them are damaged.
    """
    place = latest_run() if path is None else Path(path)
    if place.is_file():
        return place
    folder = checkpoint_folder_of(place)
    if folder and (checkpoint_path := first_intact(best_first(folder), prefix="model/")):
        return checkpoint_path
    raise UserError(
        f"{key}: {place} holds no {BEST} or {LAST}, and no config.json beside a model.safetensors{newest_run_in(place)}"
        if place.is_dir()
        else f"{key}: there is no {place}"
    )
