"""Atomic writes of files and folders, checks for writable places and free space, checksums, and locks of folders."""

import fcntl
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.errors import UserError, one_line
from gpt2.runtime.console import track

log = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".saving-"  # begins the name of an incomplete file or folder
LOCK = ".lock"
MANY_BYTES = 2**28  # reading this much takes a second on a slow disk
TIME_RESOLUTION = 2 * 10**9  # nanoseconds by which a file's times may be inexact


@contextmanager
def temporary_name(target: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Create a replacement of `target` under a unique temporary name, which is removed at the end of the block.

    The replacement is locked (`flock`) until then, so `remove_unfinished` detects that its process is alive. First,
    the replacements that dead processes left for the same target are deleted.

    Args:
        create: Creates a file, a folder or a link at a path.
    """
    name = os.fsdecode(os.fsencode(target.name)[:200])  # with prefix and suffix, a name may have 255 bytes
    remove_unfinished(target.parent, name)
    while True:
        path = target.with_name(f"{TEMPORARY_PREFIX}{name}-{secrets.token_hex(8)}")
        create(path)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it as unfinished before it was locked
            continue
        try:
            with suppress(OSError):  # a filesystem without locks, where `remove_unfinished` removes nothing
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                yield path
                return
        finally:
            remove(path)
            os.close(descriptor)


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders that killed processes left in a folder.

    Args:
        name: Only for targets whose names begin with it.
    """
    for path in folder.glob(f"{TEMPORARY_PREFIX}{glob.escape(name)}*"):
        with suppress(OSError):  # locked by the process that writes it, already deleted, or owned by another user
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` at the end of the block.

    If the block raises, `path` is untouched. The file is flushed to disk before it is renamed, and its folder after
    that, so after a crash or a power failure `path` is the old file or the complete new one. Several processes may
    write the same file at once: the last to finish wins.
    """
    try:
        with temporary_name(path, lambda new: new.touch(exist_ok=False)) as temporary:
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
    """Yield an empty folder, which is flushed to disk and renamed to `folder` at the end of the block.

    If the block raises, the new folder is removed. If several processes create the same folder, one succeeds.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_name(folder, Path.mkdir) as temporary:
        yield temporary
        rename_to_disk(temporary, folder)


def rename_to_disk(folder: Path, target: Path) -> None:
    """Flush a folder to disk, then rename it: after a crash, a folder of the new name is complete."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)
    folder.rename(target)
    fsync(target.parent)


@contextmanager
def writable_folder(
    folder: Path, key: str, file: Path | None = None, advice: str = "choose another place"
) -> Iterator[None]:
    """Check that a folder is writable, before the work whose results go there.

    The folder and its parents are created. Those that are still empty at the end of the block are removed.

    Args:
        key: The setting that names the folder, for the error message.
        file: Named in the error message instead of the folder.

    Raises:
        UserError: The folder is not writable.
    """
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: cannot write to {file or folder}: {reason(error)}; {advice}") from error
        yield
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def writable_file(path: Path, key: str) -> Iterator[None]:
    """Like `writable_folder`, for a file or a folder that the block creates."""
    with writable_folder(path.parent, key, path):
        if not path.name or os.path.isdir(path):  # noqa: PTH112  # `Path.is_dir` raises for a name that is too long
            raise UserError(f"{key}: {path} is a folder; name a file")
        try:
            with suppress(FileNotFoundError):
                path.lstat()
        except OSError as error:  # the name is too long
            raise UserError(f"{key}: cannot write {path}: {reason(error)}; choose another name") from error
        yield


def require_free_space(folder: Path, needed: int, task: str) -> None:
    """Check that a folder of the cache has enough free disk space for a task, and log the need if it is large.

    Raises:
        UserError: There is less free space.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    needs = f"{task} needs about {in_bytes(needed)} in {place}, where {in_bytes(free)} are free"
    if needed > free:
        raise UserError(f"data.cache_dir: {needs}; choose another place")
    if needed > MANY_BYTES:
        log.info("Data: %s", needs)


def in_bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def reason(error: Exception) -> str:
    """Say why a file or a folder could not be written, without its path."""
    if isinstance(error, FileExistsError):  # there is a file in place of the folder
        return "not a folder"
    return getattr(error, "strerror", None) or one_line(error)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk: until then a crash can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_change(folder: Path) -> Iterator[None]:
    """Lock a folder while its files are read, changed and written: only one process at a time runs this block.

    The lock is on the folder itself, so no lock file stays among the results.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s): make sure that no other process writes to it.", folder, error)
        yield
    finally:
        os.close(descriptor)


def sha256_of_next(file: BinaryIO, size: int) -> "hashlib._Hash":
    """The SHA-256 of the next `size` bytes of a file, or of the rest if that is shorter."""
    digest = hashlib.sha256()
    while block := file.read(min(size, 2**20)):
        digest.update(block)
        size -= len(block)
    return digest


def sha256_of_each(paths: Sequence[Path], task: str) -> Iterator[str]:
    """Yield the SHA-256 of each file. If they are large, progress is shown with `task` as its description.

    Raises:
        OSError: A file cannot be read; `filename` is its name.
    """
    size, done = sum(path.stat().st_size for path in paths), 0
    with track(task, unit="bytes") if size > MANY_BYTES else nullcontext(lambda *_: None) as advance:
        for path in paths:
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while block := file.read(2**20):
                        digest.update(block)
                        done += len(block)
                        advance(done, size)
            except OSError as error:
                error.filename = str(path)  # the error of a failed read names no file
                raise
            yield digest.hexdigest()


def remembered_sums(paths: Sequence[Path], memory: Path, task: str) -> list[str]:
    """Return the SHA-256 of each file. Files that are unchanged since an earlier call are not read again.

    SHA-256 takes 0.7 s per GB where the processor has instructions for it. A file counts as unchanged while its inode,
    size and times are the same. The checksum of a file that was just written is not stored: within the resolution of
    its times, the file could change again.

    Args:
        memory: The JSON file that holds the checksums of earlier calls.

    Raises:
        OSError: A file cannot be read; `filename` is its name.
    """
    known, now = read_dict(memory), time.time_ns()
    sums: dict[Path, str] = {}
    versions: dict[Path, list[int]] = {}
    for path in paths:
        status = path.stat()
        versions[path] = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        match known.get(str(path)):
            case [str(sha256), *version] if version == versions[path]:
                sums[path] = sha256
    new = [path for path in paths if path not in sums]
    sums |= zip(new, sha256_of_each(new, task), strict=True)
    is_settled = {path: max(version[2:]) < now - TIME_RESOLUTION for path, version in versions.items()}
    settled = {str(path): [sums[path], *version] for path, version in versions.items() if is_settled[path]}
    if settled != known:
        with suppress(OSError):  # a read-only folder
            memory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(memory) as file:
                file.write(json.dumps(settled).encode())
    return [sums[path] for path in paths]


def damaged_file(folder: Path, sums: dict[str, str]) -> str | None:
    """Say what is wrong with the files of a folder, given their checksums by name; None if they are intact.

    Checksums are stored in a file beside the folder, see `remembered_sums`.
    """
    paths = [folder / name for name in sums]
    try:
        actual = remembered_sums(paths, folder.with_suffix(".verified"), "Verifying the cache")
    except OSError as error:
        return f"{os.path.relpath(error.filename, folder)}: {error.strerror}"
    wrong = (name for name, sha256 in zip(sums, actual, strict=True) if sha256 != sums[name])
    return next((f"wrong checksum of {name}" for name in wrong), None)


def read_dict(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file; empty if the file is missing or damaged, or holds another type."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class RunLockedError(UserError):
    """Another process is writing to the run folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder. The lock file also names the process that holds it.

    This is a POSIX record lock (`lockf`), which belongs to one process: the kernel releases it when that process is
    killed, even if forked data workers outlive it. `filelock` uses `flock`. The workers would inherit that lock, and a
    killed run could not be resumed until they end.

    Raises:
        RunLockedError: Another process holds the lock; the message names it.
        UserError: The folder cannot be written to.
    """
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / LOCK}: cannot be written: {reason(error)}") from error
    with file:
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
    """Whether another process holds the lock file of a run folder; None if unknown.

    It is unknown if the file is missing, if its filesystem has no locks, or if the last holder ran on another machine,
    whose locks a network filesystem may not show. Do not call this function for a lock that this process holds: closing
    the file would release it.
    """
    try:
        with open(lock, errors="replace", opener=lambda path, _: os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False if f" on {socket.gethostname()} since " in file.read(1000) else None
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
