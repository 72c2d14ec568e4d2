"""Checkpoints on disk: whole or absent, without pickle, and found by what a user types."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2 import checkpoint, run_folder
from gpt2.config import UserError

TENSORS = {"model/a": torch.arange(6.0).reshape(2, 3), "rng/cpu": torch.arange(5, dtype=torch.uint8)}
RECORD = {"model": {"d_model": 3}, "tokenizer": "ünï ☃", "progress": {"best": None, "seconds": 0.1 + 0.2}}


def test_what_is_written_is_read(tmp_path):
    checkpoint.write(tmp_path / "new" / "last.pth", TENSORS, RECORD)
    read = checkpoint.read_tensors(tmp_path / "new" / "last.pth")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert checkpoint.read_tensors(tmp_path / "new" / "last.pth", "model/").keys() == {"a"}
    record = checkpoint.read_record(tmp_path / "new" / "last.pth")
    assert {key: record[key] for key in RECORD} == RECORD
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "last.pth"]


def test_the_file_is_safetensors_with_json_and_nothing_else(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.write(path, TENSORS, RECORD)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert len(content) == 8 + length + sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert json.loads(header["__metadata__"]["gpt2"])["tokenizer"] == RECORD["tokenizer"]


def test_the_record_is_read_without_importing_torch(tmp_path):
    checkpoint.write(tmp_path / "last.pth", TENSORS, RECORD)
    code = (
        "import sys; from pathlib import Path; from gpt2 import checkpoint;"
        f"checkpoint.read_record(Path({str(tmp_path / 'last.pth')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.write(path, TENSORS, RECORD)
    before = path.read_bytes()
    # A limit on the size of files, in a process of its own, stops the write in the middle, as a full disk would.
    code = (
        "import resource, signal, torch; from pathlib import Path; from gpt2 import checkpoint;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        f"checkpoint.write(Path({str(path)!r}), {{'model/a': torch.zeros(1_000_000)}}, {{}})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def absurd_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def pickled(path: Path) -> None:
    torch.save({"model": torch.zeros(2)}, path)


def cut_short(path: Path) -> None:
    checkpoint.write(path, TENSORS, RECORD)
    os.truncate(path, path.stat().st_size - 1)


def of_the_future(path: Path) -> None:
    checkpoint.write(path, TENSORS, {"format": 99})


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(b""), "not a checkpoint that this program wrote"),
        (absurd_header, "not a checkpoint that this program wrote"),
        (pickled, "not a checkpoint that this program wrote"),
        (cut_short, "is damaged"),
        (of_the_future, "has format 99"),
        (lambda path: path.mkdir(), "cannot read"),
        (lambda path: None, "cannot read"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, damage, complaint):
    path = tmp_path / "some.pth"
    damage(path)
    with pytest.raises(UserError, match=complaint) as refusal:
        checkpoint.read_record(path)
        checkpoint.read_tensors(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def make_run(folder: Path, *names: str, age: float = 0.0) -> Path:
    for name in names:
        path = folder / "checkpoints" / name
        checkpoint.write(path, TENSORS, RECORD)
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def test_a_checkpoint_is_found_by_file_by_run_folder_and_by_being_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = make_run(Path("outputs/runs/a/1"), run_folder.BEST, run_folder.LAST, age=100)
    new = make_run(Path("outputs/runs/b/0"), run_folder.LAST)
    assert run_folder.find(str(old)) == old / "checkpoints" / run_folder.BEST
    assert run_folder.find(str(old / "checkpoints")) == old / "checkpoints" / run_folder.BEST
    assert run_folder.find(str(old / "checkpoints" / run_folder.LAST)) == old / "checkpoints" / run_folder.LAST
    assert run_folder.find(None) == new / "checkpoints" / run_folder.LAST  # never evaluated: it has no best


@pytest.mark.parametrize("path", [None, "nowhere", "."])
def test_no_checkpoint_is_one_line_too(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^checkpoint: "):
        run_folder.find(path)


def test_others_may_read_a_checkpoint_as_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    checkpoint.write(tmp_path / "a.pth", {"x": torch.zeros(2)}, {})
    assert (tmp_path / "a.pth").stat().st_mode == (tmp_path / "other").stat().st_mode
