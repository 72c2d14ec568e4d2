"""The checkpoints of a run folder: which one is used and which ones are deleted."""

import errno
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.checkpoint.run_folder import BEST, LAST, step_name
from gpt2.errors import UserError
from gpt2.runtime.files import TEMPORARY_PREFIX, remove_unfinished


def save(folder: Path, step: int, is_best: bool = False, name: str | None = None, **progress) -> Path:
    """A checkpoint like those of Trainer, whose weights equal its step."""
    path = folder / (name or step_name(step))
    losses = {"val_loss": 2.0, "best_val_loss": 2.0 if is_best else 1.0}
    progress = {"step": step, "evaluated_at": step, **losses, **progress}
    tensors = {"model/weight": torch.full((4,), float(step)), "optimizer/weight": torch.zeros(4)}
    checkpoint.write_checkpoint(path, tensors, {"progress": progress})
    return path


def damage(path: Path, tensor: str = "model/weight") -> None:
    """Change a byte in place, so that hard links are damaged too. Both tensors are 16 bytes, in this order."""
    with path.open("r+b") as file:
        file.seek({"model/weight": -32, "optimizer/weight": -16}[tensor], os.SEEK_END)
        file.write(b"\x99")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # invalidates the cache of `verify`


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Names


def test_step_names_sort_and_parse():
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
def test_other_names_have_no_step(name):
    assert run_folder.step_of(Path(name)) is None


def test_checkpoints_are_ordered_by_step(tmp_path):
    for step in (5, 10**8, 99_999_999, 20):
        save(tmp_path, step)
    for name in (LAST, BEST, "step_7.pth", "notes.txt"):
        (tmp_path / name).touch()
    newest = [step_name(step) for step in (10**8, 99_999_999, 20, 5)]
    assert [path.name for path in run_folder.newest_first(tmp_path)] == [*newest, LAST, BEST]
    assert [path.name for path in run_folder.best_first(tmp_path)] == [BEST, *newest, LAST]
    (tmp_path / BEST).unlink()
    assert [path.name for path in run_folder.best_first(tmp_path)] == [*newest, LAST]


def test_add_name_links_the_same_file(tmp_path):
    first = save(tmp_path, 1)
    run_folder.add_name(first, LAST)
    run_folder.add_name(first, LAST)  # both names are the same file already
    assert (tmp_path / LAST).samefile(first)
    assert names(tmp_path) == [LAST, step_name(1)]
    second = save(tmp_path, 2)
    content = first.read_bytes()
    run_folder.add_name(second, LAST)
    save(tmp_path, 2, is_best=True)  # replaces the name, not the file
    assert first.read_bytes() == content
    assert checkpoint.verify(tmp_path / LAST)["progress"]["best_val_loss"] == 1.0
    assert names(tmp_path) == [LAST, step_name(1), step_name(2)]


def test_add_name_copies_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 1, name=LAST)
    path = save(tmp_path, 2)
    (tmp_path / f"{TEMPORARY_PREFIX}{LAST}").write_text("of a process that was killed")
    run_folder.add_name(path, LAST)
    assert (tmp_path / LAST).read_bytes() == path.read_bytes()
    assert not (tmp_path / LAST).samefile(path)
    assert names(tmp_path) == [LAST, step_name(2)]


def test_add_name_preserves_a_file_linked_by_a_killed_process(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    os.link(old, tmp_path / f"{TEMPORARY_PREFIX}{LAST}")
    run_folder.add_name(new, LAST)
    assert checkpoint.verify(old)["progress"]["step"] == 1
    assert (tmp_path / LAST).samefile(new)
    assert names(tmp_path) == [LAST, step_name(1), step_name(2)]


def test_failed_add_name_keeps_the_old_file(tmp_path):
    old = save(tmp_path, 1, name=LAST).read_bytes()
    with pytest.raises(OSError, match="No such file"):
        run_folder.add_name(tmp_path / step_name(2), LAST)
    assert (tmp_path / LAST).read_bytes() == old
    assert names(tmp_path) == [LAST]


# Deleting


@pytest.mark.parametrize(
    ("keep", "step", "remaining"),
    [(2, 40, [30, 40]), (1, 40, [40]), (9, 40, [10, 20, 30, 40]), (2, 25, [10, 20]), (1, 30, [30]), (3, 5, [])],
)
def test_prune_keeps_the_newest_up_to_a_step(tmp_path, keep, step, remaining):
    for number in (40, 10, 30, 20):
        save(tmp_path, number)
    run_folder.prune(tmp_path, keep, step)
    assert names(tmp_path) == [step_name(number) for number in remaining]


def test_prune_deletes_step_checkpoints_only(tmp_path):
    os.link(save(tmp_path, 1), tmp_path / BEST)
    os.link(save(tmp_path, 2), tmp_path / LAST)
    foreign = ["step_1.pth", "step_00000001.pth.bak", "step_00000001", "mine.pth", "my_step_00000001.pth", ".lock"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    save(tmp_path, 3)
    run_folder.prune(tmp_path, 1, 3)
    assert names(tmp_path) == sorted([BEST, LAST, step_name(3), *foreign])
    assert checkpoint.verify(tmp_path / BEST)["progress"]["step"] == 1


def test_failed_prune_is_a_warning(tmp_path, caplog):
    (tmp_path / step_name(2)).mkdir()  # a folder: not even root can unlink it
    for step in (1, 3, 4):
        save(tmp_path, step)
    run_folder.prune(tmp_path, 1, 4)
    assert names(tmp_path) == [step_name(2), step_name(4)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert step_name(2) in caplog.text


def test_remove_unfinished_deletes_temporary_files_only(tmp_path):
    other = [LAST, step_name(1), "saving-mine.pth", ".lock", "x.saving-y"]
    for name in (*other, f"{TEMPORARY_PREFIX}{LAST}", f"{TEMPORARY_PREFIX}{step_name(2)}"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted(other)
    remove_unfinished(tmp_path / "not there yet")


# Choosing


def test_newest_intact_checkpoint_is_used_without_a_warning(tmp_path, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert run_folder.first_intact(run_folder.newest_first(tmp_path)) == newest
    assert run_folder.first_intact([]) is None
    assert not caplog.records


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    damage(tmp_path / step_name(4))
    (tmp_path / step_name(3)).write_bytes(b"")
    (tmp_path / step_name(5)).mkdir()
    assert run_folder.first_intact(run_folder.newest_first(tmp_path)) == tmp_path / step_name(2)
    messages = [record.getMessage() for record in caplog.records]
    assert [step_name(n) in message for n, message in zip((5, 4, 3, 2), messages, strict=True)] == [True] * 4
    assert "checksum of model/weight" in messages[1]
    assert step_name(1) not in caplog.text


def test_checkpoint_of_a_newer_version_is_not_skipped(tmp_path):
    """Resuming from an older checkpoint would delete the newer one."""
    save(tmp_path, 1)
    checkpoint.write_checkpoint(tmp_path / step_name(2), {}, {"format": 99})
    with pytest.raises(UserError, match=f"{step_name(2)} was written by a newer version"):
        run_folder.first_intact(run_folder.newest_first(tmp_path))


def test_all_damaged_is_a_user_error_that_names_each(tmp_path, caplog):
    for step in (1, 2):
        damage(save(tmp_path, step))
    with pytest.raises(UserError) as refusal:
        run_folder.first_intact(run_folder.newest_first(tmp_path))
    assert [f"step_0000000{n}" in fault for n, fault in zip((2, 1), refusal.value.problems, strict=True)] == [
        True,
        True,
    ]
    assert "Using instead" not in caplog.text


def test_damaged_file_with_several_names_is_reported_once(tmp_path):
    path = save(tmp_path, 1, is_best=True)
    run_folder.add_name(path, LAST)
    run_folder.add_name(path, BEST)
    damage(path)
    with pytest.raises(UserError) as refusal:
        run_folder.first_intact(run_folder.newest_first(tmp_path))
    assert len(refusal.value.problems) == 1


def test_damaged_optimizer_state_matters_for_resuming_only(tmp_path):
    save(tmp_path / "run", 1)
    newest = save(tmp_path / "run", 2)
    damage(newest, "optimizer/weight")
    assert run_folder.find_checkpoint(str(tmp_path)) == newest  # for generation
    assert run_folder.first_intact(run_folder.newest_first(newest.parent)).name == step_name(1)  # for resuming
    damage(newest)
    assert run_folder.find_checkpoint(str(tmp_path)).name == step_name(1)


def test_checkpoint_under_the_name_of_another_step_is_skipped(tmp_path, caplog):
    save(tmp_path, 2)
    save(tmp_path, 3, name=step_name(9))
    assert run_folder.first_intact(run_folder.newest_first(tmp_path)).name == step_name(2)
    assert "step_00000009.pth is not of step 9, but of step 3" in caplog.text


@pytest.mark.parametrize("record", [{}, {"progress": None}, {"progress": {}}])
def test_step_checkpoint_without_progress_is_skipped(tmp_path, record):
    checkpoint.write_checkpoint(tmp_path / step_name(9), {}, record)
    save(tmp_path, 2)
    assert run_folder.first_intact(run_folder.newest_first(tmp_path)).name == step_name(2)


@pytest.mark.parametrize(
    "other",
    [
        {"is_best": False},  # evaluated, but worse
        {"is_best": True, "evaluated_at": 2},  # saved after the best one, before the next evaluation
    ],
)
def test_best_checkpoint_replaced_by_another_is_skipped(tmp_path, caplog, other):
    folder = tmp_path / "checkpoints"
    save(folder, 1, is_best=True, name=BEST)
    save(folder, 4)
    assert run_folder.find_checkpoint(str(tmp_path)).name == BEST
    save(folder, 3, name=BEST, **other)
    assert run_folder.find_checkpoint(str(tmp_path)).name == step_name(4)
    assert "is not the best checkpoint" in caplog.text


@pytest.mark.parametrize("wrong", [BEST, step_name(9)])
def test_checkpoint_with_an_additional_wrong_name_is_used(tmp_path, wrong):
    save(tmp_path / "checkpoints", 3)
    path = save(tmp_path / "checkpoints", 4)
    os.link(path, path.with_name(wrong))
    assert run_folder.find_checkpoint(str(tmp_path)) == path


def test_checkpoint_deleted_during_the_search_is_skipped(tmp_path):
    candidates = [save(tmp_path, 2), save(tmp_path, 1)]
    candidates[0].unlink()
    assert run_folder.first_intact(candidates) == candidates[1]


def test_newest_checkpoint_replaces_a_damaged_best(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    damage(save(folder, 1, is_best=True, name=BEST))
    run_folder.add_name(save(folder, 4), LAST)
    assert run_folder.find_checkpoint(str(tmp_path)).name == step_name(4)
    assert BEST in caplog.text


def test_named_file_is_returned_without_verification(tmp_path):
    path = save(tmp_path, 1)
    damage(path)
    assert run_folder.find_checkpoint(str(path)) == path


def test_errors_name_the_damage_or_the_option(tmp_path):
    damage(save(tmp_path / "run" / "checkpoints", 1))
    with pytest.raises(UserError, match="is damaged"):
        run_folder.find_checkpoint(str(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(UserError, match=rf"^resume: .*{place}"):
            run_folder.find_checkpoint(str(tmp_path / place), "resume")


def test_latest_run_saved_last(tmp_path, caplog):
    for name, age in (("a/1", 20), ("b/0", 10), ("a/2", 30)):
        for step in (1, 2):
            path = save(tmp_path / name / "checkpoints", step)
            os.utime(path, (1e9 - age + step, 1e9 - age + step))
    with caplog.at_level(logging.INFO, "gpt2"):
        assert run_folder.latest_run(tmp_path) == run_folder.latest_run(tmp_path) == tmp_path / "b/0"
        assert not caplog.messages
        for _ in range(2):
            run_folder.name_if_latest(tmp_path / "a/1")
            run_folder.name_if_latest(tmp_path / "b/0")
    (message,) = caplog.messages
    assert re.fullmatch(rf"latest run: {tmp_path / 'b/0'}, [\d,]+ days ago", message)


def test_unfinished_first_checkpoint_does_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = save(Path("outputs/runs/a/1/checkpoints"), 1)
    os.utime(good, (1e9, 1e9))
    unfinished = Path("outputs/runs/a/2/checkpoints") / f"{TEMPORARY_PREFIX}{step_name(1)}"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"half of it")
    assert run_folder.find_checkpoint(None) == good


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-1, "0 seconds ago"), (0.9, "0 seconds ago"), (1, "1 second ago"), (59.9, "59 seconds ago")),
        *((60, "1 minute ago"), (7199, "1 hour ago"), (86400, "1 day ago"), (1e6, "11 days ago")),
    ],
)
def test_ago(seconds, text):
    assert run_folder.ago(seconds) == text


def test_scripts_name_the_latest_run_before_they_use_it(trained, workspace):
    shutil.copytree(trained.runs()[0], workspace.folder / "outputs" / "runs" / "gpt2" / "a")
    line, short = f"latest run: {Path('outputs/runs/gpt2/a')}, ", "inference.max_new_tokens=1"
    for named in ([], ["checkpoint=latest"]):
        assert workspace.run("generate.py", "prompt=a", short, *named).stderr.startswith(line)
    quiet = workspace.run("generate.py", "prompt=a", short, "quiet=true")
    assert (quiet.stderr, quiet.stdout[:1]) == ("", "a")
    resumed = workspace.run("train.py", "resume=latest", "wandb=off", "data.files=[corpus.txt]")
    assert resumed.stdout.startswith(line)
    assert resumed.stdout.count("latest run: ") == 1
