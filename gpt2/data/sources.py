"""Where documents come from: text files, and datasets of the Hugging Face Hub or laid out like them."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from gpt2.config import DataConfig
from gpt2.errors import UserError
from gpt2.runtime.console import is_terminal
from gpt2.runtime.hub import WITHOUT_NETWORK, caches, connect
from gpt2.validation import files_matching

if TYPE_CHECKING:
    import datasets

PART = 1 << 20  # bytes of a file that are read at a time
LONGEST_PREAMBLE = 10_000  # rows before the first document: more of them mean that the pattern fits other data


class Document(Protocol):
    """A text that may be longer than memory."""

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        """The text between two shares of its length, in parts of bounded size as far as it does not lie in memory.

        What goes up to a share and what goes on from it are the whole together.
        """
        ...


class Documents(Protocol):
    """Texts that can be counted and, any number of times, gone through in the same order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Document]: ...


@dataclass
class Source:
    """The documents of each split. A `validation` of None is held out of `train`; a `test` of None is `validation`."""

    fingerprint: str
    train: Documents
    validation: Documents | None = None
    test: Documents | None = None


@dataclass
class TextInMemory:
    """A document that somebody has read already."""

    text: str

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        length = len(self.text)
        yield self.text[int(length * start) : int(length * stop)]


@dataclass
class TextFile:
    """A document that is a file, read PART bytes at a time. A byte order mark at its beginning is no text."""

    path: Path

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        """What it says in `Document`; a share is one of the file's bytes, moved on to the next character's first.

        Raises:
            UserError: The file cannot be read, or this part of it is not UTF-8.
        """
        try:
            with self.path.open("rb") as file:
                first = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
                length = file.seek(0, os.SEEK_END) - first
                begin, end = (first + _next_character(file, first, int(length * share)) for share in (start, stop))
                yield from self._decoded(file, begin, end)
        except OSError as error:
            raise UserError(f"data.files: cannot read {self.path}: {error.strerror}") from error

    def _decoded(self, file: BinaryIO, position: int, end: int) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        file.seek(position)
        while True:
            data = file.read(min(PART, end - position))
            begun = len(decoder.getstate()[0])  # bytes of a character whose rest begins this part
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = position - begun + error.start
                raise UserError(
                    f"data.files: {self.path} is not UTF-8 at byte {place}; convert it or leave it out (data.exclude)"
                ) from error
            position += len(data)
            yield text
            if not data:
                return


def _next_character(file: BinaryIO, first: int, place: int) -> int:
    """Where the first character from a place on begins, both counted from the byte `first` of a file of UTF-8."""
    if place == 0:
        return 0  # a byte that begins no character is to be found there, not to be passed over
    file.seek(first + place)
    next_bytes = file.read(3)  # a character has at most three bytes after its first
    return place + next((n for n, byte in enumerate(next_bytes) if byte & 0xC0 != 0x80), len(next_bytes))


class TextFiles:
    """One document a file."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[TextFile]:
        return map(TextFile, self.paths)


class Rows:
    """The documents of a table: a row each, or, with a pattern, all rows from one that matches up to the next."""

    def __init__(self, table: "datasets.Dataset", column: str, document_start: str | None):
        self.table, self.column, self.document_start = table, column, document_start
        self.starts_document = re.compile(document_start).match if document_start else None

    def __len__(self) -> int:
        return len(self.table) if self.starts_document is None else sum(1 for _ in self)

    def __iter__(self) -> Iterator[TextInMemory]:
        return map(TextInMemory, self._texts())

    def _texts(self) -> Iterator[str]:
        rows = (text or "" for batch in self.table.iter(1000) for text in batch[self.column])
        if self.starts_document is None:
            yield from rows
            return
        document: list[str] = []
        any_start = False
        for row in rows:
            if self.starts_document(row):
                any_start = True
                if document:
                    yield "".join(document)
                document = []
            document.append(row if row.endswith("\n") else row + "\n")
            if not any_start and len(document) > LONGEST_PREAMBLE:
                break
        if not any_start:
            raise UserError(
                f"data.document_start: no row begins a document by matching {self.document_start!r}; "
                f"data.document_start=null makes each row a document"
            )
        yield "".join(document)


def cache_folder(config: DataConfig | None = None) -> Path:
    """Where this program keeps what it can make again."""
    if config and config.cache_dir:
        return Path(config.cache_dir)
    return caches()


def find_files(patterns: list[str], exclude: list[str]) -> list[Path]:
    """The files that match any pattern and no exclusion, each once, sorted."""
    matches = (path for pattern in patterns for path in files_matching(pattern))
    kept = (Path(path) for path in matches if not any(fnmatch(path, unwanted) for unwanted in exclude))
    return sorted({path.resolve() for path in kept if path.is_file()})


def fingerprint_of(paths: Iterable[Path]) -> str:
    """Equal for the same contents in the same order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fingerprint_of_folder(folder: Path) -> str:
    """Equal for the same contents under the same names. Hidden files and folders have no part in it."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    contents = [[name.as_posix(), fingerprint_of([folder / name])] for name in visible]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def text_source(config: DataConfig) -> Source:
    """The files that `config.files` names, identified by their content."""
    if isinstance(config.files, str):
        raise UserError(f"data.files: a list is wanted, [{config.files!r}]")
    paths = find_files(config.files or [], config.exclude)
    if not paths:
        raise UserError(f"data.files: no file matches {config.files} once data.exclude={config.exclude} is taken out")
    return Source(fingerprint_of(paths), TextFiles(paths))


def dataset_source(config: DataConfig) -> Source:
    """A dataset of the Hugging Face Hub, of its cache, or of a local folder laid out like one.

    Raises:
        UserError: It cannot be reached or read, or has no such configuration, split or column of text.
    """
    cache_dir, content = config.cache_dir, None
    if Path(config.dataset_name).is_dir():
        # `datasets` takes a folder that has changed, or another one of the same name, for the one it has cached.
        content = fingerprint_of_folder(Path(config.dataset_name))
        cache_dir = str(cache_folder(config) / "datasets" / content[:16])
    else:
        connect()
    tables = load_tables(config, cache_dir)
    for table in filter(None, tables):
        if config.text_column not in table.column_names:
            raise UserError(f"data.text_column: {config.text_column!r} is not one of {', '.join(table.column_names)}")
        kind = getattr(table.features[config.text_column], "dtype", "nested values")
        if kind not in ("string", "large_string"):
            raise UserError(f"data.text_column: {config.text_column!r} holds {kind}, not text")

    identity = content or [table and table._fingerprint for table in tables]
    splits = [config.train_split, config.validation_split, config.test_split]
    documents = [table and Rows(table, config.text_column, config.document_start) for table in tables]
    about = [identity, config.dataset_config, splits, config.text_column, config.document_start]
    return Source(json.dumps(about), *documents)  # type: ignore[arg-type]  # the first, train, is always there


def load_tables(config: DataConfig, cache_dir: str | None) -> "list[datasets.Dataset | None]":
    """The training, validation and test split, None for one that the configuration leaves out."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    if not is_terminal():
        datasets.disable_progress_bars()

    def load(split: str | None) -> "datasets.Dataset | None":
        name = config.dataset_name
        return datasets.load_dataset(name, config.dataset_config, split=split, cache_dir=cache_dir) if split else None

    try:
        return [load(split) for split in (config.train_split, config.validation_split, config.test_split)]
    except (ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"could not reach dataset {config.dataset_name!r} on the Hugging Face Hub, nor find it in the cache; "
            f"{WITHOUT_NETWORK}"
        ) from error
    except (ValueError, OSError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"data.dataset_name: cannot load {config.dataset_name!r}: {reason}") from error
