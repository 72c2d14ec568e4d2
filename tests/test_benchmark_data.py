"""Speed is not tested, but that both make the same tokens; and that what is timed at the start comes to its end."""

import json

import pytest

from gpt2.benchmarks.common import from_to, interleaved, or_na, spread, table
from gpt2.benchmarks.startup import FIRST_STEP, run, turns_in
from tests.conftest import Workspace

DATA = ["data=text", "data.files=[corpus.txt]", "data.max_length=32", "train.batch_size=4", "train.num_workers=0"]


def test_who_begins_rotates():
    order: list[str] = []
    turns = [lambda name=name: order.append(name) or name for name in "abc"]
    assert interleaved(turns, 4, "") == [[name] * 4 for name in "abc"]
    assert "".join(order) == "abcbcacababc"


def test_a_spread_holds_each_value():
    assert spread("seconds", [3, 1, 2]) == {"seconds": 2, "seconds_of_each": [3, 1, 2]}
    assert from_to([3000, 1]) == "1 - 3,000"
    assert [or_na(value, ".1f") for value in (None, float("nan"), 1.25)] == ["n/a", "n/a", "1.2"]


def test_columns_are_as_wide_as_they_need_to_be():
    assert table(("", "b"), [("long", "1"), ("x", "1,000")]) == "          b\nlong      1\nx     1,000"


@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_the_data_command_compares_the_same_tokens(workspace: Workspace, tokenizer):
    text = (workspace.folder / "corpus.txt").read_text()
    (workspace.folder / "corpus.txt").write_text(f"{text}<|endoftext|> é\n\n")
    asked = [f"data.tokenizer={tokenizer}", "data.vocab_size=300", "repetitions=2", "batches=5", "json=data.json"]
    cached = sorted((workspace.folder / "cache").rglob("*"))
    done = workspace.module("gpt2.main", "benchmark", "data", *DATA, *asked)
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
    assert sorted((workspace.folder / "cache").rglob("*")) == cached  # what is prepared here is no corpus to train on


def test_the_data_command_tells_mistakes_in_lines(workspace: Workspace):
    done = workspace.module("gpt2.main", "benchmark", "data", *DATA, "data.files=[nothing]", "batches=0")
    assert done.returncode == 2
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [" data.files", " batches"]
    done = workspace.module("gpt2.main", "benchmark", "data", *DATA, "data.tokenizer=bytes", "train.batch_size=5000")
    assert done.returncode == 2
    assert "less than two batches of train.batch_size=5000" in done.stderr.splitlines()[-1]


def test_a_process_is_timed_to_a_line_and_to_its_end(tmp_path):
    script = "import time; print('step 10/10'); time.sleep(0.1); print('step 1/10  loss'); time.sleep(0.2); exit(3)"
    times = run(["-c", script], tmp_path, exit_code=3, line=FIRST_STEP)
    assert times.line is not None
    assert 0.1 < times.line < times.end - 0.15
    with pytest.raises(RuntimeError, match="ended with 3"):
        run(["-c", script], tmp_path)
    with pytest.raises(RuntimeError, match="ended with 0"):
        run(["-c", "pass"], tmp_path, line=FIRST_STEP)


def test_what_is_timed_at_the_start_comes_to_its_end(tmp_path):
    turns = turns_in(tmp_path)
    assert turns["train.py, a mistake"]().line is None
    times = turns["train.py, one step"]()
    assert times.line is not None
    assert times.line < times.end


@pytest.mark.slow
def test_the_startup_command(workspace: Workspace):
    done = workspace.module("gpt2.main", "benchmark", "startup", "repetitions=1", "json=startup.json")
    assert done.returncode == 0, done.stderr
    rows = {
        row["what"]: row["seconds"] for row in json.loads((workspace.folder / "startup.json").read_text())["results"]
    }
    assert list(rows)[-2:] == ["train.py, one step: to its line", "train.py, one step: to the end"]
    assert rows["python -c pass"] < rows["train.py --help"] < rows["train.py, one step: to its line"]
    assert all(f"{seconds:.2f}" in done.stdout for seconds in rows.values())
    assert not (workspace.folder / "outputs").exists()


@pytest.mark.parametrize("what", ["training", "data", "startup"])
def test_help_is_there_at_once(workspace: Workspace, what):
    done = workspace.module("gpt2.main", "benchmark", what, "--help")
    assert done.returncode == 0
    assert "json=FILE" in done.stdout
