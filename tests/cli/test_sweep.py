"""Sweeps whose runs fail: the others continue, each error names its run, and the exit code is that of the failures."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from gpt2.cli.sweep import _reasons, named
from gpt2.errors import DivergenceError, UserError
from tests.cli.test_sweeper import pids_in
from tests.conftest import TINY, Workspace
from tests.test_scripts import wait_for

TWO_STEPS = [*TINY, "train.max_steps=2", "train.warmup_steps=1", "train.log_every=1", "name=sweep"]
NO_TEXT = "data: there is no text in the train split"


def about(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def sweep_of(workspace: Workspace) -> Path:
    (folder,) = workspace.folder.glob("outputs/sweeps/sweep/*")
    return folder


def test_failed_runs_are_named_and_the_others_continue(workspace: Workspace):
    (workspace.folder / "short.txt").write_text("a")
    over = ["data.files=[short.txt],[corpus.txt]", "train.learning_rate=1e30,1e-3"]
    done = workspace.run("train.py", "-m", *TWO_STEPS, *over, expect=1)  # the codes are 2 and 3
    *errors, summary = done.stderr.splitlines()
    assert errors[0] == f"error: run 0 (data.files=[short.txt] train.learning_rate=1e+30): {NO_TEXT}"
    assert errors[1] == f"error: run 1 (data.files=[short.txt] train.learning_rate=0.001): {NO_TEXT}"
    assert errors[2].startswith("error: run 2 (data.files=[corpus.txt] train.learning_rate=1e+30): step 2 (batch 2 of")
    assert summary.startswith(f"error: 3 of 4 runs failed: 0, 1 ({NO_TEXT}); 2 (step 2 (batch 2 of epoch 1): the loss")
    sweep = sweep_of(workspace)
    ends = [(end["state"], end["exit_code"]) for end in (about(sweep / str(number)) for number in range(4))]
    assert ends == [("failed", 2), ("failed", 2), ("diverged", 3), ("finished", 0)]
    assert about(sweep / "0")["reason"] == f"UserError: {NO_TEXT}"
    assert about(sweep / "0")["ended"]
    assert f"error: {NO_TEXT}" in (sweep / "0" / "train.log").read_text()
    assert (sweep / "3" / "curves.png").is_file()


def test_bug_of_a_run_is_a_line_and_a_traceback_in_its_log(workspace: Workspace):
    workspace.environment["GPT2_FAULT"] = "exception@1"
    done = workspace.run("train.py", "-m", *TWO_STEPS, "train.seed=1,2", "train.auto_resume=true", expect=1)
    sweep = sweep_of(workspace)
    log = sweep.relative_to(workspace.folder) / "0" / "train.log"
    assert done.stderr.splitlines()[0] == (
        f"error: run 0 (train.seed=1): RuntimeError: on purpose; the traceback is in {log}"
    )
    assert done.stderr.splitlines()[2] == "error: 2 of 2 runs failed: 0, 1 (RuntimeError: on purpose)"
    assert "Traceback (most recent call last)" in (workspace.folder / log).read_text()
    del workspace.environment["GPT2_FAULT"]
    workspace.run("train.py", "-m", *TWO_STEPS, "train.seed=1,2", "train.auto_resume=true")
    assert [about(sweep / number)["state"] for number in "01"] == ["finished", "finished"]
    again = workspace.run("train.py", "-m", *TWO_STEPS, "train.seed=1,2", f"hydra.sweep.dir={sweep}", expect=2)
    assert "error: 2 of 2 runs failed: 0 (" in again.stderr
    assert [about(sweep / number)["state"] for number in "01"] == ["finished", "finished"]


@pytest.mark.parametrize("folder", ["same", "'seed_${train.seed}'", "''"])
def test_runs_that_would_share_a_folder_are_refused(workspace: Workspace, folder):
    over = ["train.seed=1,2", "train.beta2=0.9,0.99", f"hydra.sweep.subdir={folder}"]
    refused = workspace.run("train.py", "-m", *TWO_STEPS, *over, expect=2)
    (line,) = refused.stderr.splitlines()
    assert re.match(r"error: hydra\.sweep\.subdir: runs 0 and 1 would both write to outputs/sweeps/sweep/", line)
    assert not (workspace.folder / "outputs").exists()


def test_folders_may_be_named_by_swept_values_and_choices_keep_their_quotes(workspace: Workspace):
    over = ["train.seed=choice(1,2)", "sample_prompt=choice(\"it's, 'x'\",b)", "train.eval_every=9"]
    folder = ["hydra.sweep.subdir='seed_${train.seed}_${hydra.job.num}'", "hydra.sweeper.max_batch_size=3"]
    workspace.run("train.py", "-m", *TWO_STEPS, *over, *folder)
    runs = ["seed_1_0", "seed_1_1", "seed_2_2", "seed_2_3"]
    assert {path.name for path in sweep_of(workspace).iterdir()} == {"multirun.yaml", *runs}
    prompts = [about(sweep_of(workspace) / run)["config"]["sample_prompt"] for run in runs]
    assert prompts == ["it's, 'x'", "b"] * 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size: 0 is not a whole number of at least 1"),
        (["hydra/launcher=joblib", "hydra.launcher.backend=foo"], "hydra.launcher: no run can start: Unsupported Jobl"),
    ],
)
def test_settings_with_which_no_run_can_start_are_named(workspace: Workspace, settings, problem):
    refused = workspace.run("train.py", "-m", *TWO_STEPS, "train.seed=1,2", *settings, expect=2)
    assert refused.stderr.startswith(f"error: {problem}")


def test_name_of_a_run_is_short_and_has_no_secrets():
    overrides = ["data.files=[a]", "+train.seed=1", "wandb.entity=https://me:secret@host"]
    error = named(DivergenceError("one", "two"), 3, overrides, {"train.seed", "wandb.entity"})
    assert error.problems[0] == "run 3 (+train.seed=1 wandb.entity=https://***@host): one"
    assert error.problems[1].endswith("): two")
    assert error.exit_code == 3
    assert named(error, 0, overrides, set()).problems[0].startswith("run 0: run 3 (")
    assert len(named(UserError("x"), 0, [f"data.files=[{'a' * 999}]"], {"data.files"}).problems[0]) < 220


def test_reasons_are_grouped_and_without_advice():
    failed = {0: UserError("this; do that"), 4: UserError("that"), 7: UserError("this; do something else", "more")}
    assert _reasons(failed) == "0, 7 (this); 4 (that)"


# ---------------------------------------------------------------------------------------------------------------------
# In other processes


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_runs_of_other_processes_are_named_too(workspace: Workspace, launcher):
    (workspace.folder / "short.txt").write_text("a")
    line = ["data.files=[short.txt],[corpus.txt]", f"hydra/launcher={launcher}"]
    done = workspace.run("train.py", "-m", *TWO_STEPS, *line, expect=2)
    assert done.stderr.splitlines() == [
        f"error: run 0 (data.files=[short.txt]): {NO_TEXT}",
        f"error: 1 of 2 runs failed: 0 ({NO_TEXT})",
    ]
    assert [about(sweep_of(workspace) / number)["state"] for number in "01"] == ["failed", "finished"]


@pytest.mark.slow
def test_killed_worker_does_not_end_the_runs_that_wait(workspace: Workspace):
    line = ["train.seed=1,2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "train.auto_resume=true"]
    workspace.environment["GPT2_FAULT"] = "kill@2"
    for number in "12":  # from an earlier start of this sweep
        (workspace.folder / "outputs/sweeps/sweep/again" / number).mkdir(parents=True)
        earlier = {"state": "failed", "reason": "UserError: no text", "exit_code": 2}
        (sweep_of(workspace) / number / "run.json").write_text(json.dumps(earlier))
        (sweep_of(workspace) / number / ".lock").touch()
    line.append(f"hydra.sweep.dir={sweep_of(workspace)}")
    done = workspace.run("train.py", "-m", *TWO_STEPS, *line, expect=1)
    assert done.stderr.splitlines()[-1] == "error: 3 of 3 runs failed: 0, 1, 2 (its process ended)"
    assert "error: run 2 (train.seed=3): its process ended; A worker process" in done.stderr
    assert (sweep_of(workspace) / "2" / "train.log").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_sweep_keeps_its_exit_code(workspace: Workspace, number):
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    process = workspace.start("train.py", "-m", *TWO_STEPS, "train.max_steps=90", "train.seed=1,2")
    wait_for(lambda: any(workspace.folder.glob("outputs/sweeps/sweep/*/0/metrics.jsonl")))
    process.send_signal(number)
    assert process.wait(timeout=120) == 128 + number
    assert not (sweep_of(workspace) / "1").exists()
    assert "runs failed" not in process.printed(2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_of_an_interrupted_sweep_save_their_runs(workspace: Workspace, number):
    """A terminal sends Ctrl-C to all processes; `kill` sends SIGTERM only to the first."""
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    line = ["train.max_steps=90", "train.seed=1,2,3,4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = workspace.start("train.py", "-m", *TWO_STEPS, *line, start_new_session=True)
    wait_for(lambda: len([*workspace.folder.glob("outputs/sweeps/sweep/*/*/metrics.jsonl")]) == 2)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(timeout=120) == 128 + number
    sweep = sweep_of(workspace)
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml"}
    for run in (sweep / "0", sweep / "1"):
        assert about(run)["state"] == "interrupted"
        assert (run / "checkpoints" / "last.pth").is_file()
    assert "Traceback" not in process.printed(2)


@pytest.mark.slow
def test_processes_of_a_killed_sweep_save_their_runs_and_end(workspace: Workspace):
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    line = ["train.max_steps=90", "train.seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = workspace.command("train.py", "-m", *TWO_STEPS, *line)  # not forked, as the processes watch their parent
    process = subprocess.Popen(command, cwd=workspace.folder, env=workspace.environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: len([*workspace.folder.glob("outputs/sweeps/sweep/*/*/metrics.jsonl")]) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: not pids_in(workspace.folder))
    for number in "01":
        (run,) = workspace.folder.glob(f"outputs/sweeps/sweep/*/{number}")
        assert about(run)["state"] == "interrupted"
        assert (run / "checkpoints" / "last.pth").is_file()
