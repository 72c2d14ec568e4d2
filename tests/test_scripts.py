"""The scripts as a user runs them, on a small text and a small model."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.tracking.tracker import read_metrics
from tests.conftest import ROOT, SHARED, TINY, Workspace


def test_files_of_a_run_folder(trained):
    (run,) = trained.runs()
    assert sorted(path.name for path in run.iterdir()) == [
        *(".hydra", ".lock", "checkpoints", "curves.png", "metrics.jsonl"),
        *("run.json", "samples.md", "train.log", "wandb_id"),
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *(run_folder.BEST, run_folder.LAST, "step_00000004.pth", "step_00000008.pth"),
    ]
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 4, 6, 8]
    assert [r["step"] for r in records if "val/loss" in r] == [4, 8]
    training = next(r for r in records if "train/loss" in r)
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/mfu"} <= training.keys()
    assert all({"step", "tokens", "seconds"} <= r.keys() for r in records)
    assert all(r["tokens"] == r["step"] * 4 * 32 for r in records)


def test_nothing_is_written_outside_outputs(trained):
    (wandb_run,) = (trained.folder / "outputs" / "wandb").glob("offline-run-*")
    assert {path.name for path in trained.folder.iterdir()} == {"corpus.txt", "outputs", "cache", "home"}
    assert {path.name for path in (trained.folder / "outputs").iterdir()} == {"runs", "wandb"}
    assert (trained.runs()[0] / "wandb_id").read_text() in wandb_run.name


def test_output_of_a_training_run(trained):
    (run,) = trained.runs()
    for expected in (
        *(
            "parameters: 1 layer, width 32",
            "8 steps of 128 tokens",
            "Cost    1,024 tokens and ",
            "step 8/8  loss ",
            "validation loss",
            "perplexity",
        ),
        *("    | def f", "Stopped after step 8", "train.max_steps=8 reached", "wandb sync"),
        ", 4 of 18 batches  (",
        f"everything is in {run.relative_to(trained.folder)}",
    ):
        assert expected in trained.output


def test_suggested_command_works(trained):
    (line,) = (line for line in trained.output.splitlines() if line.startswith("Now try:"))
    python, script, *arguments = shlex.split(line.removeprefix("Now try:"))
    assert (python, script, arguments) == ("python", "generate.py", ["prompt=def f"])
    done = trained.run_anew(script, *arguments)
    assert done.stdout.startswith("def f")
    assert len(done.stdout) > len("def f\n")
    assert str(trained.runs()[0].relative_to(trained.folder) / "checkpoints" / run_folder.BEST) in done.stderr


def test_prompt_is_verbatim_and_seed_reproduces_text(trained):
    prompt = " a=b, [c] {d} 'e' \"f\" ${g} \\ 🦜\n~h"
    texts = [trained.run("generate.py", f"prompt={prompt}", "inference.seed=3").stdout for _ in range(2)]
    assert texts[0].startswith(prompt)
    assert texts[0] == texts[1]


def test_generate_handles_closed_pipe_and_writes_no_files(trained, tmp_path):
    model = trained.runs()[0] / "checkpoints" / run_folder.BEST
    command = shlex.join(
        trained.command("generate.py", "prompt=x", "inference.max_new_tokens=200", f"checkpoint='{model}'")
    )
    done = subprocess.run(
        f"{command} | head -c 1",
        shell=True,
        cwd=tmp_path,
        env=trained.environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "x"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_standard_input_is_read_like_a_file_of_prompts(trained):
    command = trained.command("generate.py", "inference.max_new_tokens=1", "inference.seed=1", "quiet=true")
    environment = {**trained.environment, "PYTHONIOENCODING": "utf-8:strict"}
    streams = {"cwd": trained.folder, "env": environment, "capture_output": True}
    done = subprocess.run(command, input="\ufeffdéf\r\n  f\r\n".encode(), **streams)
    assert done.stdout.startswith("déf\n  f".encode()), done.stderr
    assert b"\r" not in done.stdout
    done = subprocess.run(command, input=b"def\xe9 f", **streams)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().strip() == "error: prompt: standard input is not UTF-8 text at byte 3"


def test_batched_prompts_match_single_prompts(trained, tmp_path):
    records = [{"prompt": "def f", "id": 1}, {"prompt": "é\n🦜" * 9, "id": "x"}, {"prompt": ""}, {"prompt": "?"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["inference.seed=3", "inference.num_return_sequences=2", "quiet=true"]
    done = trained.run("generate.py", f"prompts_file='{tmp_path}/prompts.jsonl'", "batch_size=4", *options)
    assert done.stderr == ""
    lines = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert [(line["prompt"], line.get("id")) for line in lines] == [
        (record["prompt"], record.get("id")) for record in records for _ in range(2)
    ]
    for n, record in enumerate(records):
        alone = trained.run("generate.py", f"prompt={record['prompt']}", *options).stdout
        texts = [record["prompt"] + line["text"] + "\n" for line in lines[2 * n : 2 * n + 2]]
        assert ("-" * 80 + "\n").join(texts) == alone
    assert all(line["tokens"] == 12 and line["log_probability"] < 0 for line in lines)


def test_output_errors_without_traceback(trained, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"prompt": "\\ud800"}\n')
    command = shlex.join(trained.command("generate.py", "inference.max_new_tokens=5"))

    def run(rest: str, **environment: str) -> subprocess.CompletedProcess:
        environment = {**trained.environment, **environment}
        return subprocess.run(
            f"{command} {rest}", shell=True, cwd=trained.folder, env=environment, capture_output=True, text=True
        )

    assert json.loads(run(f"prompts_file={tmp_path}/odd.jsonl").stdout)["prompt"] == "?"
    assert run("prompt=é", PYTHONIOENCODING="ascii").stdout.startswith("?")
    closed = run("<&-")
    assert (closed.returncode, closed.stderr) == (2, "error: prompt: missing, and standard input is closed\n")
    full = run("prompt=x > /dev/full")
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1] == "error: No space left on device"


@pytest.mark.parametrize("form", ["precision=bf16", "quantization=int8", "quantization=int4"])
def test_generation_in_other_formats(trained, form):
    done = trained.run("generate.py", "prompt=def f", "inference=greedy", f"inference.{form}")
    assert done.stdout.startswith("def f")
    assert f"on cpu in {form.split('=')[1]}\n" in done.stderr


def test_generate_imports_no_training_libraries(trained):
    script = f"""
import runpy, sys
sys.argv[1:] = ["prompt=x"]
runpy.run_path({str(ROOT / "generate.py")!r}, run_name="__main__")
print({{"datasets", "wandb", "optuna", "matplotlib", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=trained.folder, env=trained.environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_simultaneous_runs_get_separate_folders(workspace: Workspace):
    started = [workspace.start("train.py", *TINY, "train.max_steps=1") for _ in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert len(workspace.runs()) == 2
    assert len(list(workspace.folder.glob("cache/gpt2/tokens/*/train.bin"))) == 1


def wait_for(condition, seconds: float = 300) -> None:
    """Poll a condition, with pauses that are longer where a poll takes more CPU time, as with a database."""
    deadline, polled = time.monotonic() + seconds, time.process_time()
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(min(0.2, max(0.02, 4 * (time.process_time() - polled))))
        polled = time.process_time()


@pytest.mark.slow
def test_interrupted_run_matches_uninterrupted(workspace: Workspace):
    options = [*TINY, "train.max_steps=60", "train.eval_every=20", "model.dropout=0.1"]
    workspace.run("train.py", *options, "name=straight")
    (straight,) = workspace.runs()

    workspace.environment["GPT2_FAULT"] = "slow@1-59"
    running = workspace.start("train.py", *options, "name=interrupted")
    metrics = workspace.folder / "outputs/runs/interrupted"
    wait_for(lambda: any(path.read_text().count("\n") > 3 for path in metrics.glob("*/metrics.jsonl")))
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 128 + signal.SIGINT
    (line,) = (line for line in output.splitlines() if line.startswith("Resume with:"))

    _, script, *arguments = shlex.split(line.removeprefix("Resume with:"))
    del workspace.environment["GPT2_FAULT"]
    resumed = workspace.run(script, *arguments)
    assert "Resuming after step" in resumed.stdout
    (run,) = metrics.iterdir()
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [
        r["step"] for r in read_metrics(straight / "metrics.jsonl")
    ]
    one, other = (checkpoint.read_tensors(path / "checkpoints" / run_folder.LAST) for path in (straight, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.stdout.count("W&B") == 0


def test_resumed_run_may_be_longer_but_not_different(workspace: Workspace):
    workspace.run("train.py", *TINY, r"sample_prompt='\${HOME}'")  # the text ${HOME}
    (run,) = workspace.runs()
    before = (run / ".hydra" / "overrides.yaml").read_text()
    refused = workspace.run("train.py", "resume=latest", "train.learning_rate=1", "model=gpt2", expect=2)
    assert "train.learning_rate: 1.0 was requested, but the run has 0.0003" in refused.stderr
    assert "model.d_model: 768 was requested, but the run has 32" in refused.stderr
    assert len(refused.stderr.splitlines()) == 9  # what else model=gpt2 would change

    workspace.run("train.py", f"resume={run}", "train.max_steps=12")
    assert workspace.runs() == [run]
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "val/loss" in r] == [4, 8, 12]
    assert (run / ".hydra" / "overrides.yaml").read_text() == before
    assert "Stopped after step 12" in workspace.run("train.py", "resume=latest").stdout  # longer stays longer
    assert (run / "samples.md").read_text().count("${HOME}") == 3


def test_model_larger_than_the_memory_is_refused(workspace: Workspace):
    refused = workspace.run("train.py", *TINY, "model.d_model=400000", expect=2)
    assert "tokens takes 2,641 GB, this machine has" in refused.stderr
    assert workspace.runs() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_group_saves_the_run(workspace: Workspace, number):
    """The data workers get the signal too, as from Ctrl-C on a terminal, `timeout` or a scheduler."""
    options = ["train.max_steps=100000", "train.max_epochs=100000", "train.log_every=5", "train.num_workers=2"]
    running = workspace.start("train.py", *TINY, *options, start_new_session=True)
    wait_for(
        lambda: any(path.read_text().count("\n") > 3 for path in workspace.folder.glob("outputs/runs/*/*/m*.jsonl"))
    )
    os.killpg(running.pid, number)
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 128 + number
    assert "Resume with:" in output
    assert checkpoint.read_record(workspace.runs()[0] / "checkpoints" / run_folder.LAST)["progress"]["step"] > 0


# Slow tests


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "datasets/tinyshakespeare").is_dir(), reason="Tiny Shakespeare is not here")
def test_shakespeare_loss_matches_nanogpt(workspace: Workspace):
    """nanoGPT with this model and text: 1.893 nats a character over the whole validation split, in 2,000 steps
    (experiments/shakespeare_char/nanogpt.json).

    Muon reaches it in 230. experiments/shakespeare_char has the whole run with AdamW and nanoGPT's own schedule, 1.887.
    """
    corpus = SHARED / "datasets/tinyshakespeare/input.txt"
    here = [f"data.files=[{corpus}]", "wandb=off", "inference.max_new_tokens=20"]
    workspace.run("train.py", "experiment=shakespeare_fast", *here)
    losses = [r["val/loss"] for r in read_metrics(workspace.runs()[0] / "metrics.jsonl") if "val/loss" in r]
    assert losses[-1] <= 1.90


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "datasets/wikitext").is_dir(), reason="the WikiText sample is not here")
def test_gpt2_trains_on_a_cpu(workspace: Workspace):
    """With two of its twelve layers: the others would only take time."""
    done = workspace.run(
        *("train.py", "model=gpt2", "model.num_layers=2", "data=wikitext2"),
        f"data.dataset_name={SHARED / 'datasets/wikitext'}",
        *("data.dataset_config=wikitext-2-sample", f"data.tokenizer={SHARED / 'tokenizers/gpt2'}"),
        "inference.max_new_tokens=2",
        *("train.max_steps=1", "train.batch_size=1", "data.max_length=64", "train.eval_batches=1", "wandb=off"),
    )
    assert "Model   53,561,088 parameters" in done.stdout
    assert "train.max_steps=1 reached" in done.stdout
