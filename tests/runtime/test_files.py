"""Atomic writes, and the lock of a run folder, which the kernel releases with its process."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.runtime.files import LOCK, TEMPORARY_PREFIX, atomic_folder, atomic_write, remove_unfinished, run_lock


def test_atomic_write_replaces_the_file_or_leaves_it(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_preserves_a_file_linked_by_a_killed_process(tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    os.link(tmp_path / "other", tmp_path / f"{TEMPORARY_PREFIX}file")
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "other").read_bytes() == b"other"
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["x" * 255, "\N{GRINNING FACE}" * 63, "[a]*?", "-rf", ".hidden", "a\nb"])
def test_any_file_name_can_be_written(tmp_path, name):
    (tmp_path / f"{TEMPORARY_PREFIX}{name[:40]}").touch()
    for content in (b"old", b"new"):
        with atomic_write(tmp_path / name) as file:
            file.write(content)
    with atomic_folder(tmp_path / "folders" / name):
        pass
    assert (tmp_path / name).read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "folders").iterdir()] == [name]


def test_atomic_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "parent" / "folder"
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        (folder / "part").touch()
        raise ZeroDivisionError
    assert list(target.parent.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "file").touch()
        assert not target.exists()
    assert list(target.parent.iterdir()) == [target]
    assert [path.name for path in target.iterdir()] == ["file"]


def run_code(code: str) -> subprocess.Popen:
    imports = "import os, time\nfrom pathlib import Path\nfrom gpt2.runtime import files\n"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", imports + code], **streams)


WRITERS = {
    "a file": "files.atomic_write(Path({target!r}))",
    "a folder": "files.atomic_folder(Path({target!r}))",
    "a link": "files.temporary_name(Path({target!r}), lambda new: os.link({other!r}, new))",
}


@pytest.mark.parametrize("what", WRITERS)
def test_unfinished_writes_are_removed_once_their_process_is_dead(tmp_path, what):
    target, other = tmp_path / "target", tmp_path / "other"
    other.write_bytes(b"other")
    writer = WRITERS[what].format(target=str(target), other=str(other))
    process = run_code(f"with {writer} as new:\n    print('began', flush=True)\n    time.sleep(99)")
    try:
        assert process.stdout.readline() == "began\n"
        (unfinished,) = tmp_path.glob(f"{TEMPORARY_PREFIX}*")
        remove_unfinished(tmp_path)
        with atomic_write(target) as file:
            file.write(b"ours")
        assert unfinished.exists()
    finally:
        process.kill()
        process.communicate()
    with atomic_write(tmp_path / "other") as file:
        file.write(b"other")
    assert unfinished.exists()  # each target has its own temporary files, which may be locked in another way
    with atomic_write(target) as file:
        file.write(b"again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]
    assert (target.read_bytes(), other.read_bytes()) == (b"again", b"other")


CONCURRENT = """
print("ready", flush=True)
input()
folder = Path({folder!r})
for number in range(20):
    with files.exclusive_change(folder):
        count = int((folder / "count").read_bytes())
        with files.atomic_write(folder / "count") as file:
            file.write(str(count + 1).encode())
    with files.atomic_write(folder / "same") as file:
        for part in range(100):
            file.write(b"%05d" % os.getpid())
    try:
        with files.atomic_folder(folder / f"folder {{number}}") as new:
            (new / "owner").write_text(str(os.getpid()))
        print(number)
    except OSError:
        pass
    files.remove_unfinished(folder)
"""


def test_concurrent_processes_lose_nothing(tmp_path):
    (tmp_path / "count").write_bytes(b"0")
    processes = [run_code(CONCURRENT.format(folder=str(tmp_path))) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    made = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert (tmp_path / "count").read_bytes() == b"80"
    content = (tmp_path / "same").read_bytes()
    assert content == content[:5] * 100
    assert sorted(int(number) for numbers in made for number in numbers) == list(range(20))
    names = {"count", "same", *(f"folder {number}" for number in range(20))}
    assert {path.name for path in tmp_path.iterdir()} == names


@contextmanager
def holder(folder: Path, then: str = "time.sleep(99)") -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of a folder, and then runs the statement `then`."""
    process = run_code(f"with files.run_lock(Path({str(folder)!r})):\n    print('held', flush=True)\n    {then}")
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_lock_names_its_holder_until_that_is_killed(tmp_path):
    with holder(tmp_path) as process:
        for _ in range(2):  # a failed attempt does not release the lock
            with (
                pytest.raises(UserError, match=f"{tmp_path} is being written by process {process.pid} on "),
                run_lock(tmp_path),
            ):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run_lock(tmp_path), pytest.raises(AssertionError), holder(tmp_path):
            pass  # now this process holds the lock
        with run_lock(tmp_path):
            assert (tmp_path / LOCK).read_text().count("process") == 1  # the previous holder is no longer named


def test_lock_is_released_when_a_child_outlives_its_holder(tmp_path):
    # Like a data worker, the child is forked while the lock is held and inherits the open file.
    then = "pid = os.fork(); print(pid, flush=True) if pid else None; time.sleep(99)"
    with holder(tmp_path, then) as process:
        child = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            os.kill(child, 0)  # the child is alive
            with run_lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_lock_remains_when_a_child_of_its_holder_ends(tmp_path):
    then = "pid = os.fork() or os._exit(0); os.waitpid(pid, 0); print('ended', flush=True); time.sleep(99)"
    with holder(tmp_path, then) as process:
        assert process.stdout.readline() == "ended\n"
        with pytest.raises(UserError, match=str(process.pid)), run_lock(tmp_path):
            pass


def test_lock_is_released_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with holder(tmp_path):
        pass


def test_filesystem_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_lock(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
