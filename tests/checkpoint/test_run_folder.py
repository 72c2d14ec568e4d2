"""A run folder: which checkpoints are kept, which one is taken, and who may write."""

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.checkpoint.run_folder import BEST, LAST, step_name
from gpt2.errors import UserError
from gpt2.runtime.files import LOCK, run_lock


def save(folder: Path, step: int, is_best: bool = False, name: str | None = None, **progress) -> Path:
    """A checkpoint as a trainer writes it, of tensors that tell its step."""
    path = folder / (name or step_name(step))
    losses = {"val_loss": 2.0, "best_val_loss": 2.0 if is_best else 1.0}
    progress = {"step": step, "evaluated_at": step, **losses, **progress}
    tensors = {"model/weight": torch.full((4,), float(step)), "optimizer/weight": torch.zeros(4)}
    checkpoint.write_checkpoint(path, tensors, {"progress": progress})
    return path


def damage(path: Path, tensor: str = "model/weight") -> None:
    """Change a byte in place, so that its other names are damaged too. Both tensors are 16 bytes, in this order."""
    with path.open("r+b") as file:
        file.seek({"model/weight": -32, "optimizer/weight": -16}[tensor], os.SEEK_END)
        file.write(b"\x99")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # a disk's fault would be older than our first look


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Names


def test_steps_have_names_that_sort_as_they_do_and_tell_them():
    steps = [0, 1, 9, 10, 99_999_999]
    assert [run_folder.step_of(Path("some/folder") / step_name(step)) for step in [*steps, 10**8]] == [*steps, 10**8]
    assert sorted(map(step_name, steps)) == [step_name(step) for step in steps]


@pytest.mark.parametrize(
    "name",
    [
        *(
            LAST,
            BEST,
            "step_1.pth",
            "step_0000001.pth",
            "step_00000001.pth.bak",
            "step_00000001.pt",
            "step_0000000a.pth",
        ),
        *("my_step_00000001.pth", "step_-0000001.pth", ".saving-step_00000001.pth", "step_00000001.pth\n"),
    ],
)
def test_no_other_name_is_that_of_a_step(name):
    assert run_folder.step_of(Path(name)) is None


def test_checkpoints_are_in_the_order_of_their_steps_not_of_their_names_or_ages(tmp_path):
    for step in (5, 10**8, 99_999_999, 20):
        save(tmp_path, step)
    for name in (LAST, BEST, "step_7.pth", "notes.txt"):
        (tmp_path / name).touch()
    newest = [step_name(step) for step in (10**8, 99_999_999, 20, 5)]
    assert [path.name for path in run_folder.newest_first(tmp_path)] == [*newest, LAST, BEST]
    assert [path.name for path in run_folder.best_first(tmp_path)] == [BEST, *newest, LAST]
    (tmp_path / BEST).unlink()
    assert [path.name for path in run_folder.best_first(tmp_path)] == [*newest, LAST]


def test_a_second_name_is_the_same_file_and_stays_with_it(tmp_path):
    first = save(tmp_path, 1)
    run_folder.add_name(first, LAST)
    run_folder.add_name(first, LAST)  # the two names for one file, once more
    assert (tmp_path / LAST).samefile(first)
    second = save(tmp_path, 2)
    content = first.read_bytes()
    run_folder.add_name(second, LAST)
    save(tmp_path, 2, is_best=True)  # replaces the name, not the file
    assert first.read_bytes() == content
    assert checkpoint.verify(tmp_path / LAST)["progress"]["best_val_loss"] == 1.0
    assert names(tmp_path) == [LAST, step_name(1), step_name(2)]


def test_a_filesystem_without_links_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 1, name=LAST)
    path = save(tmp_path, 2)
    (tmp_path / f"{run_folder.TEMPORARY_PREFIX}{LAST}").write_text("of a process that was killed")
    run_folder.add_name(path, LAST)
    assert (tmp_path / LAST).read_bytes() == path.read_bytes()
    assert not (tmp_path / LAST).samefile(path)
    assert names(tmp_path) == [LAST, step_name(2)]


def test_what_a_killed_process_was_naming_is_not_written_over(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    os.link(old, tmp_path / f"{run_folder.TEMPORARY_PREFIX}{LAST}")
    run_folder.add_name(new, LAST)
    assert checkpoint.verify(old)["progress"]["step"] == 1
    assert (tmp_path / LAST).samefile(new)
    assert names(tmp_path) == [LAST, step_name(1), step_name(2)]


def test_a_name_that_cannot_be_given_leaves_the_old_one(tmp_path):
    old = save(tmp_path, 1, name=LAST).read_bytes()
    with pytest.raises(OSError, match="No such file"):
        run_folder.add_name(tmp_path / step_name(2), LAST)
    assert (tmp_path / LAST).read_bytes() == old
    assert names(tmp_path) == [LAST]


# What is removed


@pytest.mark.parametrize(
    ("keep", "step", "kept"),
    [(2, 40, [30, 40]), (1, 40, [40]), (9, 40, [10, 20, 30, 40]), (2, 25, [10, 20]), (1, 30, [30]), (3, 5, [])],
)
def test_the_newest_up_to_a_step_are_kept_and_later_ones_are_not(tmp_path, keep, step, kept):
    for number in (40, 10, 30, 20):
        save(tmp_path, number)
    run_folder.prune(tmp_path, keep, step)
    assert names(tmp_path) == [step_name(number) for number in kept]


def test_what_is_no_checkpoint_of_a_step_is_never_removed(tmp_path):
    os.link(save(tmp_path, 1), tmp_path / BEST)
    os.link(save(tmp_path, 2), tmp_path / LAST)
    foreign = ["step_1.pth", "step_00000001.pth.bak", "step_00000001", "mine.pth", "my_step_00000001.pth", ".lock"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    save(tmp_path, 3)
    run_folder.prune(tmp_path, 1, 3)
    assert names(tmp_path) == sorted([BEST, LAST, step_name(3), *foreign])
    assert checkpoint.verify(tmp_path / BEST)["progress"]["step"] == 1


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning_and_no_end(tmp_path, caplog):
    (tmp_path / step_name(2)).mkdir()  # which not even root can unlink
    for step in (1, 3, 4):
        save(tmp_path, step)
    run_folder.prune(tmp_path, 1, 4)
    assert names(tmp_path) == [step_name(2), step_name(4)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert step_name(2) in caplog.text


def test_only_what_a_killed_process_left_is_cleared_away(tmp_path):
    kept = [LAST, step_name(1), "saving-mine.pth", ".lock", "x.saving-y"]
    for name in (*kept, f"{run_folder.TEMPORARY_PREFIX}{LAST}", f"{run_folder.TEMPORARY_PREFIX}{step_name(2)}"):
        (tmp_path / name).touch()
    run_folder.remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted(kept)
    run_folder.remove_unfinished(tmp_path / "not there yet")


# Which one is taken


def test_the_newest_is_taken_without_a_word(tmp_path, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert run_folder.first_intact(run_folder.newest_first(tmp_path)) == newest
    assert run_folder.first_intact([]) is None
    assert not caplog.records


def test_damaged_ones_are_passed_over_each_with_a_warning(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    damage(tmp_path / step_name(4))
    (tmp_path / step_name(3)).write_bytes(b"")
    (tmp_path / step_name(5)).mkdir()
    assert run_folder.first_intact(run_folder.newest_first(tmp_path)) == tmp_path / step_name(2)
    told = [record.getMessage() for record in caplog.records]
    assert [step_name(n) in message for n, message in zip((5, 4, 3, 2), told, strict=True)] == [True] * 4
    assert "checksum of model/weight" in told[1]
    assert step_name(1) not in caplog.text


def test_if_all_are_damaged_each_is_named_and_none_is_taken(tmp_path, caplog):
    for step in (1, 2):
        damage(save(tmp_path, step))
    with pytest.raises(UserError) as refusal:
        run_folder.first_intact(run_folder.newest_first(tmp_path))
    assert [f"step_0000000{n}" in fault for n, fault in zip((2, 1), refusal.value.problems, strict=True)] == [
        True,
        True,
    ]
    assert "Using instead" not in caplog.text


def test_a_damaged_file_of_several_names_is_named_once(tmp_path):
    path = save(tmp_path, 1, is_best=True)
    run_folder.add_name(path, LAST)
    run_folder.add_name(path, BEST)
    damage(path)
    with pytest.raises(UserError) as refusal:
        run_folder.first_intact(run_folder.newest_first(tmp_path))
    assert len(refusal.value.problems) == 1


def test_damage_is_noticed_by_those_who_want_what_is_damaged(tmp_path):
    save(tmp_path / "run", 1)
    newest = save(tmp_path / "run", 2)
    damage(newest, "optimizer/weight")
    assert run_folder.find_checkpoint(str(tmp_path)) == newest  # to write text with
    assert run_folder.first_intact(run_folder.newest_first(newest.parent)).name == step_name(1)  # to resume from
    damage(newest)
    assert run_folder.find_checkpoint(str(tmp_path)).name == step_name(1)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path, caplog):
    save(tmp_path, 2)
    save(tmp_path, 3, name=step_name(9))
    assert run_folder.first_intact(run_folder.newest_first(tmp_path)).name == step_name(2)
    assert "step_00000009.pth is not that of step 9, but of step 3" in caplog.text


@pytest.mark.parametrize("record", [{}, {"progress": None}, {"progress": {}}])
def test_a_checkpoint_without_progress_is_refused_under_the_name_of_a_step(tmp_path, record):
    checkpoint.write_checkpoint(tmp_path / step_name(9), {}, record)
    save(tmp_path, 2)
    assert run_folder.first_intact(run_folder.newest_first(tmp_path)).name == step_name(2)


@pytest.mark.parametrize(
    "other",
    [
        {"is_best": False},  # evaluated, and worse
        {"is_best": True, "evaluated_at": 2},  # made after the best one, before the next evaluation
    ],
)
def test_a_best_checkpoint_that_was_replaced_by_another_is_refused(tmp_path, caplog, other):
    folder = tmp_path / "checkpoints"
    save(folder, 1, is_best=True, name=BEST)
    save(folder, 4)
    assert run_folder.find_checkpoint(str(tmp_path)).name == BEST
    save(folder, 3, name=BEST, **other)
    assert run_folder.find_checkpoint(str(tmp_path)).name == step_name(4)
    assert "is not the best checkpoint" in caplog.text


@pytest.mark.parametrize("wrong", [BEST, step_name(9)])
def test_a_checkpoint_that_has_a_wrong_name_too_is_taken_under_its_own(tmp_path, wrong):
    save(tmp_path / "checkpoints", 3)
    path = save(tmp_path / "checkpoints", 4)
    os.link(path, path.with_name(wrong))
    assert run_folder.find_checkpoint(str(tmp_path)) == path


def test_a_checkpoint_that_a_running_training_removes_meanwhile_is_passed_over(tmp_path):
    candidates = [save(tmp_path, 2), save(tmp_path, 1)]
    candidates[0].unlink()
    assert run_folder.first_intact(candidates) == candidates[1]


def test_a_damaged_best_gives_way_to_the_newest(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    damage(save(folder, 1, is_best=True, name=BEST))
    run_folder.add_name(save(folder, 4), LAST)
    assert run_folder.find_checkpoint(str(tmp_path)).name == step_name(4)
    assert BEST in caplog.text


def test_a_file_that_is_named_is_taken_as_it_is(tmp_path):
    path = save(tmp_path, 1)
    damage(path)
    assert run_folder.find_checkpoint(str(path)) == path


def test_nothing_intact_is_told_of_each_and_nothing_at_all_by_the_name_of_the_option(tmp_path):
    damage(save(tmp_path / "run" / "checkpoints", 1))
    with pytest.raises(UserError, match="is damaged"):
        run_folder.find_checkpoint(str(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(UserError, match=rf"^resume: .*{place}"):
            run_folder.find_checkpoint(str(tmp_path / place), "resume")


def test_the_latest_run_is_the_one_that_saved_last(tmp_path):
    for name, age in (("a/1", 20), ("b/0", 10), ("a/2", 30)):
        for step in (1, 2):
            path = save(tmp_path / name / "checkpoints", step)
            os.utime(path, (1e9 - age + step, 1e9 - age + step))
    assert run_folder.latest_run(tmp_path) == tmp_path / "b/0"


def test_a_run_that_was_killed_at_its_first_checkpoint_is_not_the_latest_run_with_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = save(Path("outputs/runs/a/1/checkpoints"), 1)
    os.utime(good, (1e9, 1e9))
    unfinished = Path("outputs/runs/a/2/checkpoints") / f"{run_folder.TEMPORARY_PREFIX}{step_name(1)}"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"half of it")
    assert run_folder.find_checkpoint(None) == good


# Who may write


@contextmanager
def holder(folder: Path, then: str = "time.sleep(99)") -> Iterator[subprocess.Popen]:
    """Another process that holds a folder; it has said so, in a line with what `then` printed."""
    code = (
        "import os, time\nfrom pathlib import Path\nfrom gpt2.runtime import files\n"
        f"with files.run_lock(Path({str(folder)!r})):\n    print('held', flush=True)\n    {then}"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_and_told_which_is_the_first_until_that_is_killed(tmp_path):
    with holder(tmp_path) as process:
        for _ in range(2):  # a refusal takes nothing away
            with (
                pytest.raises(UserError, match=f"{tmp_path} is being written by process {process.pid} on "),
                run_lock(tmp_path),
            ):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run_lock(tmp_path), pytest.raises(AssertionError), holder(tmp_path):
            pass  # now it is ours
        with run_lock(tmp_path):
            assert (tmp_path / LOCK).read_text().count("process") == 1  # it names one process only


def test_a_child_that_outlives_the_holder_does_not_block(tmp_path):
    # As a data worker does: it was forked while the folder was held, and has all that was open then.
    then = "pid = os.fork(); print(pid, flush=True) if pid else None; time.sleep(99)"
    with holder(tmp_path, then) as process:
        child = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            os.kill(child, 0)  # it lives
            with run_lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_child_that_ends_leaves_the_folder_held(tmp_path):
    then = "pid = os.fork() or os._exit(0); os.waitpid(pid, 0); print('ended', flush=True); time.sleep(99)"
    with holder(tmp_path, then) as process:
        assert process.stdout.readline() == "ended\n"
        with pytest.raises(UserError, match=str(process.pid)), run_lock(tmp_path):
            pass


def test_a_folder_is_free_after_a_holder_that_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with holder(tmp_path):
        pass


def test_a_filesystem_without_locks_is_a_warning_and_no_end(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_lock(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
