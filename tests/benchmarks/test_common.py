"""Functions shared by the benchmarks: order of repetitions, medians and the JSON file."""

import json

import torch

from gpt2.analysis.tables import from_to
from gpt2.benchmarks.common import interleaved, peak_bytes, reset_peak, spread, write_json


def test_interleaved_turns_rotate():
    order: list[str] = []
    turns = [lambda name=name: order.append(name) or name for name in "abc"]
    assert interleaved(turns, 4, "") == [[name] * 4 for name in "abc"]
    assert "".join(order) == "abcbcacababc"


def test_spread_has_the_median_and_all_values():
    assert spread("seconds", [3, 1, 2]) == {"seconds": 2, "seconds_of_each": [3, 1, 2]}
    assert from_to([3000, 1]) == "1 - 3,000"


def test_nan_in_a_record_becomes_null(tmp_path):
    write_json(str(tmp_path / "new" / "result.json"), {"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"a": [None, 1.5], "b": None}


def test_peak_memory_can_be_reset():
    cpu = torch.device("cpu")
    reset_peak(cpu)
    before = peak_bytes(cpu)
    block = torch.ones(50 << 20)
    assert peak_bytes(cpu) > before + (100 << 20)
    del block
    reset_peak(cpu)
    assert peak_bytes(cpu) > 10 << 20
