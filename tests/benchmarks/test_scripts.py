"""The scripts of experiments/performance. Speed is not tested."""

import json
import runpy

import pytest

from tests import warm
from tests.conftest import ROOT, Workspace

SCRIPTS = ROOT / "experiments" / "performance"
SHAPE = ["model.num_layers=1", "model.d_model=32", "model.d_ff=64", "model.vocab_size=300", "model.context_length=16"]
TRAINING = ["model=gpt2_nano", *SHAPE, "train.batch_size=2", "train.num_workers=0", "train.precision=fp32"]


def run_script(workspace: Workspace, name: str, *arguments: str) -> dict:
    """Run a script in a workspace. Returns the JSON that it writes."""
    done = warm.run([str(SCRIPTS / name), *arguments], workspace.folder, workspace.environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((workspace.folder / "result.json").read_text())


@pytest.mark.slow
def test_startup(workspace: Workspace):
    result = run_script(workspace, "startup.py", "--repetitions", "1", "--json", "result.json")
    seconds = {row["what"]: row["seconds"] for row in result["results"]}
    assert list(seconds)[-2:] == ["train.py, one step: to its line", "train.py, one step: to the end"]
    assert seconds["train.py, one step: to its line"] < seconds["train.py, one step: to the end"]
    assert not (workspace.folder / "outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_tokenization(workspace: Workspace, tokenizer):
    text = (workspace.folder / "corpus.txt").read_text()
    (workspace.folder / "corpus.txt").write_text(f"{text}<|endoftext|> é\n\n")
    data = ["data=text", "data.files=[corpus.txt]", f"data.tokenizer={tokenizer}", "data.vocab_size=300"]
    cached = sorted((workspace.folder / "cache").rglob("*"))
    done = workspace.module("gpt2.main", "benchmark", "data", "repetitions=2", *data, "json=result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((workspace.folder / "result.json").read_text())
    assert result["same_tokens"] is True
    theirs, *ours = result["results"]
    assert [row["contestant"].split(", ")[-1] for row in ours] == ["threads: 1", "threads: 4"]
    for row in ours:
        assert row["ratio"] == pytest.approx(theirs["seconds"] / row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(result["tokens"] / row["seconds"])
        assert row["megabytes_per_second"] == pytest.approx(result["bytes"] / row["seconds"] / 1e6)
    assert sorted((workspace.folder / "cache").rglob("*")) == cached  # nothing is prepared for training


@pytest.mark.slow
def test_memory(workspace: Workspace):
    result = run_script(workspace, "memory.py", *TRAINING, "json=result.json")
    assert [row["contestant"] for row in result["results"]] == ["transformers, fp32", "gpt2, fp32"]
    assert all(100 << 20 < row["peak_memory_bytes"] < 8 << 30 for row in result["results"])


@pytest.mark.slow
def test_overhead(workspace: Workspace):
    result = run_script(workspace, "overhead.py", "--steps", "4", *TRAINING, "repetitions=2", "json=result.json")
    overhead = result["overhead"]
    assert overhead["overhead"] == pytest.approx(overhead["train_step_seconds"] / overhead["bare_step_seconds"] - 1)
    assert 0 < overhead["waiting_for_data"] < 1
    assert (overhead["steps"], len(overhead["overhead_of_each"])) == (4, 2)


@pytest.mark.slow
def test_levers(workspace: Workspace):
    once = ["repetitions=1", "warmup=1", "json=result.json"]
    result = run_script(workspace, "levers.py", *TRAINING, "train.compile=false", *once)
    seconds = result["step_seconds"]["fp32"]
    assert {"all", "PyTorch's attention", "AdamW in a loop"} <= seconds.keys()
    assert "compiled" not in seconds
    assert all(len(each) == 1 for each in seconds.values())


@pytest.mark.parametrize(
    ("name", "page"), [("summary", "docs/performance.md"), ("tables", "experiments/performance/README.md")]
)
def test_pages_have_the_tables_of_the_recorded_files(name, page):
    assert runpy.run_path(str(SCRIPTS / "table.py"))[name]() in (ROOT / page).read_text()


def test_ratio_to_the_best_of_nanogpt_in_the_same_precision():
    seconds = {
        "nanoGPT, fp32": 4,
        "nanoGPT, fused, fp32": 3,
        "nanoGPT, fused, bf16": 2,
        "gpt2, fp32": 1.5,
        "gpt2, bf16": 1,
    }
    rows = [
        {"contestant": name, "step_seconds": value, "step_seconds_of_each": [value], "first_step_seconds": 9}
        for name, value in seconds.items()
    ]
    *_, fp32, bf16 = runpy.run_path(str(SCRIPTS / "table.py"))["table"](rows).splitlines()
    assert fp32 == "| this repository, fp32 | 1,500 | 1,500 - 1,500 | 2.67 | 2.00 | 9.0 |"
    assert bf16 == "| this repository, bf16 | 1,000 | 1,000 - 1,000 | 4.00 | 2.00 | 9.0 |"
