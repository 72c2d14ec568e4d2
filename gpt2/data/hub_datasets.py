"""Datasets of the Hugging Face Hub, or folders laid out like one, as a source: `data.dataset_name`."""

import hashlib
import json
import logging
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import regex
from filelock import FileLock

from gpt2.config import DataConfig
from gpt2.data.documents import BYTES_PER_TOKEN, Source, TextDocument, digests_of
from gpt2.errors import UserError, one_line
from gpt2.runtime.console import is_terminal
from gpt2.runtime.files import atomic_write, damaged_file, read_dict, remove, require_free_space, sha256_of_each
from gpt2.runtime.hub import WITHOUT_NETWORK, caches, connect, move_hub_cache
from gpt2.runtime.plain_values import brief

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

# Parts of pyarrow's errors about files that do not form one table.
SIGNS_OF_DIFFERENT_COLUMNS = ("Couldn't cast", "Schema at index", "Failed to parse string", "changed from")
SECONDS_TO_MATCH = 1  # limit for matching `data.document_start` with one row
MAX_PREAMBLE_ROWS = 10_000  # rows before the first document; more mean that `data.document_start` is wrong


class TableDocuments:
    """The documents of a table: one per row, or with `document_start`, the rows from one match to the next."""

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
        except (ValueError, OSError, SystemError) as error:  # from pyarrow
            raise UserError(f"data.dataset_name: its cached table is damaged: {one_line(error)}") from error

    def _join(self, rows: Iterable[str]) -> Iterator[str]:
        assert self.starts_document is not None
        document: list[str] = []
        any_start = False
        for row in rows:
            try:
                starts = self.starts_document(row, timeout=SECONDS_TO_MATCH)
            except TimeoutError as error:
                raise UserError(
                    f"data.document_start: {brief(self.document_start)} takes more than {SECONDS_TO_MATCH} s "
                    f"for the row {reprlib.repr(row)}; a repetition in a repetition, such as (a+)+, may never end"
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
    """Open a dataset of the Hugging Face Hub or its cache, or a local folder laid out like one.

    Raises:
        UserError: The dataset cannot be reached or read, or has no such configuration, split or text column.
    """
    splits = [config.train_split, config.validation_split, config.test_split]
    column, pattern = config.text_column, config.document_start
    tables, identity = load_tables(config.dataset_name, config.dataset_config, splits, config.cache_dir, column)
    documents = [None if table is None else TableDocuments(table, column, pattern) for table in tables]
    fingerprints = [None if table is None else table._fingerprint for table in tables]
    about = [identity or fingerprints, config.dataset_config, splits, column, pattern]
    text_bytes = sum(table.data[column].nbytes for table in tables if table)
    return Source(json.dumps(about), *documents, text_bytes=text_bytes, holds_records=True)  # type: ignore  # the first is never None


def load_tables(
    name: str,
    configuration: str | None,
    splits: Sequence[str | None],
    cache_dir: str | None = None,
    column: str | None = None,
    key: str = "data.dataset_name",
) -> "tuple[list[datasets.Dataset | None], str | None]":
    """Load splits of a dataset of the Hub or its cache, or of a local folder laid out like one.

    Args:
        splits: The names of the splits. None is no split, and its table is None.
        column: A column that must hold text.
        key: The option that names the dataset, for the error message.

    Returns:
        The tables of the splits, and the fingerprint of a local folder; None for other datasets.

    Raises:
        UserError: The dataset cannot be reached or read, or has no such configuration, split or column.
    """
    move_hub_cache()
    identity: str | None = None
    verified: AbstractContextManager[None] = nullcontext()
    if Path(name).is_dir():
        # `datasets` would use its cache even if the folder has changed, or is another folder of the same name.
        cache = Path(cache_dir) if cache_dir else caches()
        identity = _folder_fingerprint(Path(name), cache)
        cache_dir = str(cache / "datasets" / identity[:16])
        verified = verified_cache(Path(cache_dir))
    else:
        connect()
    import datasets

    if not is_terminal():
        datasets.disable_progress_bars()
    with verified, _loading_errors(name, column, key):
        builder = datasets.load_dataset_builder(name, configuration, cache_dir=cache_dir)
        if not Path(builder.cache_dir).exists():
            _require_space(builder)
        _bound_memory(builder)
        builder.download_and_prepare()
        tables = [builder.as_dataset(split) if split else None for split in splits]
    for table in tables:
        if column and table is not None:
            _require_text(table, column)
    return tables, identity


def _bound_memory(builder: "datasets.DatasetBuilder") -> None:
    """Keep pyarrow from reading whole Parquet files into memory."""
    from pyarrow.dataset import ParquetFragmentScanOptions

    if hasattr(builder.config, "fragment_scan_options"):
        options = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)
        builder.config.fragment_scan_options = options


@contextmanager
def _loading_errors(name: str, column: str | None, key: str) -> Iterator[None]:
    """Turn errors of `datasets` into UserErrors."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        yield
    except (ConnectionError, DatasetNotFoundError) as error:
        instead = WITHOUT_NETWORK if column else f"without a network: {key}_folder=FOLDER with {name} in it"
        raise UserError(
            f"could not reach dataset {name!r} on the Hugging Face Hub, nor find it in the cache; {instead}"
        ) from error
    except (ValueError, OSError, TypeError, AttributeError, DatasetsError) as error:  # a damaged cache raises any
        reason = " ".join(str(error.__cause__ or error).split())
        if any(sign in reason for sign in SIGNS_OF_DIFFERENT_COLUMNS):
            example = f", such as text as {column!r}" if column else ""
            reason = f"its files do not have the same columns with values of the same types{example}"
        raise UserError(f"{key}: cannot load {name!r}: {reason}") from error


@contextmanager
def verified_cache(folder: Path) -> Iterator[None]:
    """Verify the files that `datasets` reads from its cache `folder` in this block: `datasets` itself does not.

    The checksums of the files that it writes there are stored beside the folder. A damaged folder is removed first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".json")
    with FileLock(folder.with_suffix(".lock")):
        sums = read_dict(file) if folder.exists() else {}
        problem = damaged_file(folder, sums) if sums else "its checksums are missing"
        if folder.exists() and problem:
            log.warning("data: the cache %s is damaged (%s), it is made again", folder, problem)
            remove(folder)
            sums = {}
        try:
            yield
        finally:
            made = (path for pattern in ("*.arrow", "*.json") for path in folder.glob(f"**/{pattern}"))
            names = [str(path.relative_to(folder)) for path in made if ".incomplete" not in str(path)]
            if not names:
                remove(folder)
            new = [name for name in names if name not in sums]
            new_sums = sha256_of_each([folder / name for name in new], "Reading the cached dataset")
            sums |= zip(new, new_sums, strict=True)
            with atomic_write(file) as stored:
                stored.write(json.dumps({name: sums[name] for name in names}).encode())


def _require_text(table: "datasets.Dataset", column: str) -> None:
    if column not in table.column_names:
        raise UserError(f"data.text_column: {column!r} is not one of {', '.join(table.column_names)}")
    kind = getattr(table.features[column], "dtype", "nested or mixed values")
    if kind not in ("string", "large_string"):
        raise UserError(f"data.text_column: {column!r} holds {kind}, not text")


def _require_space(builder: "datasets.DatasetBuilder") -> None:
    """Check that the disk has space for the table that `datasets` makes of a dataset's files, and for the download.

    For local files, space for the tokens is required too.

    Raises:
        UserError: There is less free space.
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
            if file.endswith(".parquet"):  # the file is compressed
                footer = parquet.read_metadata(file)
                table = sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))
            needed += table * (1 + 2 / BYTES_PER_TOKEN)
    require_free_space(Path(builder.cache_dir), int(needed), "preparing the dataset")


def _folder_fingerprint(folder: Path, cache: Path) -> str:
    """A hash of the names and contents of the files in a folder, without hidden files and folders."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    digests = digests_of([folder.absolute() / name for name in visible], cache)
    contents = [
        [name.as_posix(), hashlib.sha256(digest).hexdigest()] for name, digest in zip(visible, digests, strict=True)
    ]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
