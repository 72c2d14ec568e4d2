"""What a checkpoint is on disk: one safetensors file, tensors by name and everything else as JSON in its header.

No pickle: loading a checkpoint runs no code. It is written beside its target, flushed to the disk and then renamed,
so a name always holds a whole checkpoint, the old one or the new one. Everything that generation or resuming needs
travels inside, and all of it is under checksums: a tensor under one of its own, the rest under that of the header.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gpt2.config import GPT2Config
from gpt2.errors import UserError
from gpt2.runtime.files import atomic_write, flush

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name

FORMAT = 2

# Our metadata in the header of the file, each a text as safetensors wants it.
RECORD, TENSOR_SUMS, HEADER_SUM = "gpt2", "sha256_of_tensors", "sha256_of_header"
NO_SUM = "0" * 64  # stands in the header in place of its own checksum while that is computed
LARGEST_HEADER = 32 * 2**20  # bytes; a tokenizer of 50,000 tokens takes 5 MB
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "uint8": "U8",
}
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # ends with the text where that is cut


# ---------------------------------------------------------------------------------------------------------------------
# One file: written


def write_checkpoint(path: Path, tensors: "dict[str, Tensor]", record: dict[str, Any]) -> None:
    """Write a checkpoint so that whatever happens, `path` is either untouched or complete.

    A tensor's checksum is known once the tensor is written, and stands before it in the file. So the header is written
    twice: with room for the checksums, and with them. No tensor is held twice in memory for that.

    Raises:
        OSError: There is no room for it, or no permission.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        flush(path.parent.parent)
    text = json.dumps({"format": FORMAT, **record})
    with atomic_write(path) as file:
        file.write(_checked_header(tensors, text, dict.fromkeys(tensors, NO_SUM)))
        sums = {name: hashlib.sha256(_write_tensor(file, tensors[name])).hexdigest() for name in _layout(tensors)}
        file.seek(0)
        file.write(_checked_header(tensors, text, sums))


def save_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write a plain safetensors file. https://huggingface.co/docs/safetensors describes the format."""
    with path.open("wb") as file:
        file.write(_header(tensors, metadata))
        for name in _layout(tensors):
            _write_tensor(file, tensors[name])


def _write_tensor(file: BinaryIO, tensor: "Tensor") -> memoryview:
    """Write the bytes of a tensor, and return them."""
    import torch

    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    file.write(content)
    return content


def _checked_header(tensors: "dict[str, Tensor]", record: str, sums: dict[str, str]) -> bytes:
    header = _header(tensors, {RECORD: record, TENSOR_SUMS: json.dumps(sums), HEADER_SUM: NO_SUM})
    return header.replace(_assigned(NO_SUM), _assigned(hashlib.sha256(header[8:]).hexdigest()))


def _assigned(header_sum: str) -> bytes:
    """How a header's checksum stands in it; nowhere else, for quotes within a text are escaped."""
    return f'"{HEADER_SUM}":"{header_sum}"'.encode()


def _layout(tensors: "dict[str, Tensor]") -> list[str]:
    """The order of tensors in a file: those of wide numbers first, which keeps all of them aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> bytes:
    """The length and the header of a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name in _layout(tensors):
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# ---------------------------------------------------------------------------------------------------------------------
# One file: read


@dataclass
class Stored:
    """Where a tensor lies in a file, in bytes, and the checksum of what lies there."""

    begin: int
    end: int
    sha256: str


def read_record(path: Path) -> dict[str, Any]:
    """All of a checkpoint but its tensors. Quick, whatever the model's size, and without importing torch.

    Raises:
        UserError: There is no such file, it is no checkpoint of ours, or what was read of it is damaged.
    """
    return _read_header(path)[0]


def verify(path: Path, prefix: str = "") -> dict[str, Any]:
    """Read all of a checkpoint, or its tensors with that prefix, against the checksums. Returns the record.

    Raises:
        UserError: It is damaged; what of it is damaged is named.
    """
    status = path.stat() if path.exists() else None
    unchanged = status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return _verify(path, prefix, unchanged)


@lru_cache
def _verify(path: Path, prefix: str, _unchanged: Any) -> dict[str, Any]:
    """See `verify`. A command asks several times, and a large file takes seconds."""
    record, tensors = _read_header(path)
    damaged = []
    with path.open("rb") as file:
        for name, stored in tensors.items():
            if name.startswith(prefix):
                file.seek(stored.begin)
                if _sum_of(file, stored.end - stored.begin) != stored.sha256:
                    damaged.append(name)
    if damaged:
        raise _damaged_tensors(path, damaged)
    return record


def _sum_of(file: BinaryIO, length: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(length, 2**20)))
    while length and (count := file.readinto(buffer[: min(length, len(buffer))])):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        length -= count
    return digest.hexdigest()


def _damaged_tensors(path: Path, names: list[str]) -> UserError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return UserError(f"checkpoint: {path} is damaged: the checksum of {shown} is another one")


def read_tensors(path: Path, prefix: str = "") -> "dict[str, Tensor]":
    """The tensors whose names begin with `prefix`, named without it, after a look at their checksums.

    Raises:
        UserError: They are damaged, or the file is no checkpoint.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    _, stored = _read_header(path)
    wanted = [name for name in stored if name.startswith(prefix)]
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint: {path} is damaged: {error}") from error
    contents = {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    damaged = [name for name in wanted if hashlib.sha256(contents[name]).hexdigest() != stored[name].sha256]
    if damaged:
        raise _damaged_tensors(path, damaged)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The record and the places of the tensors. Its own checksum has been looked at, and the size of the file."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"checkpoint: cannot read {path}: it is no file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGEST_HEADER, size):
                raise ValueError("its header is too long to be one")
            text = file.read(length)
        header = _parse(text, size)
        metadata = header.pop("__metadata__")
        header_sum = metadata[HEADER_SUM]
        if hashlib.sha256(text.replace(_assigned(header_sum), _assigned(NO_SUM))).hexdigest() != header_sum:
            raise UserError(f"checkpoint: {path} is damaged: the checksum of its header is another one")
        del text
        record = _parse(metadata.pop(RECORD).encode(), size)
        if record["format"] != FORMAT:
            raise UserError(f"checkpoint: {path} has format {record['format']}, this version reads format {FORMAT}")
        sums, data = _parse(metadata[TENSOR_SUMS].encode(), size), 8 + length
        tensors = {
            name: Stored(data + entry["data_offsets"][0], data + entry["data_offsets"][1], sums[name])
            for name, entry in header.items()
        }
        ends = [data, *sorted(stored.end for stored in tensors.values())]
        if sorted(stored.begin for stored in tensors.values()) != ends[:-1]:
            raise ValueError("its tensors overlap")
    except OSError as error:
        raise UserError(f"checkpoint: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(
            f"checkpoint: {path} is not a checkpoint that this program wrote, or its beginning is damaged"
        ) from error
    if size != ends[-1]:
        raise UserError(f"checkpoint: {path} is damaged: it has {size:,} bytes instead of {ends[-1]:,}")
    return record, tensors


def _parse(text: bytes, size_of_file: int) -> Any:
    """JSON, unless it would take much more memory than the file has bytes: a text does not, many small values do."""
    outside_of_strings = len(text) - sum(match.end() - match.start() for match in STRING.finditer(text))
    if outside_of_strings > 2**18 + size_of_file // 64:
        raise ValueError("too many values")
    return json.loads(text)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that fit a model


def shapes_of(config: GPT2Config) -> Shapes:
    """The tensors of a model, by name."""
    import torch

    from gpt2.model import GPT2Model

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT2Model(config).state_dict().items()}


def check_tensor_shapes(source: str, found: Shapes, expected: Shapes) -> None:
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
