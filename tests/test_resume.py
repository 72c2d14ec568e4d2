"""Resuming a run from the command line: changed settings, concurrent writers, damaged files."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.data import corpus
from gpt2.tracking.tracker import read_metrics
from tests import warm
from tests.conftest import TEXT, TINY, Workspace
from tests.test_scripts import wait_for

AUTO = [*TINY, "train.auto_resume=true"]
LONG = ["train.max_steps=100000", "train.max_epochs=100000", "train.log_every=5"]


def steps(run: Path, key: str = "train/loss") -> list[int]:
    return [record["step"] for record in read_metrics(run / "metrics.jsonl") if key in record]


def start(workspace: Workspace, *arguments: str) -> warm.Process:
    return workspace.start("train.py", *arguments, errors_in_output=True)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[checkpoint._read_header(path)[1]["model/final_norm.bias"].begin] ^= 1
    path.unlink()  # its other names keep the intact file
    path.write_bytes(content)


def test_auto_resume_continues_and_stops_when_finished(workspace: Workspace):
    first = start(workspace, *AUTO, *LONG)
    metrics = workspace.folder / "outputs/runs/gpt2"
    wait_for(lambda: any(path.read_text().count("\n") > 3 for path in metrics.glob("*/metrics.jsonl")))
    first.send_signal(signal.SIGUSR1)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGUSR1
    (run,) = workspace.runs()
    assert f"train.py resume={run.relative_to(workspace.folder)}" in output
    stopped_at = checkpoint.read_record(run / "checkpoints" / run_folder.LAST)["progress"]["step"]

    again = start(workspace, *AUTO, *LONG)
    wait_for(lambda: steps(run)[-1] > stopped_at + 10)
    again.send_signal(signal.SIGTERM)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 128 + signal.SIGTERM
    assert f"Resuming after step {stopped_at:,}" in output
    assert steps(run) == sorted(set(steps(run)))
    assert workspace.runs() == [run]

    done = workspace.run("train.py", *AUTO)  # another command is another run
    assert len(workspace.runs()) == 2
    assert "Resuming" not in done.stdout
    other = max(workspace.runs(), key=lambda path: path.stat().st_mtime)
    before = (other / "checkpoints" / run_folder.LAST).read_bytes()
    assert "Resuming after step 8" in workspace.run("train.py", *AUTO).stdout
    assert (other / "checkpoints" / run_folder.LAST).read_bytes() == before
    assert steps(other, "val/loss") == [4, 8]


def test_run_killed_before_first_checkpoint_restarts(workspace: Workspace):
    running = start(workspace, *AUTO, *LONG, "train.save_every=99999", "train.eval_every=99999", "wandb=offline")
    metrics = workspace.folder / "outputs/runs/gpt2"
    wait_for(lambda: any(path.read_text().count("\n") > 3 for path in metrics.glob("*/metrics.jsonl")))
    running.kill()
    running.communicate()
    (run,) = workspace.runs()
    wandb_id = (run / "wandb_id").read_text()
    command = [*AUTO, *LONG, "train.save_every=99999", "train.eval_every=99999", "wandb=offline"]
    again = start(workspace, *command)
    wait_for(lambda: steps(run)[:1] == [1] and (run / ".lock").read_text().startswith(f"process {again.pid} "))
    again.send_signal(signal.SIGINT)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 130
    assert "Resuming after" not in output
    assert steps(run) == sorted(set(steps(run)))
    assert (run / "wandb_id").read_text() == wandb_id


def test_damaged_files_do_not_prevent_resuming(workspace: Workspace):
    workspace.run("train.py", *AUTO)
    (run,) = workspace.runs()
    (run / ".hydra" / "overrides.yaml").write_bytes(b"\0\0\0")  # as after a power failure
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n5\n{"tokens": 3}\n{"step": 8, "tok')
    (run / "backup").mkdir()
    shutil.copy(run / "checkpoints" / "step_00000004.pth", run / "backup")
    longer = workspace.run("train.py", f"resume={run}", "train.max_steps=12")
    assert "metrics.jsonl: 4 damaged lines are removed" in longer.stdout
    assert "Resuming after step 8" in longer.stdout
    finished = workspace.run("train.py", *AUTO).stdout  # the longer limit is part of the run now
    assert "Resuming after step 12: nothing is left to train (train.max_steps=12 reached); a larger limit" in finished
    assert steps(run, "val/loss") == [4, 8, 12]
    assert (run / "backup").is_dir()


def test_lost_records_are_named_and_the_run_continues(workspace: Workspace):
    workspace.run("train.py", *TINY)
    (run,) = workspace.runs()
    samples = (run / "samples.md").read_text()
    copies = [Path(shutil.copytree(run, run.with_name(name))) for name in ("deleted", "a line", "both")]

    def resumed(copy: Path, steps: int = 10) -> str:
        return workspace.run("train.py", f"resume='{copy}'", f"train.max_steps={steps}").stdout

    for path in (copies[0] / "metrics.jsonl", copies[2] / "metrics.jsonl", copies[2] / "samples.md"):
        path.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copies[1] / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] != 4))
    all_lost = "lost: training records of steps 1, 2, 4, ... 8; evaluations of steps 4, 8"
    assert f"metrics.jsonl or samples.md was changed; {all_lost}. The run continues" in resumed(copies[0])
    assert "lost: training records of steps 4; evaluations of steps 4. The run" in resumed(copies[1])
    assert f"{all_lost}; samples of steps 4, 8." in resumed(copies[2])
    assert all((copy / "samples.md").read_text().startswith(samples) for copy in copies[:2])
    assert "lost: " not in resumed(copies[2], 12)  # it is reported once
    assert [steps(copy)[-1] for copy in copies] == [10, 10, 12]
    assert steps(copies[1]) == [1, 2, 6, 8, 10]

    compared = workspace.module("gpt2.main", "compare", "outputs/runs").stdout
    assert compared.startswith("4 runs in outputs/runs")
    for name in ("metrics.jsonl", "samples.md"):
        (run / name).unlink()
        (run / name).mkdir()
        assert f"{name}: Is a directory" in workspace.run("train.py", f"resume={run}", expect=2).stderr
        (run / name).rmdir()


def test_other_tokens_are_refused_though_the_settings_are_the_same(workspace: Workspace):
    workspace.run("train.py", *TINY)
    (cached,) = workspace.folder.glob("cache/gpt2/tokens/*/train.bin")
    content = bytearray(cached.read_bytes())
    cached.write_bytes(bytes(len(content)))
    mended = workspace.run("train.py", "resume=latest", "train.max_steps=9")
    assert "is damaged (wrong checksum of train.bin), the corpus is tokenized again" in mended.stdout
    assert cached.read_bytes() == content

    about = json.loads((cached.parent / "about.json").read_text())  # as by another version of the tokenizer
    content[10] ^= 1
    cached.write_bytes(content)
    sums = {**about["sha256"], "train.bin": hashlib.sha256(content).hexdigest()}
    del about["checksum"]
    about |= {"sha256": sums, "fingerprint": corpus._sum_of(sums)[:16]}
    (cached.parent / "about.json").write_text(json.dumps({**about, "checksum": corpus._sum_of(about)}))
    refused = workspace.run("train.py", "resume=latest", "train.max_steps=10", expect=2)
    assert "was trained on other data (fingerprint " in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["resume=latest", "hydra.run.dir=elsewhere"],
            "hydra.run.dir: a resumed run writes to its own folder",
        ),
        ([*AUTO, "hydra.run.dir=runs/${name}"], "hydra.run.dir: train.auto_resume needs a plain name"),
        (["resume=nowhere"], "resume: nowhere is no run folder with a checkpoint in it"),
        (["resume=latest", "-m", "train.seed=1,2"], "resume=latest: one run at a time, without -m"),
        (["train.auto_resume=true,false", "-m"], "train.auto_resume=true,false: one value for all runs"),
        ([*AUTO, "-m", "hydra.sweep.dir=a/${now:%H}"], "hydra.sweep.dir: train.auto_resume needs a plain name"),
    ],
)
def test_impossible_resumption_is_refused(trained: Workspace, arguments, message):
    assert message in trained.run("train.py", *arguments, expect=2).stderr


def test_run_survives_closed_terminal(workspace: Workspace):
    ours, theirs = os.openpty()
    workspace.environment["TERM"] = "dumb"
    options = [*TINY, *LONG, "train.max_steps=300"]
    running = workspace.start("train.py", *options, start_new_session=True, terminal=theirs)
    os.close(theirs)
    wait_for(
        lambda: any(path.read_text().count("\n") > 3 for path in workspace.folder.glob("outputs/runs/*/*/m*.jsonl"))
    )
    os.close(ours)
    assert running.wait(timeout=60) == 0
    assert steps(workspace.runs()[0], "val/loss")[-1] == 300


def test_second_process_is_refused(workspace: Workspace):
    running = start(workspace, *AUTO, *LONG, "train.save_every=5")
    wait_for(lambda: list(workspace.folder.glob("outputs/runs/*/*/checkpoints/last.pth")))
    (run,) = workspace.runs()
    before = {path.name: path.read_bytes() for path in (run / ".hydra").iterdir()}
    into_it = [*TINY, "train.seed=9", f"hydra.run.dir='{run}'"]
    for arguments in (["resume=latest"], [*AUTO, *LONG, "train.save_every=5"], into_it):
        refused = workspace.run("train.py", *arguments, expect=2)
        assert f"is being written by process {running.pid} on " in refused.stderr
        assert "Resuming" not in refused.stdout
    running.kill()
    running.communicate()
    assert "already holds a run; resume it" in workspace.run("train.py", *into_it, expect=2).stderr
    assert {path.name: path.read_bytes() for path in (run / ".hydra").iterdir()} == before
    workspace.run("train.py", "resume=latest", f"train.max_steps={steps(run)[-1] + 5}")


def test_damaged_checkpoint_is_replaced_by_previous(workspace: Workspace):
    workspace.run("train.py", *TINY, "train.max_steps=6", "train.save_every=2")
    (run,) = workspace.runs()
    newest, before = run_folder.newest_first(run / "checkpoints")[:2]
    damage(newest)
    (run / "checkpoints" / run_folder.LAST).unlink()
    (run / "checkpoints" / run_folder.BEST).unlink()
    written = workspace.run("generate.py", "prompt=def f")
    assert f"{newest.relative_to(workspace.folder)} is damaged: wrong checksum of " in written.stderr
    assert f"Using instead: {before.relative_to(workspace.folder)}" in written.stderr
    resumed = workspace.run("train.py", "resume=latest")
    assert f"{newest.name} is damaged" in resumed.stdout
    assert f"{newest.name} is damaged" in (run / "train.log").read_text()
    assert "Resuming after step 4" in resumed.stdout
    assert steps(run, "val/loss") == [4, 6]
    for path in (run / "checkpoints").iterdir():
        checkpoint.verify(path)
        damage(path)
    refused = workspace.run("train.py", "resume=latest", expect=2)
    assert len(refused.stderr.splitlines()) == 4


@pytest.mark.slow
def test_changed_settings_are_refused_or_listed(workspace: Workspace):
    options = ["data.tokenizer=train", "data.vocab_size=270"]
    workspace.run("train.py", *TINY, *options)
    (run,) = workspace.runs()
    changes = {
        "train.batch_size=2": "train.batch_size: 2 was requested, but the run has 4",
        "train.accumulation_steps=3": "train.accumulation_steps: 3 was requested, but the run has 1",
        "train.seed=5": "train.seed: 5 was requested, but the run has 1",
        "train.weight_decay=0.5": "train.weight_decay: 0.5 was requested, but the run has 0.01",
        "model.dropout=0.3": "model.dropout: 0.3 was requested, but the run has 0.0",
        "data.validation_fraction=0.2": "data.validation_fraction: 0.2 was requested, but the run has 0.1",
        "train.init_from=other": "train.init_from: other was requested, but the run has None; it is for a new run",
        "name=other": "name: other was requested, but the run has gpt2",
        "inference=greedy": "inference.do_sample: False was requested, but the run has True",
        "experiment=quickstart": "model.d_model: 128 was requested, but the run has 32",
    }
    refused = workspace.run("train.py", "resume=latest", *changes, expect=2)
    assert not [message for message in changes.values() if message not in refused.stderr], refused.stderr
    same = ["data=text", "train.batch_size=4", *options]
    resumed = workspace.run("train.py", "resume=latest", *same, "train.max_steps=9").stdout
    assert "Changed: train.max_steps is 9, it was 8" in resumed
    assert "Changed: train.num_workers" not in resumed  # such settings are not part of the run

    accepted = ["train.batch_size=2", "train.seed=5", "model.dropout=0.3", "data.validation_fraction=0.2"]
    done = workspace.run("train.py", "resume=latest", "train.max_steps=12", *accepted, "resume_changes=true")
    for message in ("train.batch_size is 2, it was 4", "train.seed is 5, it was 1", "model.dropout is 0.3, it was 0.0"):
        assert f"Changed: {message}" in done.stdout
    assert "Changed: data is" in done.stdout
    assert "Resuming after step 9" in done.stdout
    saved = checkpoint.read_record(run / "checkpoints" / run_folder.LAST)["run"]
    assert (saved["train"]["batch_size"], saved["model"]["dropout"], saved["resume_changes"]) == (2, 0.3, True)
    best = checkpoint.read_record(run / "checkpoints" / run_folder.BEST)["progress"]
    assert best["step"] > 9, "losses on the data of before do not count"
    longer = workspace.run("train.py", "resume=latest", "train.max_steps=14").stdout
    changes = [line.split("Changed: ")[1] for line in longer.splitlines() if "Changed: " in line]
    assert [change.split(" is ")[0] for change in changes] == ["train.max_steps", "the learning rate of the next step"]

    (workspace.folder / "corpus.txt").rename(workspace.folder / "moved.txt")
    moved = ["resume=latest", "data.files=[moved.txt]", "train.max_steps=15"]
    assert "Changed: data" not in workspace.run("train.py", *moved).stdout
    (workspace.folder / "moved.txt").write_text("another text " * 999)
    assert "was trained on other data" in workspace.run("train.py", *moved, "train.max_steps=16", expect=2).stderr
    (workspace.folder / "moved.txt").write_text(TEXT.replace("def", "fed"))  # as many tokens, but others
    learned = workspace.run("train.py", *moved, "train.max_steps=16", "resume_changes=true", expect=2).stderr
    assert "has another tokenizer than the data (data.tokenizer=train learns a new one from a changed text)" in learned
    (workspace.folder / "others.txt").write_text("another text " * 999)
    others = workspace.run("train.py", *moved, "data.files=[others.txt]", "train.max_steps=16", "resume_changes=true")
    assert "Changed: data is" in others.stdout, "with the tokenizer of before"
    file = workspace.run("train.py", f"resume={run / 'checkpoints' / run_folder.LAST}", expect=2).stderr
    assert file.endswith(
        "; a run is resumed by its folder, and train.init_from=FILE starts a new run from a checkpoint\n"
    )


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("nan_gradient@6", 3, "step 6 (batch 6 of epoch 1): the gradient of final_norm.weight is not finite"),
        ("out_of_memory@6", 1, "train.batch_size=2 train.accumulation_steps=2 makes the same steps in less memory"),
    ],
)
def test_failure_is_one_line_with_resume_command(workspace: Workspace, fault, code, message):
    workspace.environment["GPT2_FAULT"] = fault
    ended = workspace.run("train.py", *TINY, expect=code)
    (line,) = ended.stderr.splitlines()
    assert message in line
    assert "Step 4 is saved, resume with: python train.py resume=outputs/runs/gpt2/" in line
    del workspace.environment["GPT2_FAULT"]
    arguments = line.split("python train.py ")[1].split()
    assert "Resuming after step 4" in workspace.run("train.py", *arguments).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_during_preparation_leaves_nothing(workspace: Workspace, number):
    (workspace.folder / "corpus.txt").write_text("some more words to be counted " * 400_000)
    running = start(workspace, *TINY, "data.tokenizer=train", "data.vocab_size=300")
    wait_for(lambda: list(workspace.folder.glob("cache/gpt2/tokens/*.unfinished")))
    os.kill(running.pid, number)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 128 + number
    assert "Traceback" not in output
    assert not list(workspace.folder.glob("cache/gpt2/tokens/*.unfinished"))
    assert workspace.runs() == []


def test_text_shorter_than_a_block_is_noted(workspace: Workspace):
    (workspace.folder / "corpus.txt").write_text("a" * 25)
    noted = workspace.run("train.py", *TINY)
    assert "the train split has only 23 tokens, less than one block of data.max_length=32" in noted.stdout
