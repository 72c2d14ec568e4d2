"""Text files, files of records and files of tokens as a source: `data.files`."""

import codecs
import csv
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import partial
from itertools import chain
from os.path import isdir, isfile, realpath, split
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.config import DataConfig
from gpt2.data.documents import Document, Source, TextDocument, fingerprint_of
from gpt2.data.token_files import is_token_file, open_token_files
from gpt2.errors import UserError, few
from gpt2.runtime.patterns import as_pattern, files_matching

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20  # bytes read at a time
INSTEAD = "convert it or leave it out (data.exclude)"
# The first bytes of files that are not UTF-8 text.
OTHER_KINDS = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    **dict.fromkeys((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ"), "compressed"),  # gzip, zstd, xz
    **dict.fromkeys((b"BZh%d1AY" % level for level in range(1, 10)), "compressed"),  # bzip2
    b"PK\3\4": "a zip",
    b"PAR1": "Parquet (data.dataset_name=FOLDER reads it)",
    b"%PDF": "a PDF",
}


@dataclass
class TextFile:
    """A UTF-8 file as a document, read in chunks. A byte order mark at the beginning is skipped."""

    path: Path

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        """Implement `Document`. Fractions are of the length in bytes, rounded up to the beginning of a character.

        Raises:
            UserError: The file cannot be read, or this part of it is not UTF-8 or holds a NUL, as UTF-16 does.
        """
        try:
            with self.path.open("rb") as file:
                head = file.read(max(map(len, OTHER_KINDS)))
                if kind := next((kind for sign, kind in OTHER_KINDS.items() if head.startswith(sign)), None):
                    raise UserError(f"data.files: {self.path} is {kind}, not UTF-8 text; {INSTEAD}")
                first = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
                length = file.seek(0, os.SEEK_END) - first
                begin, end = (first + _next_character(file, first, int(length * share)) for share in (start, stop))
                yield from self._decode(file, begin, end)
        except OSError as error:
            raise UserError(f"data.files: cannot read {self.path}: {error.strerror}") from error

    def _decode(self, file: BinaryIO, position: int, end: int) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        file.seek(position)
        while True:
            data = file.read(min(CHUNK_BYTES, end - position))
            pending = len(decoder.getstate()[0])  # bytes of a character that continues in this chunk
            if 0 in data:
                place = position + data.index(0)
                raise UserError(
                    f"data.files: {self.path} has a NUL at byte {place}, so it is UTF-16 or not text; {INSTEAD}"
                )
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = position - pending + error.start
                raise UserError(f"data.files: {self.path} is not UTF-8 at byte {place}; {INSTEAD}") from error
            position += len(data)
            yield text
            if not data:
                return


def _next_character(file: BinaryIO, first: int, place: int) -> int:
    """Return the first place at or after `place` where a character begins. Places are offsets from byte `first`."""
    if place == 0:
        return 0  # an invalid byte at the beginning of the text must be read, so that it is reported
    file.seek(first + place)
    data = file.read(3)  # at most three bytes of a character follow its first one
    return place + next((n for n, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))


@dataclass
class FileDocuments:
    """Text files, each a document, and files of JSON lines or CSV, each record of which is a document.

    The text of a record is in one column.
    """

    paths: list[Path]
    column: str

    def __len__(self) -> int:
        return sum(1 for _ in self) if self.hold_records() else len(self.paths)

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            yield from self._records(path) if path.suffix.lower() in RECORDS else [TextFile(path)]

    def hold_records(self) -> bool:
        return any(path.suffix.lower() in RECORDS for path in self.paths)

    def fingerprint(self, config: DataConfig) -> str:
        """A hash that is equal for equal documents.

        Raises:
            OSError: A file cannot be read.
        """
        contents = fingerprint_of(self.paths, config)
        if not self.hold_records():
            return contents
        return json.dumps([contents, [path.suffix for path in self.paths], self.column])

    def _records(self, path: Path) -> Iterator[Document]:
        number = 0  # of the last line that was read

        def lines() -> Iterator[str]:
            nonlocal number
            for number, line in enumerate(_lines(TextFile(path).parts()), start=1):  # noqa: B007  # for the messages
                yield line

        try:
            for row in RECORDS[path.suffix.lower()](lines()):
                if not isinstance(row, dict) or self.column not in row:
                    known = few(list(map(str, row))) if isinstance(row, dict) else "no names"
                    raise UserError(
                        f"data.text_column: line {number} of {path} has {known}, not {self.column!r}; "
                        f"name its column or leave the file out (data.exclude)"
                    )
                if None in row:  # the fields beyond the header
                    raise UserError(f"data.files: line {number} of {path} has more fields than the header; quote texts")
                if not isinstance(text := row[self.column], str | None):
                    kind = type(text).__name__
                    raise UserError(f"data.text_column: {self.column!r} in line {number} of {path} is {kind}, not text")
                yield TextDocument(text or "")
        except (ValueError, RecursionError, csv.Error) as error:
            raise UserError(f"data.files: line {number} of {path} cannot be read: {error}") from error


def _lines(parts: Iterable[str]) -> Iterator[str]:
    begun: list[str] = []  # parts of the current line: joined once at its end, because there may be many
    for part in parts:
        *ends, rest = part.split("\n")
        for end in ends:
            yield "".join([*begun, end, "\n"])
            begun = []
        begun.append(rest)
    yield "".join(begun)


def _json_lines(lines: Iterable[str]) -> Iterator[Any]:
    return (json.loads(line) for line in lines if line.strip())


# Functions that read records from the lines of a file, by the suffix of its name.
RECORDS: dict[str, Callable[[Iterable[str]], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": partial(csv.DictReader, strict=True),  # an open quote is an error
    ".tsv": partial(csv.DictReader, delimiter="\t", strict=True),
}
csv.field_size_limit(sys.maxsize)  # a document may be longer than 128 KiB


def open_files(config: DataConfig) -> Source:
    """Open the documents, or the tokens, in the files that match `data.files`. Their fingerprint is of the contents.

    Files that match `data.validation_files` are the validation split, and are not trained on.

    Raises:
        UserError: No file is left, or token files are damaged.
    """
    validation = FileDocuments(find_files(config.validation_files or [], []), config.text_column)
    paths = find_files(config.files or [], config.exclude)
    documents = FileDocuments([path for path in paths if path not in validation.paths], config.text_column)
    if not documents.paths:  # every pattern matches a file: see `gpt2.validation`
        others = {"exclude": config.exclude, "validation_files": config.validation_files}
        without = " and ".join(f"data.{name}={patterns}" for name, patterns in others.items() if patterns)
        raise UserError(f"data.files: nothing of {config.files} is left{f' without {without}' if without else ''}")
    try:
        if any(map(is_token_file, documents.paths)):
            return _source_of_tokens(documents.paths, config)
        fingerprint, of_validation = documents.fingerprint(config), validation.fingerprint(config)
    except OSError as error:
        raise UserError(f"data.files: cannot read {error.filename}: {error.strerror}") from error
    _note_arrays(documents.paths)
    text_bytes = sum(path.stat().st_size for path in [*documents.paths, *validation.paths])
    records = documents.hold_records()
    source = Source(fingerprint, documents, text_bytes=text_bytes, holds_records=records)
    if config.validation_files is not None:
        source.validation, source.fingerprint = validation, json.dumps([fingerprint, of_validation])
    return source


def _note_arrays(paths: list[Path]) -> None:
    """Note files with an array of JSON objects, which are not read as records."""
    arrays = []
    for path in paths:
        if path.suffix.lower() == ".json":
            with path.open("rb") as file:
                arrays += [str(path)] if file.read(64).lstrip().startswith(b"[") else []
    if arrays:
        what = "is read as plain text; for a document per record, write one JSON object per line into a .jsonl file"
        log.warning(f"Note: {few(arrays)} {what}.")


def _source_of_tokens(paths: list[Path], config: DataConfig) -> Source:
    if others := [str(path) for path in paths if not is_token_file(path)]:
        raise UserError(f"data.files: {few(others)} is text beside files of tokens (.bin); name one kind")
    if config.tokenizer == "train":
        raise UserError("data.tokenizer: data.files holds tokens, so name their tokenizer, usually gpt2 (data=tokens)")
    if config.validation_files is not None:
        raise UserError("data.validation_files: this is for text; the name of a token file decides its split")
    splits = open_token_files(paths)
    contents = {split: fingerprint_of([file.path for file in files], config) for split, files in splits.items()}
    validation, test = (() if splits[split] else None for split in ("validation", "test"))
    return Source(json.dumps(contents), (), validation, test, token_files=splits)


def find_files(patterns: list[str], exclude: list[str]) -> list[Path]:
    """Return the files that match any pattern and no exclusion, each once, sorted by path.

    A link is resolved unless its target has another name, as in the Hub's cache: the link's name shows the format.
    Broken links, pipes and the like are left out with a note.
    """
    here = Path.cwd()
    files: dict[str, set[str]] = {}
    named: dict[str, Path] = {}
    unreadable: set[str] = set()
    for name in sorted(chain.from_iterable(map(files_matching, patterns))):
        path = realpath(name)
        if isdir(path):  # noqa: PTH112  # `Path.is_dir` raises in a folder that may be listed but not entered
            continue
        if not isfile(path):  # noqa: PTH113
            unreadable.add(path)
        files.setdefault(path, set()).update((name, str(here / name), path))
        named[path] = Path(path) if split(path)[1] == split(name)[1] else here / name
    excluded = {pattern: _matches(pattern, files) for pattern in exclude}
    if useless := [repr(pattern) for pattern, paths in excluded.items() if not paths]:
        log.warning("Note: data.exclude: no file of data.files matches %s.", ", ".join(useless))
    remaining = files.keys() - set().union(*excluded.values())
    if skipped := sorted(str(named[path]) for path in remaining & unreadable):
        log.warning("Note: files that are pipes, sockets, devices or broken links are left out: %s", few(skipped))
    return sorted(named[path] for path in remaining - unreadable)


def _matches(pattern: str, files: dict[str, set[str]]) -> set[str]:
    """Return the keys of `files` of which one of the names matches a pattern. `*` also matches `/`."""
    named = set(map(realpath, files_matching(pattern)))
    patterns = {as_pattern(pattern), as_pattern(realpath(pattern))}
    is_like = re.compile("|".join(map(translate, patterns))).match
    return {path for path, names in files.items() if path in named or any(map(is_like, names))}
