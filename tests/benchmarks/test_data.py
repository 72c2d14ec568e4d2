"""Both tokenizers make the same tokens, and the figures follow from the times. Speed is not tested."""

import json

import pytest

from gpt2.benchmarks.common import from_to, interleaved, or_na, spread, table
from tests.conftest import Workspace

DATA = ["data=text", "data.files=[corpus.txt]", "data.max_length=32", "train.batch_size=4", "train.num_workers=0"]


def test_interleaved_turns_rotate():
    order: list[str] = []
    turns = [lambda name=name: order.append(name) or name for name in "abc"]
    assert interleaved(turns, 4, "") == [[name] * 4 for name in "abc"]
    assert "".join(order) == "abcbcacababc"


def test_spread_has_the_median_and_all_values():
    assert spread("seconds", [3, 1, 2]) == {"seconds": 2, "seconds_of_each": [3, 1, 2]}
    assert from_to([3000, 1]) == "1 - 3,000"
    assert [or_na(value, ".1f") for value in (None, float("nan"), 1.25)] == ["n/a", "n/a", "1.2"]


def test_table_is_aligned():
    assert table(("", "b"), [("long", "1"), ("x", "1,000")]) == "          b\nlong      1\nx     1,000"


@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_command_compares_the_same_tokens(workspace: Workspace, tokenizer):
    text = (workspace.folder / "corpus.txt").read_text()
    (workspace.folder / "corpus.txt").write_text(f"{text}<|endoftext|> é\n\n")
    overrides = [f"data.tokenizer={tokenizer}", "data.vocab_size=300", "repetitions=2", "batches=5", "json=data.json"]
    cached = sorted((workspace.folder / "cache").rglob("*"))
    done = workspace.module("gpt2.main", "benchmark", "data", *DATA, *overrides)
    assert done.returncode == 0, done.stderr
    result = json.loads((workspace.folder / "data.json").read_text())
    assert result["same_tokens"] is True
    assert "the tokens are the same" in done.stdout
    assert result["loader"]["batches"] == 5
    theirs, ours = result["results"]
    assert ours["ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    for row in result["results"]:
        assert row["tokens_per_second"] == pytest.approx(result["tokens"] / row["seconds"])
        assert f"{row['tokens_per_second']:,.0f}" in done.stdout
    assert sorted((workspace.folder / "cache").rglob("*")) == cached  # nothing is prepared for training


def test_errors_of_the_command_are_lines(workspace: Workspace):
    done = workspace.module("gpt2.main", "benchmark", "data", *DATA, "data.files=[nothing]", "batches=0")
    assert done.returncode == 2
    assert {line.split(":")[1] for line in done.stderr.splitlines()} == {" data.files", " batches"}
    done = workspace.module("gpt2.main", "benchmark", "data", *DATA, "data.tokenizer=bytes", "train.batch_size=5000")
    assert done.returncode == 2
    assert "fewer than two batches of train.batch_size=5000" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("what", ["training", "data"])
def test_help_lists_the_options(workspace: Workspace, what):
    done = workspace.module("gpt2.main", "benchmark", what, "--help")
    assert done.returncode == 0
    assert "  json=null" in done.stdout
