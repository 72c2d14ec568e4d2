"""The storage of a study: shared by several processes, changed by one at a time, its password never logged."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

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
ADVISORY_LOCK = {  # locks of the server, released when the connection ends for any reason
    "postgresql": ("SELECT pg_advisory_lock(20240)", "SELECT pg_advisory_unlock(20240)"),
    "mysql": ("SELECT GET_LOCK('gpt2', -1)", "SELECT RELEASE_LOCK('gpt2')"),
}
FAILURES = (StorageInternalError, SQLAlchemyError)  # of a server, or of the connection
BUSY_SECONDS = 60  # how long a process waits for another one to write to a SQLite file


def validate_storage(url: str | None) -> str | None:
    """The problem of a storage URL that is visible without opening it, without its password; None if there is none."""
    if url is None or file_of(url) is not None or _server_kind(url) is not None:
        return None
    return (
        f"{without_password(url)!r} is none of sqlite:///FILE, journal:///FILE, postgresql://USER:PASSWORD@HOST/NAME "
        f"and mysql://USER:PASSWORD@HOST/NAME"
    )


def file_of(url: str | None) -> Path | None:
    """The file of a storage on this machine; None for a server and for memory."""
    for scheme in (SQLITE, JOURNAL):
        if url is not None and url.startswith(scheme) and len(url) > len(scheme) and "?" not in url:
            return Path(url.removeprefix(scheme))
    return None


def _server_kind(url: str) -> str | None:
    match = re.match(r"(postgresql|mysql)(\+\w+)?://", url)
    return match and match[1]


class _JournalLock:
    """A lock for Optuna's journal that the kernel releases when its process is killed.

    It also removes an incomplete last line, which a killed process leaves: Optuna would append to that line.
    """

    def __init__(self, file: Path):
        self._file, self._lock = file, FileLock(f"{file}.append-lock")

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
    """The storage of a URL, created if it does not exist; for None, a new one in memory.

    Raises:
        UserError: It cannot be opened.
    """
    return InMemoryStorage() if url is None else _open(url)


@cache
def _open(url: str) -> BaseStorage:
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
    except Exception as error:  # noqa: BLE001  # of the database, its driver, SQLAlchemy or Optuna
        reason = without_password(one_line(error), url)
        raise UserError(f"storage: {without_password(url)} cannot be opened: {reason}") from None


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """Turn an unreachable storage into a one-line error; the study can be resumed.

    Raises:
        ResourceError: The storage is unreachable.
    """
    try:
        yield
    except FAILURES as error:
        reason = without_password(one_line(error.__cause__ or error), url)[:300]
        raise ResourceError(f"storage: {reason}; finished trials are saved, resume with the same command") from None


@contextmanager
def exclusive(url: str | None) -> Iterator[None]:
    """Lock a study against changes by other processes. Do not train a model inside."""
    file, kind = file_of(url), _server_kind(url or "")
    if file is not None:
        with FileLock(f"{file}.lock"):
            yield
    elif kind is not None and url is not None:
        lock, unlock = map(sqlalchemy.text, ADVISORY_LOCK[kind])
        with _engine(url).connect() as connection:
            connection.execute(lock)
            try:
                yield
            finally:
                connection.execute(unlock)
    else:
        yield


@cache
def _engine(url: str) -> Any:
    """An engine for the lock alone: Optuna returns its connections to a pool in between."""
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT")
