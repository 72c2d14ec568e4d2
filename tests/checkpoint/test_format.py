"""The checkpoint format: atomic writes, no pickle, and detection of all damage."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.errors import UserError
from gpt2.runtime.files import TEMPORARY_PREFIX

TENSORS = {"model/a": torch.arange(6.0).reshape(2, 3), "rng/cpu": torch.arange(5, dtype=torch.uint8)}
RECORD = {"model": {"d_model": 3}, "tokenizer": "ünï ☃", "progress": {"best": None, "seconds": 0.1 + 0.2}}


def test_written_checkpoint_is_read(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "new" / "last.pth", TENSORS, RECORD)
    read = checkpoint.read_tensors(tmp_path / "new" / "last.pth")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert checkpoint.read_tensors(tmp_path / "new" / "last.pth", "model/").keys() == {"a"}
    record = checkpoint.read_record(tmp_path / "new" / "last.pth")
    assert {key: record[key] for key in RECORD} == RECORD
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "last.pth"]


def test_file_is_safetensors_with_json_only(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.write_checkpoint(path, TENSORS, RECORD)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert len(content) == 8 + length + sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert json.loads(header["__metadata__"]["gpt2"])["tokenizer"] == RECORD["tokenizer"]


def test_record_is_read_without_importing_torch(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "last.pth", TENSORS, RECORD)
    code = (
        "import sys; from pathlib import Path; from gpt2.checkpoint import format as checkpoint;"
        f"checkpoint.read_record(Path({str(tmp_path / 'last.pth')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def absurd_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def pickled(path: Path) -> None:
    torch.save({"model": torch.zeros(2)}, path)


def cut_short(path: Path) -> None:
    checkpoint.write_checkpoint(path, TENSORS, RECORD)
    os.truncate(path, path.stat().st_size - 1)


def of_the_future(path: Path) -> None:
    checkpoint.write_checkpoint(path, TENSORS, {"format": 99})


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(b""), "not a checkpoint of this program"),
        (absurd_header, "not a checkpoint of this program"),
        (pickled, "not a checkpoint of this program"),
        (cut_short, "is damaged"),
        (of_the_future, r"was written by a newer version of this program \(format 99, this version reads format 2\)"),
        (lambda path: path.mkdir(), "cannot read"),
        (lambda path: None, "cannot read"),
    ],
)
def test_file_that_is_not_a_checkpoint_is_refused_in_one_line(tmp_path, damage, complaint):
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
        checkpoint.write_checkpoint(path, TENSORS, RECORD)
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def test_checkpoint_is_found_by_file_run_folder_or_age(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = make_run(Path("outputs/runs/a/1"), run_folder.BEST, run_folder.LAST, age=100)
    new = make_run(Path("outputs/runs/b/0"), run_folder.LAST)
    assert run_folder.find_checkpoint(str(old)) == old / "checkpoints" / run_folder.BEST
    assert run_folder.find_checkpoint(str(old / "checkpoints")) == old / "checkpoints" / run_folder.BEST
    assert (
        run_folder.find_checkpoint(str(old / "checkpoints" / run_folder.LAST)) == old / "checkpoints" / run_folder.LAST
    )
    assert run_folder.find_checkpoint(None) == new / "checkpoints" / run_folder.LAST  # no evaluation, no best


@pytest.mark.parametrize("path", [None, "nowhere", "."])
def test_missing_checkpoint_is_a_user_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^checkpoint: "):
        run_folder.find_checkpoint(path)


def test_checkpoint_has_the_usual_permissions(tmp_path):
    (tmp_path / "other").touch()
    checkpoint.write_checkpoint(tmp_path / "a.pth", {"x": torch.zeros(2)}, {})
    assert (tmp_path / "a.pth").stat().st_mode == (tmp_path / "other").stat().st_mode


# Damage


def header_length(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def is_refused(read, *arguments) -> bool:
    """Whether reading raises a UserError of one line; any other error is a bug and fails the test."""
    try:
        read(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


def forge(path: Path, record: str, sums: str = "{}", data: bytes = b"", **entries) -> None:
    """Write a file whose header has a correct checksum but arbitrary contents."""
    metadata = {"gpt2": record, "sha256_of_tensors": sums, "sha256_of_header": "0" * 64}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text = text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_flipped_bit_is_detected_exactly_where_it_is_read(tmp_path):
    path = tmp_path / "step.pth"
    checkpoint.write_checkpoint(path, TENSORS, RECORD)
    good = path.read_bytes()
    beginning, end_of_model = 8 + header_length(good), 8 + header_length(good) + 6 * 4
    sampled = {*range(8, len(good), len(good) // 150), *range(beginning - 3, len(good))}
    flips = [(i, bit) for i in range(8) for bit in range(8)] + [(i, i % 8) for i in sorted(sampled)]
    assert len(flips) > 200
    for i, bit in flips:
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :])
        noticed = [
            is_refused(read, path, *prefix)
            for read, *prefix in (
                (checkpoint.verify,),
                (checkpoint.verify, "model/"),
                (checkpoint.read_record,),
                (checkpoint.read_tensors, "model/"),
                (checkpoint.read_tensors, "rng/"),
            )
        ]
        in_header, in_model = i < beginning, i < end_of_model
        assert noticed == [True, in_model, in_header, in_model, in_header or not in_model], (i, bit)
    path.write_bytes(good)
    assert checkpoint.verify(path) == checkpoint.read_record(path)


def test_file_of_any_other_length_is_refused(tmp_path):
    path = tmp_path / "step.pth"
    checkpoint.write_checkpoint(path, TENSORS, RECORD)
    good = path.read_bytes()
    for other in (*(good[:length] for length in range(len(good))), good + b"\0", good + b" "):
        path.write_bytes(other)
        assert all(is_refused(f, path) for f in (checkpoint.verify, checkpoint.read_record, checkpoint.read_tensors))


def test_exchanged_tensors_are_detected(tmp_path):
    path = tmp_path / "step.pth"
    checkpoint.write_checkpoint(
        path, {"model/a": torch.rand(8), "model/b": torch.rand(8), "model/c": torch.rand(8)}, {}
    )
    good = path.read_bytes()
    a, b, c = good[-96:-64], good[-64:-32], good[-32:]
    path.write_bytes(good[:-96] + b + a + c)
    for read in (checkpoint.verify, checkpoint.read_tensors):
        with pytest.raises(UserError, match=r"wrong checksum of model/a, model/b$"):
            read(path)
    assert checkpoint.read_tensors(path, "model/c").keys() == {""}


def test_large_tensors_are_verified_completely(tmp_path):
    path, size = tmp_path / "step.pth", 2**21 + 2**19 + 3  # several blocks, the last one incomplete
    checkpoint.write_checkpoint(
        path, {"a": torch.zeros(size, dtype=torch.uint8), "b": torch.ones(2**20, dtype=torch.uint8)}, {}
    )
    good = path.read_bytes()
    assert {"a", "b"} == checkpoint.read_tensors(path).keys()
    checkpoint.verify(path)
    for place in (0, 2**20, 2**21, size - 1, size, size + 2**20 - 1):
        i = len(good) - size - 2**20 + place
        path.write_bytes(good[:i] + b"\2" + good[i + 1 :])
        os.utime(path, (place, place))
        with pytest.raises(UserError, match=f"wrong checksum of {'a' if place < size else 'b'}"):
            checkpoint.verify(path)


def test_damage_after_a_verification_is_detected(tmp_path):
    path = tmp_path / "step.pth"
    checkpoint.write_checkpoint(path, TENSORS, RECORD)
    checkpoint.verify(path)
    good, status = path.read_bytes(), path.stat()
    path.write_bytes(good[:-1] + b"!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert is_refused(checkpoint.verify, path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_folder(path: Path) -> None:
    path.with_name("folder").mkdir()
    path.symlink_to("folder")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [fifo, link_to_folder, link_to_itself])
def test_pipes_and_folders_are_refused_without_blocking(tmp_path, make):
    make(tmp_path / "step.pth")
    for read in (checkpoint.verify, checkpoint.read_record, checkpoint.read_tensors):
        with pytest.raises(UserError, match=r"cannot read .*step.pth"):
            read(tmp_path / "step.pth")


def peak_memory(read, path: Path) -> int:
    tracemalloc.start()
    try:
        assert is_refused(read, path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", ["0", "1.5", "[]", "{}", '{"a":0}', '"ab"', '""'])
def test_many_small_values_in_a_header_take_no_memory(tmp_path, value):
    path = tmp_path / "step.pth"
    text = f'{{"__metadata__":{{"gpt2":[{",".join([value] * (2_000_000 // (len(value) + 1)))}]}}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert peak_memory(checkpoint.read_record, path) < 4 * path.stat().st_size  # a valid header takes 3 times its size


@pytest.mark.parametrize("place", ["record", "sums"])
def test_many_small_values_in_a_valid_header_take_no_memory(tmp_path, place):
    path, bomb = tmp_path / "step.pth", f"[{','.join(['[]'] * 1_300_000)}]"
    forge(path, **{"record": f'{{"format":{checkpoint.FORMAT}}}', place: bomb}, x={"data_offsets": [0, 0]})
    assert peak_memory(checkpoint.read_record, path) < 5 * path.stat().st_size


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b"3",
        b'"text"',
        b"null",
        b"{}",
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"sha256_of_header":1}}',
        b'{"__metadata__":{"sha256_of_header":"1"}}',
        b"9" * 10_000,
        b"\xff\xfe",
        b"{\0}\0",
    ],
)
def test_invalid_header_is_refused(tmp_path, content):
    path = tmp_path / "step.pth"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(UserError, match=r"not a checkpoint of this program|wrong checksum of its header"):
        checkpoint.read_record(path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0, 16], [8, 24]),
        ([0, 24], [0, 24]),
        ([0, 24], [8, 16]),
        ([0, 8], [16, 24]),  # a gap, which no checksum covers
        ([8, 16], [16, 24]),
        ([0, 16], [24, 16]),
        ([-8, 16], [16, 24]),
    ],
)
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path, first, second):
    path, data, places = tmp_path / "step.pth", bytes(24), {"a": first, "b": second}
    entries = {name: {"dtype": "U8", "shape": [1], "data_offsets": place} for name, place in places.items()}
    parts = {name: data[max(0, begin) : end] for name, (begin, end) in places.items()}
    sums = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    forge(path, json.dumps({"format": checkpoint.FORMAT}), json.dumps(sums), data, **entries)
    for read in (checkpoint.verify, checkpoint.read_record, checkpoint.read_tensors):
        with pytest.raises(UserError, match="its header is damaged"):
            read(path)


@pytest.mark.parametrize("more", [0, 1])
def test_the_header_has_at_most_32_mb(tmp_path, more):
    """The checksum and the size of the file are right: only the limit prevents that it is read into memory."""
    path = tmp_path / "step.pth"
    forge(path, json.dumps({"format": checkpoint.FORMAT, "tokenizer": ""}))
    missing = 32 * 2**20 - header_length(path.read_bytes())
    forge(path, json.dumps({"format": checkpoint.FORMAT, "tokenizer": "x" * (missing + more)}))
    assert header_length(path.read_bytes()) == 32 * 2**20 + more
    assert is_refused(checkpoint.read_record, path) == bool(more)


def test_claimed_huge_header_takes_no_memory(tmp_path):
    for claim in (2**60, 2**64 - 1, 2**31, 2**24, 9):
        (tmp_path / "step.pth").write_bytes(claim.to_bytes(8, "little") + b"{}")
        assert peak_memory(checkpoint.read_record, tmp_path / "step.pth") < 2**20


def cpu_seconds(function) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def test_damaged_header_length_is_refused_in_linear_time(tmp_path):
    path = tmp_path / "step.pth"
    checkpoint.write_checkpoint(path, TENSORS, {"tokenizer": json.dumps({f"token {i}": i for i in range(20_000)})})
    seconds_of_valid = cpu_seconds(lambda: checkpoint.read_record(path))
    content = path.read_bytes()
    length = header_length(content)
    flip = next(2**bit for bit in reversed(range(25)) if length & 2**bit and length - 2**bit > length * 2 / 3)
    path.write_bytes((length - flip).to_bytes(8, "little") + content[8:])  # the header now ends inside the record
    seconds = cpu_seconds(lambda: is_refused(checkpoint.read_record, path))
    assert seconds < 100 * seconds_of_valid  # in quadratic time it would be thousands of times as long


# The format


@pytest.mark.parametrize("dtype", checkpoint.SAFETENSORS_DTYPES)
def test_all_types_and_shapes_survive_and_safetensors_reads_them(tmp_path, dtype):
    from safetensors.torch import load_file

    random = torch.Generator().manual_seed(0)

    def bits(*shape: int) -> torch.Tensor:  # includes NaNs, infinities and subnormal numbers
        width = getattr(torch, dtype).itemsize
        return torch.randint(256, (*shape, width), dtype=torch.uint8, generator=random).view(getattr(torch, dtype))

    tensors = {"matrix": bits(3, 50)[..., 0], "zero_dim": bits(1)[0, 0], "empty": bits(0)[..., 0], "z": bits(0, 3)}
    tensors |= {"transposed": bits(5, 7)[..., 0].T, "every_other": bits(9)[::2, 0], "odd": bits(3)[..., 0]}
    tensors |= {"narrow": torch.ones(3, dtype=torch.uint8)}
    checkpoint.write_checkpoint(tmp_path / "step.pth", tensors, {})
    for read in (checkpoint.read_tensors(tmp_path / "step.pth"), load_file(tmp_path / "step.pth")):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
            as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (read[name], tensor)]
            assert torch.equal(*as_bytes), name
    checkpoint.verify(tmp_path / "step.pth")


def test_plain_file_holds_tensors_and_metadata(tmp_path):
    from safetensors import safe_open

    checkpoint.save_tensors(tmp_path / "model.safetensors", TENSORS, {"format": "pt"})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: file.get_tensor(name).tolist() for name in TENSORS} == {n: t.tolist() for n, t in TENSORS.items()}


def test_tensors_that_do_not_fit_are_all_named():
    expected = {"a": (2, 3), "b": (4,), "c": (5,)}
    checkpoint.check_tensor_shapes("x", expected, dict(expected))
    with pytest.raises(UserError) as refusal:
        checkpoint.check_tensor_shapes("x", {"a": (3, 2), "c": (5,), "d": (1,)}, expected)
    assert "1 missing: b; 1 unexpected: d; 1 misshapen: a (3, 2) instead of (2, 3)" in str(refusal.value)


def test_tensors_are_aligned(tmp_path):
    tensors = {
        f"{i}/{dtype}": torch.zeros(3, dtype=getattr(torch, dtype)) for i in "ab" for dtype in ("uint8", "int64")
    }
    for length in range(8):
        checkpoint.write_checkpoint(
            tmp_path / "step.pth", {**tensors, "half": torch.zeros(1).half()}, {"text": "x" * length}
        )
        content = (tmp_path / "step.pth").read_bytes()
        header = json.loads(content[8 : 8 + header_length(content)])
        assert header_length(content) % 8 == 0
        assert header["half"]["data_offsets"][0] % 2 == 0
        assert not any(header[f"{i}/int64"]["data_offsets"][0] % 8 for i in "ab")


def test_record_may_contain_header_text(tmp_path):
    record = {"a": '"sha256_of_header":"' + "0" * 64 + '"', "b": "\ud800 \x00 \u2028", '__metadata__"': [None, 1e308]}
    checkpoint.write_checkpoint(tmp_path / "step.pth", {"sha256_of_header": torch.zeros(2)}, record)
    read = checkpoint.verify(tmp_path / "step.pth")
    assert {key: read[key] for key in record} == record


# Writing


def test_failed_fsync_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "step.pth"
    checkpoint.write_checkpoint(path, TENSORS, RECORD)
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.write_checkpoint(path, {"x": torch.zeros(9)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_file_is_flushed_before_the_rename_and_folder_after_it(tmp_path):
    code = (
        "import torch; from pathlib import Path; from gpt2.checkpoint import format as checkpoint;"
        f"checkpoint.write_checkpoint(Path({str(tmp_path / 'step.pth')!r}), {{'x': torch.zeros(99_999)}}, {{}})"
    )
    calls = "trace=write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2"
    strace = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "0", "-e", calls, "-o", str(tmp_path / "trace")]
    done = subprocess.run([*strace, sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode and "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1)[1] for line in (tmp_path / "trace").read_text().splitlines() if "(" in line]
    lines = [line for line in lines if str(tmp_path) in line]
    order = [line.split("(")[0] for line in lines]
    assert order[0] == "write"
    assert [name for name in order if name != "write"] == ["fsync", "rename", "fsync"]
    assert order[-3:] == ["fsync", "rename", "fsync"]  # nothing is written after the first fsync
    assert f"<{tmp_path}/{TEMPORARY_PREFIX}" in lines[-3]
    assert f"<{tmp_path}>" in lines[-1]
