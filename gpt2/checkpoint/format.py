"""The checkpoint format: one safetensors file, with everything that is not a tensor as JSON in its header.

There is no pickle, so loading a checkpoint never runs code. The file holds all that generation and resuming need. Every
byte is covered by a checksum: there is one of each tensor, and one of the header.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.config import GPT2Config
from gpt2.errors import UserError, few
from gpt2.runtime.files import atomic_write, fsync, sha256_of_next
from gpt2.runtime.plain_values import brief

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # shapes of tensors by their names

FORMAT = 2

# Keys of `__metadata__` in the header of the file. In safetensors, each of its values is a string.
RECORD, TENSOR_SUMS, HEADER_SUM = "gpt2", "sha256_of_tensors", "sha256_of_header"
NO_SUM = "0" * 64  # placeholder for a checksum that is not computed yet
MAX_HEADER_BYTES = 32 * 2**20  # a tokenizer of 50,000 tokens takes 5 MB
SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SAFETENSORS_DTYPES |= {"int64": "I64", "uint8": "U8"}
# A string in JSON, or the beginning of a string at the end of a truncated text.
JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_checkpoint(path: Path, tensors: "dict[str, Tensor]", record: dict[str, Any]) -> None:
    """Write a checkpoint atomically: `path` is either complete or, if this raises, untouched.

    The header holds the checksums of the tensors and comes before them, so it is written twice: first to reserve its
    space, then with the checksums. This way no tensor is copied in memory.

    Args:
        tensors: Tensors by name, on any device, contiguous or not.
        record: All else that the checkpoint holds, as JSON values.

    Raises:
        OSError: The disk is full, or the folder is not writable.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fsync(path.parent.parent)
    text = json.dumps({"format": FORMAT, **record})
    with atomic_write(path) as file:
        file.write(_checked_header(tensors, text, dict.fromkeys(tensors, NO_SUM)))
        sums = {}
        for name in _layout(tensors):
            content = _bytes_of(tensors[name])
            file.write(content)
            sums[name] = hashlib.sha256(content).hexdigest()
        file.seek(0)
        file.write(_checked_header(tensors, text, sums))


def save_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write a plain safetensors file, see https://huggingface.co/docs/safetensors.

    `safetensors.torch.save_file` creates files that only their owner may read, and hides the OSError of a full disk.
    """
    with path.open("wb") as file:
        file.write(_header(tensors, metadata))
        for name in _layout(tensors):
            file.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: "Tensor") -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checked_header(tensors: "dict[str, Tensor]", record: str, sums: dict[str, str]) -> bytes:
    header = _header(tensors, {RECORD: record, TENSOR_SUMS: json.dumps(sums), HEADER_SUM: NO_SUM})
    return header.replace(_sum_entry(NO_SUM), _sum_entry(hashlib.sha256(header[8:]).hexdigest()))


def _sum_entry(header_sum: str) -> bytes:
    """The entry of the header's checksum, in JSON. It occurs once in a header: quotes inside strings are escaped."""
    return f'"{HEADER_SUM}":"{header_sum}"'.encode()


def _layout(tensors: "dict[str, Tensor]") -> list[str]:
    """The order of the tensors in a file: by decreasing element size, which keeps all of them aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file, with its length in 8 bytes before it."""
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
# Reading


class NewerVersionError(UserError):
    """A checkpoint was written by a newer version of this program, in a format that this version cannot read."""


@dataclass
class StoredTensor:
    """The position of a tensor in a file, in bytes from the beginning, and its checksum."""

    begin: int
    end: int
    sha256: str


def read_record(path: Path) -> dict[str, Any]:
    """Read everything in a checkpoint but its tensors. Fast for a model of any size, and does not import torch.

    Raises:
        UserError: The file cannot be read, is not a checkpoint of this program, or has a damaged header.
    """
    return _read_header(path)[0]


def verify(path: Path, prefix: str = "") -> dict[str, Any]:
    """Check a checkpoint against its checksums and return its record.

    Args:
        prefix: Check only tensors whose names begin with it.

    Raises:
        UserError: The file is damaged; the message names the damaged tensors.
    """
    status = path.stat() if path.exists() else None
    version = status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return _verify(path, prefix, version)


@lru_cache
def _verify(path: Path, prefix: str, _version: Any) -> dict[str, Any]:
    """Implement `verify`, cached until the file changes: commands verify repeatedly, and a large file takes seconds."""
    record, tensors = _read_header(path)
    sums: dict[str, str] = {}
    with path.open("rb") as file:
        for name, stored in tensors.items():
            if name.startswith(prefix):
                file.seek(stored.begin)
                sums[name] = sha256_of_next(file, stored.end - stored.begin).hexdigest()
    _compare_sums(path, sums, tensors)
    return record


def read_tensors(path: Path, prefix: str = "") -> "dict[str, Tensor]":
    """Read and verify the tensors whose names begin with `prefix`. The names in the result lack it.

    Raises:
        UserError: The tensors are damaged, or the file is not a checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    _, stored = _read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in stored if name.startswith(prefix)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint: {path} is damaged: {error}") from error
    sums = {name: hashlib.sha256(_bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}
    _compare_sums(path, sums, stored)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _compare_sums(path: Path, sums: dict[str, str], stored: dict[str, StoredTensor]) -> None:
    damaged = [name for name, sha256 in sums.items() if sha256 != stored[name].sha256]
    if damaged:
        raise UserError(f"checkpoint: {path} is damaged: wrong checksum of {few(damaged)}")


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Read the record and the position of each tensor, and check the header's checksum and the size of the file."""
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise UserError(f"checkpoint: cannot read {path}: it is not a file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size):
                raise ValueError("the header is too long")
            record, tensors = _parse_header(file.read(length), size, path)
        ends = [8 + length, *sorted(stored.end for stored in tensors.values())]
        if sorted(stored.begin for stored in tensors.values()) != ends[:-1]:
            raise ValueError("tensors overlap")
    except OSError as error:
        raise UserError(f"checkpoint: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"checkpoint: {path} is not a checkpoint of this program, or its header is damaged") from error
    if size != ends[-1]:
        raise UserError(f"checkpoint: {path} is damaged: it has {size:,} bytes instead of {ends[-1]:,}")
    return record, tensors


def _parse_header(text: bytes, file_size: int, path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    header = _parse_json(text, file_size)
    metadata, data = header.pop("__metadata__"), 8 + len(text)
    header_sum = metadata[HEADER_SUM]
    if hashlib.sha256(text.replace(_sum_entry(header_sum), _sum_entry(NO_SUM))).hexdigest() != header_sum:
        raise UserError(f"checkpoint: {path} is damaged: wrong checksum of its header")
    record = _parse_json(metadata.pop(RECORD).encode(), file_size)
    if record["format"] != FORMAT:
        formats = f"format {brief(record['format'])}, this version reads format {FORMAT}"
        if isinstance(record["format"], int) and record["format"] > FORMAT:
            raise NewerVersionError(f"checkpoint: {path} was written by a newer version of this program ({formats})")
        raise UserError(f"checkpoint: {path} has {formats}")
    sums = _parse_json(metadata[TENSOR_SUMS].encode(), file_size)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(data + begin, data + end, sums[name])
    return record, tensors


def _parse_json(text: bytes, file_size: int) -> Any:
    """Parse JSON, but refuse text that would take much more memory than the size of the file.

    Strings do not, but many small values do: `[[],[],...]` takes 20 times its size. A header that this program wrote
    is mostly strings.
    """
    outside_strings = len(text) - sum(match.end() - match.start() for match in JSON_STRING.finditer(text))
    if outside_strings > 2**18 + file_size // 64:
        raise ValueError("too many values")
    return json.loads(text)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing tensors with a model


def shapes_of(config: GPT2Config) -> Shapes:
    """The names and shapes of a model's tensors, derived from a model of one block, because all blocks are alike."""
    from gpt2.model import meta_model

    weights = meta_model(replace(config, num_layers=1)).state_dict()
    return {
        name.replace("blocks.0.", f"blocks.{layer}."): tuple(tensor.shape)
        for name, tensor in weights.items()
        for layer in range(config.num_layers if name.startswith("blocks.") else 1)
    }


def check_memory(config: GPT2Config, key: str) -> None:
    """Raise a UserError if the weights of a model, in fp32, exceed the memory of this machine."""
    needed = 4 * sum(prod(shape) for shape in shapes_of(config).values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"{key}: a model of {config.num_layers} layers, width {config.d_model} and {config.vocab_size:,} tokens "
            f"takes {needed / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f} GB"
        )


def check_weights(source: str, tensors: "dict[str, Tensor]") -> None:
    """Raise a UserError that names the tensors with NaN or infinity, if there are any."""
    if wrong := nonfinite_names(tensors):
        raise UserError(f"{source}: NaN or infinity among the weights, in {few(wrong)}")


def nonfinite_names(tensors: "dict[str, Tensor]") -> list[str]:
    """The names of the tensors that contain NaN or infinity."""
    from torch import inf
    from torch.linalg import vector_norm

    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    return [name for name, tensor in floats.items() if not vector_norm(tensor, inf).isfinite()]


def check_tensor_shapes(source: str, actual: Shapes, expected: Shapes) -> None:
    """Raise a UserError if tensors are missing, unexpected or misshapen, with their numbers and three names of each."""
    common = sorted(actual.keys() & expected.keys())
    kinds = {
        "missing": sorted(expected.keys() - actual.keys()),
        "unexpected": sorted(actual.keys() - expected.keys()),
        "misshapen": [f"{n} {actual[n]} instead of {expected[n]}" for n in common if actual[n] != expected[n]],
    }
    if any(kinds.values()):
        problems = "; ".join(f"{len(names):,} {kind}: {few(names)}" for kind, names in kinds.items() if names)
        raise UserError(f"{source}: the tensors do not fit the GPT-2 that it describes: {problems}")
