"""Every measurement runs with a tiny model, and the status follows from the figures. Speed is not tested."""

import math
from types import SimpleNamespace

import pytest
import torch

from gpt2.cli.hydra_private import parse_arguments
from gpt2.cli.preflight import check_run
from gpt2.doctor import speed
from gpt2.doctor.report import MISSING, OK, SLOW, WRONG, Machine, run_checks
from tests.helpers import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    monkeypatch.setattr(speed, "GPT2", tiny_config())
    monkeypatch.setitem(speed.BLOCKS, "cpu", (2, 16))
    monkeypatch.setattr(speed, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "LOADED_TOKENS", 4000)
    monkeypatch.setattr(speed, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(speed, "NEW_TOKENS", 4)
    monkeypatch.setattr("gpt2.ops.cpu_inference.MIN_HEAD_BYTES", 0)  # weights have the layout of GPT-2 124M
    monkeypatch.setattr(speed, "matmul_flops", lambda precision: 1e9 * precision.dtype.itemsize)
    return Machine(CPU, tmp_path)


def steps(**fields) -> speed.Steps:
    usual = {"tokens": 512, "seconds": 1.0, "flops_per_token": 1e6, "loss": 10.8, "needed_bytes": 1e9}
    return speed.Steps(**{**usual, "peak_bytes": 9e8, **fields})


def test_every_measurement_runs(machine):
    rows = {row.name: row for row in run_checks(machine, {"part": speed.CHECKS})}
    assert list(rows) == list(speed.CHECKS)
    assert all(row.status == OK or row.advice for row in rows.values())
    assert not [row for row in rows.values() if row.value.startswith(("RuntimeError", "TypeError", "AttributeError"))]
    assert rows["training 124M"].figures["mfu"] > 0
    assert math.log(61) == pytest.approx(rows["training 124M"].figures["loss"], abs=0.5)
    decoding, bandwidth = rows["decoding 124M"].figures, rows["memory bandwidth"].figures["bytes_per_second"]
    read = 4 * (speed.meta_model(speed.GPT2).num_parameters() - 16 * 16)  # all weights but the table of positions
    assert decoding["share_of_floor"] == pytest.approx(read * decoding["tokens_per_second"] / bandwidth)
    assert rows["loading data"].figures["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("name", "fields", "status"),
    [
        ("training 124M", {"flops_per_token": 1e7}, OK),
        ("training 124M", {"flops_per_token": 1e5}, SLOW),
        ("training 124M", {"loss": float("nan")}, WRONG),
        ("its memory", {}, OK),
        ("its memory", {"peak_bytes": 2e9}, SLOW),
        ("loading data", {"seconds": 1e9}, OK),
        ("loading data", {"seconds": 1e-9}, SLOW),
        ("model=gpt2", {"seconds": 1e-6}, OK),
        ("model=gpt2", {"seconds": 1e4}, SLOW),
    ],
)
def test_status_follows_from_the_figures(machine, monkeypatch, name, fields, status):
    monkeypatch.setattr(speed, "timed_steps", lambda _: steps(**fields))
    row = speed.CHECKS[name](machine)
    assert row.status == status
    assert status == OK or row.advice


@pytest.mark.parametrize(("seconds", "recipe"), [(1e-6, "gpt2_124m_fineweb"), (1e4, "quickstart")])
def test_last_command_is_one_for_this_machine(machine, monkeypatch, seconds, recipe):
    monkeypatch.setattr(speed, "timed_steps", lambda _: steps(seconds=seconds))
    row = speed.check_command(machine)
    assert row.figures["command"].startswith(f"python train.py experiment={recipe}")
    assert " billion tokens of python train.py experiment=gpt2_124m_fineweb model=gpt2 " in row.value


def test_model_that_does_not_fit(machine, monkeypatch):
    monkeypatch.setattr(speed, "memory_of", lambda _: 1e5)
    for name in ("training 124M", "its memory", "largest batch_size", "model=gpt2"):
        assert speed.CHECKS[name](machine).status == MISSING
    assert speed.CHECKS["loading data"](machine).status == OK


@pytest.mark.parametrize(("memory", "rows"), [(6e9, 4), (25e9, 16), (80e9, 16)])
def test_recommended_command_is_accepted(machine, monkeypatch, memory, rows):
    monkeypatch.setattr(speed, "memory_of", lambda _: memory)
    python, script, *words = speed.recommended(machine, 512, 1)
    assert (python, script) == ("python", "train.py")
    composed = check_run("train", parse_arguments(words))
    assert composed.train.batch_size * composed.train.accumulation_steps == 512
    assert composed.train.batch_size == rows
    assert composed.model.d_model == 768


def test_recommended_command_for_several_gpus(machine, monkeypatch):
    monkeypatch.setattr(speed, "memory_of", lambda _: 80e9)
    monkeypatch.setattr(speed, "chunk_bytes_of", lambda _: 1 << 30)
    gpu = SimpleNamespace(device=torch.device("cuda"), precision=machine.precision)
    words = speed.recommended(gpu, 512, 8)
    assert words[:3] == ["torchrun", "--nproc_per_node=8", "train.py"]
    assert words[-2:] == ["train.batch_size=64", "train.accumulation_steps=8"]


def test_numbers_have_prefixes():
    assert [speed.shown(number, "B/s") for number in (5, 2.04e9, 4.4e11, 1.5e12)] == [
        *("5.0 B/s", "2.0 GB/s", "440 GB/s", "1.5 TB/s")
    ]
