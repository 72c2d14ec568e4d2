"""Token files of other programs, which are read in place.

There are two kinds, both of unsigned 16-bit tokens with `<|endoftext|>` between documents. Files of nanoGPT hold
nothing else. Shards of llm.c and modded-nanogpt begin with a header of 256 32-bit numbers.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gpt2.errors import UserError
from gpt2.runtime.console import track
from gpt2.tokenizer import GPT2Tokenizer

DTYPE = np.dtype("uint16")
MAGIC, VERSION = 20240520, 1  # the first two numbers of a header; the third is the number of tokens
HEADER_BYTES = 256 * 4
SPLITS_BY_NAME = {"val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
TOKENS_AT_ONCE = 1 << 24  # tokens that are checked at a time


@dataclass(frozen=True)
class TokenFile:
    """`count` tokens in a file, from byte `offset` on."""

    path: Path
    offset: int
    count: int

    def map(self, dtype: str | np.dtype) -> np.ndarray:
        return np.memmap(self.path, dtype, mode="r", offset=self.offset, shape=self.count)


class Tokens:
    """The tokens of several files one after the other, memory-mapped; a slice is an array."""

    def __init__(self, files: Sequence[TokenFile], dtype: str):
        self.maps = [file.map(dtype) for file in files]
        self.starts = np.cumsum([0, *(file.count for file in files)])

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(int(self.starts[-1]))
        first, last = np.searchsorted(self.starts, (start, stop), side="right")
        parts = zip(self.maps[first - 1 : last], self.starts[first - 1 : last], strict=False)
        return np.concatenate([tokens[max(0, start - begin) : max(0, stop - begin)] for tokens, begin in parts])


def count_tokens(files: Sequence[TokenFile]) -> int:
    return sum(file.count for file in files)


def is_token_file(path: Path) -> bool:
    return path.suffix.lower() == ".bin"


def open_token_files(paths: Sequence[Path]) -> dict[str, list[TokenFile]]:
    """Assign token files to splits by name: `val.bin` and `fineweb_val_000000.bin` are for validation.

    Raises:
        UserError: Files are damaged, or of another kind.
    """
    splits: dict[str, list[TokenFile]] = {"train": [], "validation": [], "test": []}
    problems = []
    for path in paths:
        words = re.split(r"[^a-z]+", path.stem.lower())
        try:
            split = next((SPLITS_BY_NAME[word] for word in words if word in SPLITS_BY_NAME), "train")
            splits[split].append(_open_token_file(path))
        except ValueError as error:
            problems.append(f"data.files: {path} {error}")
    if problems:
        raise UserError(*problems)
    return splits


def _open_token_file(path: Path) -> TokenFile:
    """Locate the tokens in a file, after its header if it has one.

    Raises:
        ValueError: The file is damaged or of another kind.
    """
    with path.open("rb") as file:
        head, size = file.read(HEADER_BYTES), file.seek(0, os.SEEK_END)
    if size % DTYPE.itemsize:
        raise ValueError(f"has {size:,} bytes, which is not a whole number of 16-bit tokens")
    header = np.frombuffer(head[: size // 4 * 4], "<i4")
    magic, version, count = [*header[:3].tolist(), 0, 0, 0][:3]
    if magic != MAGIC and (size < HEADER_BYTES or header[3:].any()):  # two tokens of GPT-2 cannot form MAGIC
        if path.with_name("meta.pkl").exists():
            raise ValueError("has tokens of the characters in meta.pkl beside it, not of a tokenizer; use its text")
        header_bytes, count = 0, size // DTYPE.itemsize
        if _looks_32_bit(np.frombuffer(head[: size // 4 * 4], DTYPE)):
            raise ValueError("has 32-bit tokens: every second 16-bit number is 0; write them as uint16")
    elif magic != MAGIC:
        raise ValueError(f"begins with a header of another kind: its first number is {magic}, not {MAGIC}")
    elif version != VERSION:
        raise ValueError(f"has a header of version {version}, not {VERSION}")
    else:
        header_bytes = HEADER_BYTES
        there = max(0, size - header_bytes) // DTYPE.itemsize
        if there != count:
            raise ValueError(f"has {there:,} tokens, but its header says {count:,}")
    if not count:
        raise ValueError("is empty")
    return TokenFile(path, header_bytes, count)


def _looks_32_bit(tokens: np.ndarray) -> bool:
    """Whether 16-bit numbers are halves of 32-bit ones: every second is 0, which GPT-2 reads as an exclamation mark."""
    return len(tokens) >= 16 and not tokens[1::2].any() and bool(tokens[::2].any())


def split_end(files: Sequence[TokenFile], fraction: float) -> tuple[list[TokenFile], list[TokenFile]]:
    """Divide the tokens of files into two parts. The second part is the last `fraction` of the tokens."""
    left = count_tokens(files) - round(count_tokens(files) * fraction)
    first, second = [], []
    for file in files:
        count = min(file.count, left)
        left -= count
        if count:
            first.append(replace(file, count=count))
        if count < file.count:
            second.append(TokenFile(file.path, file.offset + count * DTYPE.itemsize, file.count - count))
    return first, second


def check_vocabulary(files: Sequence[TokenFile], tokenizer: GPT2Tokenizer) -> None:
    """Check that the tokenizer has every token of some files.

    Raises:
        UserError: It lacks one.
    """
    total, done = count_tokens(files), 0
    with track("Checking the tokens", unit="tokens") as advance:
        for file in files:
            tokens = file.map(DTYPE)
            for start in range(0, len(tokens), TOKENS_AT_ONCE):
                some = tokens[start : start + TOKENS_AT_ONCE]
                if (largest := some.max()) >= tokenizer.vocab_size:
                    place = file.offset // DTYPE.itemsize + start + some.argmax()
                    raise UserError(
                        f"data.files: {file.path} has token {largest} at {place:,}, but data.tokenizer "
                        f"has {tokenizer.vocab_size:,}; the file is damaged, or of another tokenizer"
                    )
                done += len(some)
                advance(done, total)
