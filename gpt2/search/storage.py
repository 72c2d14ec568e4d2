"""Where a study is kept: opened by many processes at once, changed by one at a time, its password told to nobody."""

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

from gpt2.errors import ResourceError, UserError, without_password

log = logging.getLogger(__name__)

SQLITE, JOURNAL = "sqlite:///", "journal:///"
ADVISORY_LOCK = {  # a server's own lock, given back when the connection that took it ends, however it ends
    "postgresql": ("SELECT pg_advisory_lock(20240)", "SELECT pg_advisory_unlock(20240)"),
    "mysql": ("SELECT GET_LOCK('gpt2', -1)", "SELECT RELEASE_LOCK('gpt2')"),
}
FAILURES = (StorageInternalError, SQLAlchemyError)  # of a server, or of the way to it
PATIENCE = 60  # seconds that a process waits for another one's write to a SQLite file


def validate_storage(url: str | None) -> str | None:
    """What is wrong with the URL of a storage, as far as one sees without opening it; no password is repeated."""
    if url is None or file_of(url) is not None or _server_kind(url) is not None:
        return None
    return (
        f"{without_password(url)!r} is none of sqlite:///FILE, journal:///FILE, postgresql://USER:PASSWORD@HOST/NAME "
        f"and mysql://USER:PASSWORD@HOST/NAME"
    )


def file_of(url: str | None) -> Path | None:
    """The file that a storage on this machine is kept in; None for a server."""
    for scheme in (SQLITE, JOURNAL):
        if url is not None and url.startswith(scheme) and len(url) > len(scheme) and "?" not in url:
            return Path(url.removeprefix(scheme))
    return None


def _server_kind(url: str) -> str | None:
    match = re.match(r"(postgresql|mysql)(\+\w+)?://", url)
    return match and match[1]


class _FileLockOfJournal:
    """The lock of Optuna's journal, as the kernel keeps it: a process that is killed leaves none behind.

    Who takes it finds whole lines. Behind one that a crash has cut short, the next would stand on the same line.
    """

    def __init__(self, file: Path):
        self._file, self._lock = file, FileLock(f"{file}.append-lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._file.open("r+b") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                log.warning("%s: a last line that was cut short is taken out", self._file)
        return True

    def release(self) -> None:
        self._lock.release()


def open_storage(url: str | None) -> BaseStorage:
    """The storage at a URL, made if it is not there; a new one in memory if None.

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
                return JournalStorage(JournalFileBackend(str(file), _FileLockOfJournal(file)))  # type: ignore[arg-type]
            options = {"connect_args": {"timeout": PATIENCE}} if file is not None else {"pool_pre_ping": True}
            return RDBStorage(url, engine_kwargs=options)
    except Exception as error:  # noqa: BLE001  # the database's, its driver's, SQLAlchemy's or Optuna's
        told = without_password(" ".join(str(error).split()), url)
        raise UserError(f"storage: {without_password(url)} cannot be opened: {told}") from None


@contextmanager
def failures_in_a_line(url: str | None) -> Iterator[None]:
    """Let a storage that is out of reach end a study as a full disk would: nothing is lost.

    Raises:
        MachineError: It is.
    """
    try:
        yield
    except FAILURES as error:
        told = without_password(" ".join(str(error.__cause__ or error).split()), url)
        raise ResourceError(f"storage: {told[:300]}; what is done is kept, the same command goes on") from None


@contextmanager
def exclusive(url: str | None) -> Iterator[None]:
    """Let no other process that is here too change a study meanwhile. Never hold it while a model is trained."""
    file, kind = file_of(url), _server_kind(url or "")
    if file is not None:
        with FileLock(f"{file}.lock"):
            yield
    elif kind is not None and url is not None:
        take, give_back = map(sqlalchemy.text, ADVISORY_LOCK[kind])
        engine = _engine(url)
        with engine.connect() as connection:
            connection.execute(take)
            try:
                yield
            finally:
                connection.execute(give_back)
    else:
        yield


@cache
def _engine(url: str) -> Any:
    """A connection of its own for the lock: Optuna's go back to its pool in between."""
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT")
