"""Sources of documents: text files, and datasets of the Hugging Face Hub or folders laid out like one.

To add a source, write a function that makes a `Source` of a `DataConfig`, and enter it in `SOURCES` under the fields of
`DataConfig` that name it.
"""

import codecs
import csv
import hashlib
import json
import logging
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import translate
from functools import cache, cached_property, partial
from itertools import chain
from os.path import isfile, realpath, split
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import regex
from filelock import FileLock

from gpt2.config import DataConfig
from gpt2.data.token_files import TokenFile, is_token_file, open_token_files
from gpt2.errors import UserError, few, one_line
from gpt2.runtime.console import is_terminal
from gpt2.runtime.files import (
    MANY_BYTES,
    atomic_write,
    damaged_file,
    read_dict,
    remembered_sums,
    remove,
    require_free_space,
    sha256_of_each,
)
from gpt2.runtime.hub import WITHOUT_NETWORK, caches, connect, move_hub_cache
from gpt2.validation import as_pattern, brief, files_matching, no_file

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20  # of a file, read at a time
INSTEAD = "convert it or leave it out (data.exclude)"
# Files that are recognized by their first bytes.
OTHER_KINDS = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "compressed",
    b"PK\3\4": "a zip",
}
# In pyarrow's errors about files that do not form one table.
WORDS_OF_ARROW = ("Couldn't cast", "Schema at index", "Failed to parse string", "changed from")
SECONDS_TO_MATCH = 1  # `data.document_start` with one row
BYTES_PER_TOKEN = 4.4  # of English, with GPT-2's tokenizer
MAX_PREAMBLE_ROWS = 10_000  # before the first document; with more, document_start is taken to be wrong


class Document(Protocol):
    """A text that may be larger than memory."""

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        """The text from one fraction of its length to another, in parts of bounded size.

        `parts(0, x)` and `parts(x, 1)` together are the whole text.
        """
        ...


class Documents(Protocol):
    """Documents that can be counted, and iterated over any number of times in the same order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Document]: ...


@dataclass
class Source:
    """The documents of each split.

    Without `validation`, a part of `train` is used for it; without `test`, the validation split is used.
    """

    fingerprint: str  # equal for equal documents
    train: Documents
    validation: Documents | None = None
    test: Documents | None = None
    length_unit: str | None = None  # unit in which `Document.parts` measures, if not characters
    text_bytes: int = 0  # of all splits together; 0: unknown
    token_files: dict[str, list[TokenFile]] | None = None  # of each split, in place of its documents

    @cached_property
    def count(self) -> int:
        """The number of training documents, for which all of them may be read."""
        return len(self.train)


def open_source(config: DataConfig) -> Source:
    """The source that a configuration names.

    Raises:
        UserError: It cannot be reached or read.
    """
    return SOURCES[_names(config)](config)


def describe_source(config: DataConfig) -> str:
    """The name of the source, such as `wikitext, wikitext-2-raw-v1`."""
    values = (getattr(config, name) for name in _names(config))
    return ", ".join(", ".join(value) if isinstance(value, list) else value for value in values if value is not None)


def _names(config: DataConfig) -> tuple[str, ...]:
    return next(names for names in SOURCES if getattr(config, names[0]) is not None)


def cache_folder(config: DataConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else caches()


# ---------------------------------------------------------------------------------------------------------------------
# Text files


@dataclass
class TextFile:
    """A UTF-8 file as a document, read in chunks. A byte order mark at its beginning is skipped."""

    path: Path

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        """See `Document`. Fractions are of the length in bytes, moved forward to the next beginning of a character.

        Raises:
            UserError: The file cannot be read, or this part of it is not UTF-8 or holds a NUL, as UTF-16 does.
        """
        try:
            with self.path.open("rb") as file:
                head = file.read(4)
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
                    f"data.files: {self.path} has a NUL at byte {place}, so it is UTF-16 or no text at all; {INSTEAD}"
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
    """The first place from `place` on where a character begins. Places are counted from byte `first` of the file."""
    if place == 0:
        return 0  # if the text begins with an invalid byte, it must be read and reported
    file.seek(first + place)
    data = file.read(3)  # at most three bytes of a character follow its first one
    return place + next((n for n, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))


@dataclass
class FileDocuments:
    """Each text file is a document, and each record of a file of JSON lines or CSV, which has it in one column."""

    paths: list[Path]
    column: str

    def __len__(self) -> int:
        return sum(1 for _ in self) if self.hold_records() else len(self.paths)

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            yield from self._records(path) if path.suffix.lower() in RECORDS else [TextFile(path)]

    def hold_records(self) -> bool:
        return any(path.suffix.lower() in RECORDS for path in self.paths)

    def _records(self, path: Path) -> Iterator[Document]:
        rows, number = RECORDS[path.suffix.lower()](_lines(TextFile(path).parts())), 0
        try:
            for number, row in enumerate(rows, start=1):
                if not isinstance(row, dict) or self.column not in row:
                    known = few(list(map(str, row))) if isinstance(row, dict) else "no names"
                    raise UserError(
                        f"data.text_column: record {number} of {path} has {known}, not {self.column!r}; "
                        f"name its column or leave the file out (data.exclude)"
                    )
                if not isinstance(text := row[self.column], str | None):
                    kind = type(text).__name__
                    raise UserError(
                        f"data.text_column: {self.column!r} in record {number} of {path} is {kind}, not text"
                    )
                yield TextDocument(text or "")
        except (ValueError, RecursionError, csv.Error) as error:
            raise UserError(f"data.files: record {number + 1} of {path} cannot be read: {error}") from error


def _lines(parts: Iterable[str]) -> Iterator[str]:
    begun: list[str] = []  # joined at its end only: a line may have many parts
    for part in parts:
        *ends, rest = part.split("\n")
        for end in ends:
            yield "".join([*begun, end, "\n"])
            begun = []
        begun.append(rest)
    yield "".join(begun)


def _json_lines(lines: Iterable[str]) -> Iterator[Any]:
    return (json.loads(line) for line in lines if line.strip())


# How records are read from the lines of a file, by the end of its name.
RECORDS: dict[str, Callable[[Iterable[str]], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": csv.DictReader,
    ".tsv": partial(csv.DictReader, delimiter="\t"),
}
csv.field_size_limit(sys.maxsize)  # a document may be longer than 128 KiB


def open_files(config: DataConfig) -> Source:
    """The documents, or the tokens, of the files that match `data.files`, identified by their contents.

    Raises:
        UserError: No file matches, or files of tokens are damaged.
    """
    if isinstance(config.files, str):
        raise UserError(f"data.files: a list is wanted, [{config.files!r}]")
    documents = FileDocuments(find_files(config.files or [], config.exclude), config.text_column)
    if not documents.paths:
        reasons = filter(None, map(no_file, config.files or []))
        left = f"data.files: nothing of {config.files} is left without data.exclude={config.exclude}"
        raise UserError(*[f"data.files: {reason}" for reason in reasons] or [left])
    try:
        if any(map(is_token_file, documents.paths)):
            return _source_of_tokens(documents.paths, config)
        fingerprint = _fingerprint(documents.paths, config)
    except OSError as error:
        raise UserError(f"data.files: cannot read {error.filename}: {error.strerror}") from error
    if documents.hold_records():
        fingerprint = json.dumps([fingerprint, [path.suffix for path in documents.paths], config.text_column])
    text_bytes = sum(path.stat().st_size for path in documents.paths)
    return Source(fingerprint, documents, length_unit="bytes", text_bytes=text_bytes)


def _source_of_tokens(paths: list[Path], config: DataConfig) -> Source:
    if others := [str(path) for path in paths if not is_token_file(path)]:
        raise UserError(f"data.files: {few(others)} is text beside files of tokens (.bin); name one kind")
    if config.tokenizer == "train":
        raise UserError("data.tokenizer: data.files holds tokens, so none is learned; gpt2 is theirs (data=tokens)")
    splits = open_token_files(paths)
    contents = {split: _fingerprint([file.path for file in files], config) for split, files in splits.items()}
    validation, test = (() if splits[split] else None for split in ("validation", "test"))
    return Source(json.dumps(contents), (), validation, test, token_files=splits)


def find_files(patterns: list[str], exclude: list[str]) -> list[Path]:
    """The files that match any pattern and no exclusion, each once, sorted by path.

    A link of another name than its file's, as in the cache of the Hub, stays: the name says what is in the file.
    """
    resolve, here = _resolver(), Path.cwd()
    files: dict[str, set[str]] = {}
    named: dict[str, Path] = {}
    for name in sorted(filter(isfile, chain.from_iterable(map(files_matching, patterns)))):
        path = resolve(name)
        files.setdefault(path, set()).update((name, str(here / name), path))
        named[path] = Path(path) if split(path)[1] == split(name)[1] else here / name
    excluded = {pattern: _matches(pattern, files) for pattern in exclude}
    if useless := [repr(pattern) for pattern, paths in excluded.items() if not paths]:
        log.warning("Note: data.exclude: no file of data.files matches %s.", ", ".join(useless))
    return sorted(named[path] for path in files.keys() - set().union(*excluded.values()))


def _resolver() -> Callable[[str], str]:
    """`realpath` that resolves each folder once: a standard library may hold 10,000 files of installed packages."""
    resolve_folder = cache(realpath)

    def resolve(name: str) -> str:
        folder, file = split(name)
        path = Path(resolve_folder(folder), file)
        return realpath(path) if path.is_symlink() else str(path)

    return resolve


def _matches(pattern: str, files: dict[str, set[str]]) -> set[str]:
    """The files, given with their names, that match a pattern; `*` also stands for any number of folders."""
    named = set(map(realpath, files_matching(pattern)))
    patterns = {as_pattern(pattern), as_pattern(realpath(pattern))}
    is_like = re.compile("|".join(map(translate, patterns))).match
    return {path for path, names in files.items() if path in named or any(map(is_like, names))}


def _fingerprint(paths: Sequence[Path], config: DataConfig) -> str:
    """Equal for equal contents in the same order."""
    return hashlib.sha256(b"".join(_digests(paths, cache_folder(config)))).hexdigest()


def _digests(paths: Sequence[Path], cache: Path) -> Iterator[bytes]:
    """The SHA-256 of each file. If they are large, it is remembered."""
    task = "Reading the files"
    if sum(path.stat().st_size for path in paths) < MANY_BYTES:
        return map(bytes.fromhex, sha256_of_each(paths, task))
    names = hashlib.sha256("\0".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()
    return map(bytes.fromhex, remembered_sums(paths, cache / "sums" / f"{names[:16]}.json", task))


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


@dataclass
class TextDocument:
    """A document in memory."""

    text: str

    def parts(self, start: float = 0.0, stop: float = 1.0) -> Iterator[str]:
        length = len(self.text)
        yield self.text[int(length * start) : int(length * stop)]


class TableDocuments:
    """The documents of a table: one a row, or, if there is a pattern, the rows from one match up to the next."""

    def __init__(self, table: "datasets.Dataset", column: str, document_start: str | None):
        self.table, self.column, self.document_start = table, column, document_start
        self.starts_document = regex.compile(document_start).match if document_start else None

    def __len__(self) -> int:
        return len(self.table) if self.starts_document is None else sum(1 for _ in self)

    def __iter__(self) -> Iterator[TextDocument]:
        return map(TextDocument, self._rows() if self.starts_document is None else self._join(self._rows()))

    def _rows(self) -> Iterator[str]:
        try:
            for batch in self.table.iter(1000):
                yield from (text or "" for text in batch[self.column])
        except (ValueError, OSError, SystemError) as error:  # of pyarrow
            raise UserError(f"data.dataset_name: its cached table is damaged: {one_line(error)}") from error

    def _join(self, rows: Iterable[str]) -> Iterator[str]:
        assert self.starts_document is not None
        document: list[str] = []
        any_start = False
        # Without a repetition, none is needed, and measuring the time takes as long as matching.
        limit = SECONDS_TO_MATCH if set(self.document_start or "") & set("*+?{") else None
        for row in rows:
            try:
                starts = self.starts_document(row, timeout=limit)
            except TimeoutError as error:
                raise UserError(
                    f"data.document_start: {brief(self.document_start)} takes more than {limit} s for the row "
                    f"{reprlib.repr(row)}; a repetition in a repetition, such as (a+)+, may never end"
                ) from error
            if starts:
                any_start = True
                if document:
                    yield "".join(document)
                document = []
            document.append(row if row.endswith("\n") else row + "\n")
            if not any_start and len(document) > MAX_PREAMBLE_ROWS:
                break
        if not any_start:
            raise UserError(
                f"data.document_start: no row matches {self.document_start!r}, so no document begins; "
                f"data.document_start=null makes each row a document"
            )
        yield "".join(document)


def open_dataset(config: DataConfig) -> Source:
    """A dataset of the Hugging Face Hub or its cache, or a local folder laid out like one.

    Raises:
        UserError: It cannot be reached or read, or has no such configuration, split or text column.
    """
    splits = [config.train_split, config.validation_split, config.test_split]
    column, pattern = config.text_column, config.document_start
    tables, identity = load_tables(config.dataset_name, config.dataset_config, splits, config.cache_dir, column)
    documents = [None if table is None else TableDocuments(table, column, pattern) for table in tables]
    about = [
        identity or [table and table._fingerprint for table in tables],
        *(config.dataset_config, splits, column, pattern),
    ]
    text_bytes = sum(table.data[column].nbytes for table in tables if table)
    return Source(json.dumps(about), *documents, text_bytes=text_bytes)  # type: ignore  # the first is never None


def load_tables(
    name: str,
    configuration: str | None,
    splits: Sequence[str | None],
    cache_dir: str | None = None,
    column: str | None = None,
    key: str = "data.dataset_name",
) -> "tuple[list[datasets.Dataset | None], str | None]":
    """Splits of a dataset of the Hub or its cache, or of a local folder laid out like one, and a folder's fingerprint.

    Args:
        splits: Their names; None is no split.
        column: One that must be text.
        key: The option by which the user named it, for the error message.

    Raises:
        UserError: It cannot be reached or read, or has no such configuration, split or column.
    """
    identity = None
    with ExitStack() as verified:
        if Path(name).is_dir():
            # The cache of `datasets` mistakes a changed folder, or another one of the same name, for the cached one.
            cache = Path(cache_dir) if cache_dir else caches()
            identity = _folder_fingerprint(Path(name), cache)
            tables = cache / "datasets" / identity[:16]
            verified.enter_context(verified_cache(tables))
            cache_dir = str(tables)
        else:
            connect()
        return _load_tables(name, configuration, splits, cache_dir, column, key), identity


@contextmanager
def verified_cache(folder: Path) -> Iterator[None]:
    """Inside the block `datasets` writes or reads its files in `folder`; changed bytes, which it ignores, are detected.

    Their checksums are stored beside the folder. A damaged folder is removed first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".json")
    with FileLock(folder.with_suffix(".lock")):
        sums = read_dict(file)
        problem = (damaged_file(folder, sums) if sums else "its checksums are missing") if folder.exists() else None
        if problem:
            log.warning("data: the cache %s is damaged (%s), it is made again", folder, problem)
            remove(folder)
        try:
            yield
        finally:
            made = (path for pattern in ("*.arrow", "*.json") for path in folder.glob(f"**/{pattern}"))
            names = [str(path.relative_to(folder)) for path in made if ".incomplete" not in str(path)]
            if not names:
                remove(folder)
            known = {name: sums[name] for name in names if name in sums and not problem}
            new = [name for name in names if name not in known]
            known |= zip(
                new, sha256_of_each([folder / name for name in new], "Reading the cached dataset"), strict=True
            )
            with atomic_write(file) as stored:
                stored.write(json.dumps(known).encode())


def _load_tables(
    name: str,
    configuration: str | None,
    splits: Sequence[str | None],
    cache_dir: str | None,
    column: str | None,
    key: str,
) -> "list[datasets.Dataset | None]":
    move_hub_cache()
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from pyarrow.dataset import ParquetFragmentScanOptions

    if not is_terminal():
        datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, configuration, cache_dir=cache_dir)
        if not Path(builder.cache_dir).exists():
            _require_space(builder)
        if hasattr(builder.config, "fragment_scan_options"):  # of parquet: do not read whole files into memory
            options = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)
            builder.config.fragment_scan_options = options
        builder.download_and_prepare()
        tables = [builder.as_dataset(split) if split else None for split in splits]
    except (ConnectionError, DatasetNotFoundError) as error:
        instead = WITHOUT_NETWORK if column else f"without a network: {key}_folder=FOLDER with {name} in it"
        raise UserError(
            f"could not reach dataset {name!r} on the Hugging Face Hub, nor find it in the cache; {instead}"
        ) from error
    except (ValueError, OSError, TypeError, AttributeError, DatasetsError) as error:  # a damaged cache gives any
        reason = " ".join(str(error.__cause__ or error).split())
        if any(words in reason for words in WORDS_OF_ARROW):
            example = f", such as text as {column!r}" if column else ""
            reason = f"its files do not have the same columns with values of the same types{example}"
        raise UserError(f"{key}: cannot load {name!r}: {reason}") from error
    for table in tables if column else []:
        if table is not None:
            _require_text(table, str(column))
    return tables


def _require_text(table: "datasets.Dataset", column: str) -> None:
    if column not in table.column_names:
        raise UserError(f"data.text_column: {column!r} is not one of {', '.join(table.column_names)}")
    kind = getattr(table.features[column], "dtype", "nested or mixed values")
    if kind not in ("string", "large_string"):
        raise UserError(f"data.text_column: {column!r} holds {kind}, not text")


def _require_space(builder: "datasets.DatasetBuilder") -> None:
    """Check that the disk can hold what `datasets` makes of a dataset's files, and the tokens, if they are local.

    Raises:
        UserError: It cannot.
    """
    import fsspec
    from pyarrow import parquet

    needed = 0.0
    for file in chain.from_iterable((builder.config.data_files or {}).values()):
        with suppress(Exception):  # an unknown size is no reason to stop
            if not Path(file).is_file():
                needed += 2 * (fsspec.url_to_fs(file)[0].size(file) or 0)  # the download, and a table at least as large
                continue
            table = Path(file).stat().st_size
            if file.endswith(".parquet"):  # which is compressed
                footer = parquet.read_metadata(file)
                table = sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))
            needed += table * (1 + 2 / BYTES_PER_TOKEN)
    require_free_space(Path(builder.cache_dir), int(needed), "preparing the dataset")


def _folder_fingerprint(folder: Path, cache: Path) -> str:
    """Equal for equal contents under the same names. Hidden files and folders are ignored."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    digests = _digests([folder.absolute() / name for name in visible], cache)
    contents = [
        [name.as_posix(), hashlib.sha256(digest).hexdigest()] for name, digest in zip(visible, digests, strict=True)
    ]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


# The fields of DataConfig that name a source. The first source whose first field is set is used.
SOURCES: dict[tuple[str, ...], Callable[[DataConfig], Source]] = {
    ("files",): open_files,
    ("dataset_name", "dataset_config"): open_dataset,
}
