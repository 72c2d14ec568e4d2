"""The generation benchmark: contestants do the same work, and its figures are right. Speed itself is not tested."""

import json

import pytest
import torch

from gpt2.analysis.tables import table
from gpt2.benchmarks.common import read_bandwidth
from gpt2.benchmarks.generation import COLUMNS, Contestant, GenerationComparison, Timing, ours, theirs
from gpt2.config import GenerationBenchmark
from tests.conftest import Workspace
from tests.helpers import random_ids, tiny_config


def test_timing_of_the_first_token_and_the_median_later_one():
    timing = Timing([10.0, 13.0, 13.5, 14.0, 19.0], torch.zeros(1, 4))
    assert (timing.prefill_seconds, timing.step_seconds) == (3.0, 0.5)
    assert Timing(timing.clock, timing.tokens, is_even=False).step_seconds == 2.0  # a pass yields several tokens


def test_a_single_text_is_generated_with_prompt_lookup_too():
    comparison = GenerationComparison(GenerationBenchmark(tiny_config(initializer_range=0.3), device="cpu"))
    contestants = {contestant.name: contestant for contestant in comparison.contestants(batch_size=1)}
    names = [f"gpt2, {name}{how}" for name in ("fp32", "bf16", "int8", "int4") for how in ("", ", prompt lookup")]
    assert list(contestants)[2:] == names
    input_ids = random_ids(comparison.model.config, 1, 5)
    plain, speculative = (contestants[name].generate(input_ids, 10) for name in names[:2])
    assert torch.equal(plain.tokens, speculative.tokens)
    assert len(speculative.clock) == len(plain.clock) == 11


def test_both_generate_the_same_tokens_from_the_same_weights():
    comparison = GenerationComparison(GenerationBenchmark(tiny_config(initializer_range=0.3), device="cpu"))
    input_ids = random_ids(comparison.model.config, 3, 5)
    timings = [run(input_ids, 8) for run in (theirs(comparison.reference), ours(comparison.model))]
    assert torch.equal(*(timing.tokens for timing in timings))
    assert timings[0].tokens.shape == (3, 8)
    assert len(set(timings[0].tokens.flatten().tolist())) > 2
    assert comparison.weights == comparison.model.num_parameters() - 16 * 16  # without the position table


def test_a_contestant_that_fails_is_left_out_with_a_warning(monkeypatch, caplog):
    config = GenerationBenchmark(tiny_config(), device="cpu", new_tokens=3, prompt_tokens=2, repetitions=2)
    comparison = GenerationComparison(config)
    broken = comparison.contestants

    def contestants(batch_size: int):
        first, compiled, *rest = broken(batch_size)

        def fails(*_):
            raise RuntimeError("no compiler\nand so on")

        compiled.generate = fails
        return [first, compiled, *rest]

    monkeypatch.setattr(comparison, "contestants", contestants)
    rows = comparison.compare(batch_size=2)
    ours = [f"gpt2, {name}" for name in ("fp32", "bf16", "int8", "int4")]
    assert [row["contestant"] for row in rows] == ["transformers", *ours]
    assert "transformers, static, compiled is left out: no compiler" in caplog.text
    assert all(len(row["tokens_per_second_of_each"]) == 2 for row in rows)
    assert rows[0]["ratio"] == rows[0]["same_tokens"] == 1
    bytes_read, share = comparison.weights * (0.5 + 4 / 128), rows[-1]["share_of_floor"]
    assert share == pytest.approx(bytes_read / rows[-1]["read_bytes_per_second"] / (2 / rows[-1]["tokens_per_second"]))
    assert len(table(rows, COLUMNS).splitlines()) == 1 + len(rows)


def test_figures_of_a_row(monkeypatch):
    """Computed from contestants with fixed times."""
    comparison = GenerationComparison(GenerationBenchmark(tiny_config(), device="cpu", new_tokens=2, prompt_tokens=2))
    tokens = torch.tensor([[1, 2], [3, 4]])

    def takes(seconds: list[float], output: torch.Tensor = tokens):
        each = iter([9.0, *seconds])  # the first run does not count

        def generate(*_) -> Timing:
            step = next(each)
            return Timing([0.0, 1.0, 1.0 + step, 1.0 + 2 * step], output)

        return generate

    contestants = [
        Contestant("transformers", takes([0.4, 0.2, 0.3, 0.2, 0.1])),
        Contestant("transformers, compiled", takes([0.1] * 5)),
        Contestant("gpt2, bf16", takes([0.05] * 5, torch.tensor([[1, 2], [3, 5]])), 2, "Sliced"),
    ]
    monkeypatch.setattr(comparison, "contestants", lambda batch_size: contestants)
    bandwidths = iter([1e6, 3e6, 2e6, 4e6, 1e6])
    monkeypatch.setattr("gpt2.benchmarks.generation.read_bandwidth", lambda memory: next(bandwidths))
    first, second, ours = comparison.compare(batch_size=2)
    assert [row["tokens_per_second"] for row in (first, second, ours)] == pytest.approx([10, 20, 40])
    assert first["tokens_per_second_of_each"] == pytest.approx([5, 10, 2 / 0.3, 10, 20])
    assert [row["ratio"] for row in (first, second, ours)] == pytest.approx([0.5, 1, 2])
    assert [row["same_tokens"] for row in (first, second, ours)] == [1, 1, 0.75]
    assert ours["share_of_floor"] == pytest.approx(comparison.weights * 2 / 2e6 / 0.05)
    assert second["share_of_floor"] == pytest.approx(comparison.weights * 4 / 2e6 / 0.1)
    assert (ours["layout"], ours["prefill_seconds"]) == ("Sliced", 1.0)


def test_bandwidth_is_bytes_over_seconds(monkeypatch):
    clock = iter([1.0, 1.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert read_bandwidth(torch.ones(1000)) == 8000


def test_benchmarks_are_listed_and_invalid_options_reported(workspace: Workspace):
    for arguments in ([], ["nothing"]):
        done = workspace.module("gpt2.main", "benchmark", *arguments)
        assert done.returncode == 2
        assert all(f"  {what}" in done.stderr for what in ("generation", "training"))
    done = workspace.module("gpt2.main", "benchmark", "generation", "new_tokens=1", "batch_sizes=[0]")
    assert done.returncode == 2
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [" new_tokens", " batch_sizes"]


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_json(workspace: Workspace):
    shape = ["model=gpt2_nano", "model.num_layers=1", "model.d_model=32", "model.d_ff=64", "model.vocab_size=300"]
    work = ["new_tokens=3", "prompt_tokens=4", "repetitions=2", "batch_sizes=[3]", "json=speed/result.json"]
    done = workspace.module("gpt2.main", "benchmark", "generation", *shape, *work)
    assert done.returncode == 0, done.stderr
    result = json.loads((workspace.folder / "speed" / "result.json").read_text())
    formats = ("fp32", "bf16", "int8", "int4")
    contestants = ("transformers", "transformers, static, compiled", *(f"gpt2, {name}" for name in formats))
    assert [(row["batch_size"], row["contestant"]) for row in result["results"]] == [(3, name) for name in contestants]
    for row in result["results"]:
        assert f"{row['tokens_per_second']:,.1f}" in done.stdout
