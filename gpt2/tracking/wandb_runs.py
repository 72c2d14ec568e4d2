"""The W&B runs of this machine: their ids in run folders, and which are not uploaded. Does not import wandb."""

import os
import re
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path

from gpt2.errors import counted, few
from gpt2.runtime.files import remove

ID = "wandb_id"  # name of the file in a run folder
OUTPUTS = Path("outputs")  # all runs share the folder `wandb` in it, so that `wandb sync` and `wandb leet` find them


def resolve_mode(mode: str) -> str:
    """`online`, `offline` or `off`; `auto` follows the environment variable WANDB_MODE, as other programs do."""
    if mode != "auto":
        os.environ.pop("WANDB_MODE", None)  # wandb.login would obey it
        return mode
    variable = os.environ.get("WANDB_MODE", "online")
    return {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(variable, "online")


def read_id(run_folder: Path) -> str | None:
    """The W&B id in a run folder; None if it is missing or damaged."""
    try:
        text = (run_folder / ID).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[\w-]{1,64}", text, re.ASCII) else None


def stored_id(run_folder: Path | None, known_id: str | None) -> str:
    """Return the W&B id in a run folder. If there is none, write `known_id` or a new id to the folder.

    With the same id, a resumed run continues its W&B run.
    """
    if run_folder and (run_id := read_id(run_folder)):
        return run_id
    run_id = known_id or uuid.uuid4().hex[:12]
    if run_folder:
        remove(run_folder / ID)
        (run_folder / ID).write_text(run_id)
    return run_id


def not_uploaded(pattern: str) -> list[str]:
    """The names of W&B's folders that match a pattern and are not completely uploaded.

    A run has a folder for each of its starts, `*run-*-ID`.
    """
    folders = (OUTPUTS / "wandb").glob(pattern)
    return [folder.name for folder in folders if not any(folder.glob("*.wandb.synced"))]  # a file of `wandb sync`


def upload_command(run_ids: Collection[str]) -> str | None:
    """The command that uploads the missing parts of some W&B runs; None if all is uploaded.

    The folders are given by a pattern. A comment in the command counts folders of other runs that also match it.
    `wandb sync` skips what was uploaded before.
    """
    names = [name for run_id in run_ids for name in not_uploaded(f"*run-*-{run_id}")]
    if not names:
        return None
    is_offline = all(name.startswith("offline") for name in names)
    start = "offline-run-" if is_offline else "*run-"
    first = os.path.commonprefix(names) or start  # noqa: RUF071  # names begin with kind and time
    pattern = f"{start}*-{next(iter(run_ids))}" if len(run_ids) == 1 else f"{first}*"
    others = len({*not_uploaded(pattern)} - {*names})
    comment = f"  # and {counted(others, 'folder')} of other runs" if others else ""
    return f"wandb sync {'' if is_offline else '--include-online '}{OUTPUTS / 'wandb' / pattern}{comment}"


def lacking(run_folders: Iterable[Path], unit: str) -> str | None:
    """A line that counts the runs W&B lacks, because they are offline or their upload failed; None if it has all.

    The line names the first three of them and the command that uploads all.

    Args:
        unit: The word for a run, such as `trial`.
    """
    ids = {
        folder.name: run_id
        for folder in run_folders
        if (run_id := read_id(folder)) and not_uploaded(f"*run-*-{run_id}")
    }
    if not ids:
        return None
    names = sorted(ids, key=lambda name: (len(name), name))  # numbers in order
    return f"W&B lacks {counted(len(names), unit)} ({few(names)}); upload with `{upload_command(ids.values())}`"
