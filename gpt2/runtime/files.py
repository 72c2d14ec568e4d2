"""Files that are whole or not there, and locks on folders."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gpt2.errors import UserError

log = logging.getLogger(__name__)


TEMPORARY_PREFIX = ".saving-"  # what the name of a file begins with until it is whole


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name in the same folder as `path`; nothing is left under it afterwards, or else by `remove_unfinished`."""
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        yield temporary
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not know it
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once the disk holds all of it, or not at all."""
    with beside(path) as temporary:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)


def rename(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    flush(path.parent)


def flush(folder: Path) -> None:
    """Have the disk, not only the kernel, hold a folder's names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOCK = ".lock"


class RunLockedError(UserError):
    """A run folder is another process's."""


@contextmanager
def run_lock(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Let nobody else write to a run folder meanwhile, or do what else a lock of that name in it stands for.

    The lock is the kernel's and goes with the process that has it: one that was killed holds nothing, and neither do
    the data workers that outlive it for a moment.

    Raises:
        Held: Another process holds it; it is named.
    """
    import fcntl

    with (folder / name).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise RunLockedError(f"{folder} is being written by {file.read() or 'another process'}") from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): see to it that no second process writes there.", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def is_locked(lock: Path) -> bool | None:
    """Whether another process holds a lock; None where nobody can tell, for the filesystem has no locks.

    Never to be asked of a lock of one's own: that would give it up.
    """
    import fcntl

    try:
        with lock.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    return False
