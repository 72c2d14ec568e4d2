"""The interface of a source of text: documents of each split, and a fingerprint of their contents."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from gpt2.config import DataConfig
from gpt2.data.token_files import TokenFile
from gpt2.runtime.files import MANY_BYTES, remembered_sums, sha256_of_each
from gpt2.runtime.hub import caches

BYTES_PER_TOKEN = 4.4  # of English text with GPT-2's tokenizer


class Document(Protocol):
    """A text that may be larger than memory."""

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        """Yield the text from one fraction of its length to another, in parts of bounded size.

        `parts(0, x)` and `parts(x, 1)` together are the whole text.
        """
        ...


class Documents(Protocol):
    """Documents that can be counted, and iterated over repeatedly in the same order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Document]: ...


@dataclass
class Source:
    """The documents of each split.

    A missing `validation` is replaced by a part of `train`, a missing `test` by the validation split.
    """

    fingerprint: str  # equal for equal documents
    train: Documents
    validation: Documents | None = None
    test: Documents | None = None
    text_bytes: int = 0  # size of all splits together; 0: unknown
    holds_records: bool = False  # the documents are records, not whole files
    token_files: dict[str, list[TokenFile]] | None = None  # token files of each split, in place of documents

    @cached_property
    def count(self) -> int:
        """The number of training documents. To count them, all may have to be read."""
        return len(self.train)


@dataclass
class TextDocument:
    """A document in memory."""

    text: str

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        length = len(self.text)
        yield self.text[int(length * start) : int(length * stop)]


def cache_folder(config: DataConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else caches()


def fingerprint_of(paths: Sequence[Path], config: DataConfig) -> str:
    """A hash of the contents of files, in order."""
    return hashlib.sha256(b"".join(digests_of(paths, cache_folder(config)))).hexdigest()


def digests_of(paths: Sequence[Path], cache: Path) -> Iterator[bytes]:
    """The SHA-256 of each file. If the files are large, the checksums are stored for the next call."""
    task = "Reading the files"
    if sum(path.stat().st_size for path in paths) < MANY_BYTES:
        return map(bytes.fromhex, sha256_of_each(paths, task))
    names = hashlib.sha256("\0".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()
    return map(bytes.fromhex, remembered_sums(paths, cache / "sums" / f"{names[:16]}.json", task))
