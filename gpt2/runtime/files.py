"""Atomic writes of files and folders, and locks: who changes a file, who uses a run folder."""

import fcntl
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from gpt2.errors import UserError

log = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".saving-"  # of the name under which something is written until it is complete
LOCK = ".lock"


@contextmanager
def temporary_name(folder: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Create something under a name in `folder` that no other process uses, and remove what still has that name.

    It is locked (`flock`) until the block ends: `remove_unfinished`, which is called first, recognizes by the lock
    what belongs to a living process.

    Args:
        create: Makes a file, a folder or a link of a path.
    """
    remove_unfinished(folder)
    while True:
        path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        create(path)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for unfinished before it was locked
            continue
        try:
            with suppress(OSError):  # a filesystem without locks, where nothing is taken for unfinished
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                yield path
                return
        finally:
            remove(path)
            os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left of unfinished writes in a folder."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):  # it is locked by the process that writes it, gone, or of another user
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` at the end of the block.

    If the block raises, `path` is untouched. The file is flushed to disk before it is renamed, and its folder after
    that, so after a crash or a power failure `path` is the old file or the complete new one. Several processes may
    write the same file at once: the last one to end wins.
    """
    try:
        with temporary_name(path.parent, lambda new: new.touch(exist_ok=False)) as temporary:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync(path.parent)
    except OSError as error:
        if error.filename is None or TEMPORARY_PREFIX in str(error.filename):  # a failed write names no file
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which is flushed to disk and gets the name `folder` at the end of the block.

    If the block raises, the new folder is removed. Of several processes that make the same folder, one succeeds.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_name(folder.parent, Path.mkdir) as temporary:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        temporary.rename(folder)
        fsync(folder.parent)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk: until then a crash can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_change(path: Path) -> Iterator[None]:
    """Read, change and write a file inside this block: other processes that want to change it wait.

    The lock file, beside it, is left there: it could not be removed without a moment in which two processes hold it.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


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
