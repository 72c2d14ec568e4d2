"""The storage of a study: shared by processes, and locked for changes. No message contains its password."""

import json
import logging
import os
import re
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import quote

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from gpt2.errors import ResourceError, UserError, one_line, without_password

log = logging.getLogger(__name__)

SQLITE, JOURNAL = "sqlite:///", "journal:///"
APPEND_LOCK = ".append-lock"  # suffix of the lock file beside a journal
ENTRY = b'{"op_code":'  # the beginning of each entry of a journal
ADVISORY_LOCK = {  # a server releases these locks when the connection ends for any reason
    "postgresql": "SELECT pg_advisory_lock(20240)",
    "mysql": "SELECT GET_LOCK('gpt2', -1)",
}
FAILURES = (StorageInternalError, SQLAlchemyError)  # raised by Optuna if a storage does not answer
BUSY_SECONDS = 60  # how long to wait for another process that writes to a SQLite file


def validate_storage(url: str | None) -> str | None:
    """Return why a storage cannot be opened, without its password; None if no problem is found.

    Nothing is written, and servers are not contacted.
    """
    if url is None or _server_kind(url) is not None:
        return None
    if (file := file_of(url)) is None:
        return (
            f"{without_password(url, url)!r} is none of sqlite:///FILE, journal:///FILE, "
            "postgresql://USER:PASSWORD@HOST/NAME and mysql://USER:PASSWORD@HOST/NAME"
        )
    try:
        problem = _problem_of_place(file) or (file.exists() and _problem_of_content(file, url.startswith(JOURNAL)))
    except OSError as error:
        problem = error.strerror
    return f"{url} cannot be opened: {problem}" if problem else None


def _problem_of_place(file: Path) -> str | None:
    """Return why a path cannot be a storage file.

    Raises:
        OSError: Its folder cannot be written to, or its name is too long.
    """
    if file.exists() and not file.is_file():
        return f"it is {'a folder' if file.is_dir() else 'no file'}"
    Path(f"{file}{APPEND_LOCK}").exists()  # raises an OSError if the name of the lock is too long
    parent = next(folder for folder in file.absolute().parents if folder.exists())
    with tempfile.TemporaryFile(dir=parent):
        return None


def _problem_of_content(file: Path, is_journal: bool) -> str | None:
    """Return why an existing file is not a storage: it is damaged or belongs to another program.

    Raises:
        OSError: It cannot be read or written.
    """
    with file.open("r+b") as opened:
        if is_journal:
            *lines, last = opened.read().split(b"\n")
            wrong = next((n for n, line in enumerate(lines, 1) if not _is_entry(line)), None)
            if not (last.startswith(ENTRY) or ENTRY.startswith(last)):  # a killed process leaves an incomplete entry
                wrong = wrong or len(lines) + 1
            return f"line {wrong} is no entry of Optuna's journal" if wrong else None
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as database:
            ((state,),) = database.execute("PRAGMA quick_check(1)")
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError:  # another process is writing, or was killed while writing
        return None
    except sqlite3.DatabaseError as error:
        return str(error)
    if state != "ok":
        return str(state)
    is_ours = not tables or tables & {"studies", "version_info"}  # another process may still be creating the others
    return None if is_ours else "it is the database of another program"


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line)["op_code"], int)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def file_of(url: str | None) -> Path | None:
    """Return the file of a SQLite or journal storage; None for any other storage."""
    for scheme in (SQLITE, JOURNAL):
        if url is not None and url.startswith(scheme) and "?" not in url:
            name = url.removeprefix(scheme)
            return Path(name) if name.strip() and name != ":memory:" else None
    return None


def _server_kind(url: str) -> str | None:
    match = re.match(r"(postgresql|mysql)(\+\w+)?://", url)
    return match and match[1]


class _JournalLock:
    """A lock for Optuna's journal. The kernel releases it when the process is killed.

    `acquire` removes an incomplete last line, which a killed process leaves: Optuna would append to that line.
    """

    def __init__(self, file: Path):
        self._file, self._lock = file, FileLock(f"{file}{APPEND_LOCK}")

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._file.open("r+b") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                log.warning("%s: the last line was incomplete and has been removed", self._file)
        return True

    def release(self) -> None:
        self._lock.release()


def open_storage(url: str | None) -> BaseStorage:
    """Open the storage of a URL, creating it if it does not exist. Without a URL, return a new storage in memory.

    Raises:
        UserError: It cannot be opened.
    """
    return InMemoryStorage() if url is None else _open(url)


@cache
def _open(url: str) -> BaseStorage:
    if problem := validate_storage(url):  # checked before a lock or a folder is created
        raise UserError(f"storage: {problem}")
    file = file_of(url)
    try:
        if file is not None:
            file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with exclusive(url), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if file is not None and url.startswith(JOURNAL):
                return JournalStorage(JournalFileBackend(str(file), _JournalLock(file)))  # type: ignore[arg-type]
            options = {"connect_args": {"timeout": BUSY_SECONDS}} if file is not None else {"pool_pre_ping": True}
            return RDBStorage(url, engine_kwargs=options)
    except Exception as error:  # noqa: BLE001  # raised by the database, its driver, SQLAlchemy or Optuna
        reason = without_password(one_line(error), url)
        raise UserError(f"storage: {without_password(url)} cannot be opened: {reason}") from None


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """Turn errors of an unreachable storage into a one-line ResourceError."""
    try:
        yield
    except FAILURES as error:
        reason = without_password(one_line(error.__cause__ or error), url)[:300]
        raise ResourceError(f"storage: {reason}; finished trials are saved, resume with the same command") from None


@contextmanager
def exclusive(url: str | None) -> Iterator[None]:
    """Lock a storage against changes by other processes. Other processes wait, so do not train a model inside."""
    if url is None:
        yield
    elif (file := file_of(url)) is not None:
        with FileLock(f"{file}.lock"):
            yield
    else:
        # A separate connection, which holds the lock until it is closed: Optuna's return to a pool after each query.
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(ADVISORY_LOCK[str(_server_kind(url))]))
            yield
