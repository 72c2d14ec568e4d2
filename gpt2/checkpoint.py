"""What a checkpoint is on disk: one safetensors file, tensors by name and everything else as JSON in its header.

No pickle: loading a checkpoint runs no code. It is written beside its target, flushed to the disk and then renamed,
so a name always holds a whole checkpoint, the old one or the new one. Everything that generation or resuming needs
travels inside.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.config import GPT2Config, UserError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name

FORMAT = 1
BEST, LAST = "best_model.pth", "last.pth"  # names that users were promised; the content is safetensors all the same
KEY = "gpt2"  # of our JSON among the header's metadata
LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors itself


def write(path: Path, tensors: "dict[str, Tensor]", record: dict[str, Any]) -> None:
    """Write a checkpoint so that whatever happens, `path` is either untouched or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {KEY: json.dumps({"format": FORMAT, **record})}
    with _beside(path) as temporary:
        save_tensors(tensors, temporary, metadata)
        _move(temporary, path)


def save_tensors(tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str]) -> None:
    """Write a new safetensors file that whoever may read other new files may read: left alone, only its owner may."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:  # its word for a full disk
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)


def copy(source: Path, target: Path) -> None:
    """Give a checkpoint a second name, without a second copy of its bytes where the filesystem can.

    A checkpoint is never changed in place, only replaced, so two names for one file stay two checkpoints.
    """
    with _beside(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a filesystem without hard links
            shutil.copyfile(source, temporary)
        _move(temporary, target)


class _beside:
    """A name that nobody uses, in the same folder as `path`; nothing is left under it afterwards."""

    def __init__(self, path: Path):
        self.folder = tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent)

    def __enter__(self) -> Path:
        return Path(self.folder.__enter__()) / "checkpoint"

    def __exit__(self, *error: Any) -> None:
        self.folder.__exit__(*error)


def _move(temporary: Path, target: Path) -> None:
    _flush(temporary)
    temporary.replace(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Have the disk, not only the kernel, hold a file or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_record(path: Path) -> dict[str, Any]:
    """All of a checkpoint but its tensors. Quick, whatever the model's size, and without importing torch.

    Raises:
        UserError: There is no such file, or it is no checkpoint of ours.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError("its header is too long to be one")
            header = json.loads(file.read(length))
        record = json.loads(header["__metadata__"][KEY])
        written_in = record.get("format")
    except OSError as error:
        raise UserError(f"checkpoint: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint: {path} is not a checkpoint that this program wrote") from error
    if written_in != FORMAT:
        raise UserError(f"checkpoint: {path} has format {written_in}, this version reads format {FORMAT}")
    return record


def read_tensors(path: Path, prefix: str = "") -> "dict[str, Tensor]":
    """The tensors whose names begin with `prefix`, named without it.

    Raises:
        UserError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  # no mapping
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint: {path} is damaged: {error}") from error


def shapes_of(config: GPT2Config) -> Shapes:
    """The tensors of a model, by name."""
    import torch

    from gpt2.model import GPT2Model

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT2Model(config).state_dict().items()}


def refuse_misfits(source: str, found: Shapes, expected: Shapes) -> None:
    """Raise a UserError that names every tensor that is missing, unexpected or misshapen; else do nothing."""
    both = sorted(found.keys() & expected.keys())
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [f"{n} {found[n]} instead of {expected[n]}" for n in both if found[n] != expected[n]],
    }
    if any(kinds.values()):
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        raise UserError(f"{source}: its tensors are not those of the GPT-2 that it describes: {told}")


def latest_run(runs: Path = Path("outputs/runs")) -> Path:
    """The run folder whose checkpoints are newest.

    Raises:
        UserError: There is none.
    """
    checkpoints = [path for name in (BEST, LAST) for path in runs.glob(f"*/*/*/{name}")]
    if not checkpoints:
        raise UserError(
            f"checkpoint: no run with a checkpoint in {runs.absolute()}; train one with "
            f"`python train.py experiment=quickstart`, or name one with checkpoint=PATH"
        )
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent.parent


def find(path: str | None, key: str = "checkpoint") -> Path:
    """The checkpoint that a user means: a file, the best one of a run folder, or, if None, of the latest run.

    A run that was never evaluated has no best checkpoint; then it is its last. `key` is what the user named it by.

    Raises:
        UserError: There is none.
    """
    place = latest_run() if path is None else Path(path)
    if place.is_file():
        return place
    for name in (BEST, LAST):
        for found in (*place.glob(name), *place.glob(f"*/{name}")):
            return found
    raise UserError(
        f"{key}: {place} holds no {BEST} or {LAST}, and no config.json beside a model.safetensors"
        if place.is_dir()
        else f"{key}: there is no {place}"
    )
