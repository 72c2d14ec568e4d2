"""A run is a folder: the names of its checkpoints, which of them is taken, and who may write to it.

A run keeps its newest few checkpoints as `step_<number>.pth`. `last.pth` and `best_model.pth` are second names of
some of them, which users were promised.
"""

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from gpt2.checkpoint import format as checkpoint
from gpt2.config import TrainingConfig
from gpt2.errors import UserError
from gpt2.runtime.files import TEMPORARY_PREFIX, beside, flush, rename

log = logging.getLogger(__name__)

BEST, LAST = "best_model.pth", "last.pth"  # the content is safetensors all the same
OF_STEP = re.compile(r"step_(\d{8,})\.pth")
USUAL = TrainingConfig().checkpoint_dir  # a copy of it may lie beside it under another name


def step_name(step: int) -> str:
    return f"step_{step:08}.pth"


def step_of(path: Path) -> int | None:
    """The number in a name that `step_name` made."""
    match = OF_STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    return sorted((number, path) for path in folder.glob("step_*") if (number := step_of(path)) is not None)


def add_name(path: Path, name: str) -> None:
    """Give a checkpoint a second name in its folder, without a second copy of its bytes where the filesystem can.

    A checkpoint is never changed in place, only replaced, so two names for one file stay two checkpoints.
    """
    target = path.with_name(name)
    with beside(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a filesystem without hard links
            shutil.copyfile(path, temporary)
            flush(temporary)
        rename(temporary, target)


def prune(folder: Path, keep: int, step: int, spared: Collection[Path] = ()) -> None:
    """Leave the newest `keep` checkpoints up to `step`. Later ones were given up: the run went on from an older one.

    Those of another run are to be `spared`.
    """
    numbered = [(number, path) for number, path in _numbered(folder) if path not in spared]
    kept = [path for number, path in numbered if number <= step][-keep:]
    for _, path in numbered:
        if path not in kept:
            try:
                path.unlink()
            except OSError as error:
                log.warning("Cannot remove the old checkpoint %s: %s", path, error.strerror)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote. Nobody else may write here meanwhile."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink()


def first_intact(candidates: Iterable[Path], prefix: str = "") -> Path | None:
    """The first checkpoint that is not damaged, of those that are there; a warning names each one before it.

    Args:
        prefix: Of the tensors that are wanted; the others may be damaged.

    Raises:
        UserError: All are damaged.
    """
    found: list[str] = []
    damaged: list[Path] = []
    for path in candidates:
        if any(path.exists() and path.samefile(other) for other in damaged if other.exists()):
            continue
        try:
            record = checkpoint.verify(path, prefix)
        except UserError as error:
            damaged.append(path)
            found += error.problems
            continue
        if fault := _wrong_name(path, record):
            found.append(fault)
            continue
        for fault in found:
            log.warning("%s", fault)
        if found:
            log.warning("Taken instead: %s", path)
        return path
    if found:
        raise UserError(*found)
    return None


def _wrong_name(path: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint that is whole, but under a name that is not its own."""
    progress = record.get("progress") or {}
    step, number = progress.get("step"), step_of(path)
    if number is not None and number != step:
        return f"checkpoint: {path} is not that of step {number}, but of step {step}"
    is_best = progress.get("evaluated_at") == step and progress.get("val_loss") == progress.get("best_val_loss")
    if path.name == BEST and progress.get("evaluated_at") and not is_best:
        return f"checkpoint: {path} is not the best one, but another of its run"
    return None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, to resume from."""
    numbered = [path for _, path in reversed(_numbered(folder))]
    return [*numbered, *(path for name in (LAST, BEST) if (path := folder / name).exists())]


def best_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, to write text with or to evaluate."""
    best = folder / BEST
    return [*([best] if best.exists() else []), *(path for path in newest_first(folder) if path != best)]


def checkpoint_folder_of(run: Path) -> Path | None:
    """Where the checkpoints of a run lie; `run` may be that folder itself. None if there are none."""
    folders = {path.parent for pattern in ("[!.]*.pth", "*/[!.]*.pth") for path in run.glob(pattern)}
    return min(folders, key=lambda folder: (folder != run, folder.name != USUAL, folder.name), default=None)


def latest_run(runs: Path = Path("outputs/runs")) -> Path:
    """The run folder whose checkpoints are newest.

    Raises:
        UserError: There is none.
    """
    checkpoints = list(runs.glob("*/*/*/[!.]*.pth"))
    if not checkpoints:
        raise UserError(
            f"checkpoint: no run with a checkpoint in {runs.absolute()}; train one with "
            f"`python train.py experiment=quickstart`, or name one with checkpoint=PATH"
        )
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent.parent


def find_checkpoint(path: str | None, key: str = "checkpoint") -> Path:
    """The checkpoint that a user means: a file, the best one of a run folder, or, if None, of the latest run.

    A run that was never evaluated has no best checkpoint; then it is its newest. The same if the best is damaged, and
    a warning says so. `key` is what the user named it by.

    Raises:
        UserError: There is none that is intact.
    """
    place = latest_run() if path is None else Path(path)
    if place.is_file():
        return place
    folder = checkpoint_folder_of(place)
    if folder and (found := first_intact(best_first(folder), prefix="model/")):
        return found
    raise UserError(
        f"{key}: {place} holds no {BEST} or {LAST}, and no config.json beside a model.safetensors"
        if place.is_dir()
        else f"{key}: there is no {place}"
    )
