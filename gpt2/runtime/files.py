"""Atomic writes of files and folders, and locks that say who uses a run folder."""

import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gpt2.errors import UserError

log = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".saving-"  # of the name under which a file is written until it is complete
LOCK = ".lock"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` at the end of the block.

    If the block raises, `path` is untouched. The file is flushed to disk before it is renamed, and its folder after
    that, so after a crash or a power failure `path` is the old file or the complete new one.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    temporary.unlink(missing_ok=True)  # a killed process may have left it, as a second name of another file
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which gets the name `folder` at the end of the block.

    If the block raises, the new folder is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(TEMPORARY_PREFIX + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to disk: until then a crash can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunLockedError(UserError):
    """Another process is writing to the run folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock file of a run folder, which also says which process holds it.

    This is a POSIX record lock (`lockf`), which belongs to one process: the kernel releases it when that process is
    killed, even if forked data workers outlive it. `filelock` uses `flock`, which those workers would inherit and
    keep, so that a killed run could not be resumed until they end.

    Raises:
        RunLockedError: Another process holds the lock; the message names it.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise RunLockedError(f"{folder} is being written by {file.read() or 'another process'}") from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): make sure that no other process writes to it.", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def is_locked(lock: Path) -> bool | None:
    """Whether another process holds a lock file; None if the filesystem has no locks.

    Do not call it for a lock that this process holds: closing the file would release it.
    """
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
