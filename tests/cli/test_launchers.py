"""Launchers: their settings, and requeued jobs, on this machine and with a simulation of Slurm."""

import os
import re
import signal
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import open_dict

from gpt2.cli.compose import compose
from gpt2.cli.resume import sweep_arguments
from gpt2.errors import UserError
from gpt2.runtime.repository import CONF
from gpt2.tracking.tracker import read_metrics
from tests import slurm
from tests.cli.test_sweeper import STUDY, check, study_in
from tests.conftest import TINY, Workspace
from tests.test_scripts import wait_for

LAUNCHERS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))
SWEEP = [*TINY, "train.seed=1,2", "train.max_steps=24", "train.save_every=5", "model.dropout=0.1", "name=sweep"]


@pytest.fixture
def with_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install simulations of Slurm's commands. Returns the folder of their records."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, value in slurm.install(folder).items():
        monkeypatch.setenv(name, value)
    return folder


def launcher(*overrides: str) -> Launcher:
    composed = compose("train", list(overrides), with_hydra=True)
    with open_dict(composed):
        composed.hydra.sweep.dir = "sweep"
    context = HydraContext(config_loader=None, callbacks=None, execution_whitelist=None)
    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=print, config=composed)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_each_launcher_composes_and_is_valid(with_slurm, name):
    check("-m", f"hydra/launcher={name}", "data=stdlib", "train.seed=1,2")
    check("-m", f"hydra/launcher={name}", "data=stdlib", "hparams_search=optuna", "hydra.sweeper.n_jobs=2")
    assert type(launcher(f"hydra/launcher={name}")).__module__.startswith("hydra_plugins.hydra_")


@pytest.fixture
def submitted(with_slurm, monkeypatch):
    """A function that submits two jobs with a command line and returns the settings in the script for sbatch."""
    monkeypatch.chdir(with_slurm)
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJob.results", lambda job: [job.job_id])
    (with_slurm / "srun").write_text("#!/bin/sh\n")

    def submit(*overrides: str) -> dict[str, str | bool]:
        made = launcher(*overrides)
        made.params["submitit_folder"] = str(with_slurm / "%j")
        assert made.launch([["train.seed=1"], ["train.seed=2"]], initial_job_idx=0) == ["100_0", "100_1"]
        (script,) = with_slurm.glob("*.sbatch")
        return {**slurm.settings_of(script.read_text()), "script": script.read_text()}

    return submit


def test_settings_reach_sbatch(submitted):
    where = ["partition=gpu", "account=me", "qos=low", "constraint='a100|h100'", "exclude='node7,node[12-14]'"]
    much = ["cpus_per_task=4", "mem_gb=32", "array_parallelism=1", "timeout_min=90", "setup=['module load cuda']"]
    words = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{text}" for text in (*where, *much))]
    settings = submitted(*words, "+hydra.launcher.additional_parameters.mail-type=FAIL")
    wanted = {"partition": "gpu", "account": "me", "qos": "low", "constraint": "a100|h100", "time": "90"}
    wanted |= {"exclude": "node7,node[12-14]", "cpus-per-task": "4", "mem": "32GB", "gpus-per-node": "1"}
    wanted |= {"nodes": "1", "ntasks-per-node": "1", "array": "0-1%1", "signal": "USR2@120", "mail-type": "FAIL"}
    assert wanted.items() <= settings.items()
    assert "requeue" not in settings
    assert "\nmodule load cuda\n" in settings["script"]
    assert "\nsrun --unbuffered " in settings["script"]


def test_requeueing_launcher_sets_requeue(submitted):
    settings = submitted("hydra/launcher=submitit_slurm_requeue", "hydra.launcher.signal_delay_s=300")
    assert (settings["requeue"], settings["signal"], settings["time"]) == (True, "USR2@300", "240")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["timeout_min=1h"], "hydra.launcher.timeout_min: 1h is not a whole number of at least 1"),
        (["max_num_timeout=-1"], "hydra.launcher.max_num_timeout: -1 is not a whole number of at least 0"),
        (
            ["timeout_min=2"],
            "hydra.launcher.signal_delay_s: 120 seconds are not less than ",
        ),
        (["mem_gb=a lot"], 'hydra.launcher: Parameter "mem_gb" expected type'),
        (["partiton=gpu"], "Key 'partiton' is not in struct"),
    ],
)
def test_invalid_setting_is_rejected_before_submission(with_slurm, arguments, problem):
    given = [f"hydra.launcher.{text}" for text in arguments]
    with pytest.raises(UserError, match=re.escape(problem)):
        check("-m", "hydra/launcher=submitit_slurm", *given, "data=stdlib", "train.seed=1,2")


def test_unknown_setting_is_rejected(with_slurm):
    with pytest.raises(UserError, match=r"hydra\.launcher: Unknown argument 'speed'"):
        check("-m", "hydra/launcher=submitit_slurm", "+hydra.launcher.speed=3", "data=stdlib")


def test_missing_slurm_is_reported(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r'hydra\.launcher: Could not detect "srun"'):
        check("-m", "hydra/launcher=submitit_slurm", "train.seed=1,2", "data=stdlib")


def test_resumable_sweep_has_a_folder_named_after_its_command():
    plain = ["train.seed=1,2", "name=rates"]
    assert sweep_arguments(plain) == []
    assert sweep_arguments([*plain, "train.auto_resume=true", "hparams_search=optuna"]) == []
    resumes, folder = sweep_arguments([*plain, "train.auto_resume=true"])
    assert resumes == "train.auto_resume=true"
    assert re.fullmatch(r"hydra.sweep.dir=outputs/sweeps/rates/auto-\w{8}", folder)
    assert folder != sweep_arguments(["train.seed=1,3", "name=rates", "train.auto_resume=true"])[1]
    slow, fast = (
        sweep_arguments([*plain, "hydra/launcher=submitit_slurm_requeue", f"hydra.launcher.partition={name}"])
        for name in ("slow", "fast")
    )
    assert slow == fast
    assert slow[0] == "train.auto_resume=true"
    named = ["train.auto_resume=true", "hydra.sweep.dir=mine"]
    assert sweep_arguments([*plain, *named]) == ["train.auto_resume=true", "hydra.sweep.dir=mine"]
    with pytest.raises(UserError, match=r"train\.auto_resume: hydra\.launcher\.max_num_timeout=100 restarts jobs"):
        sweep_arguments([*plain, "hydra/launcher=submitit_slurm_requeue", "train.auto_resume=false"])


# ---------------------------------------------------------------------------------------------------------------------
# Jobs that are requeued


def figures(run: Path) -> list[dict[str, float]]:
    """The metrics of a run without its speed."""
    timed = ("seconds", "train/tokens_per_second", "train/mfu")
    return [
        {key: value for key, value in row.items() if key not in timed} for row in read_metrics(run / "metrics.jsonl")
    ]


def holder(run: Path) -> int:
    """The id of the process that writes to a run folder."""
    return int(re.search(r"process (\d+)", (run / ".lock").read_text())[1])


def has_begun(run: Path, rows: int = 6) -> bool:
    return (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= rows


def warn_each(sweep: Path, warnings: dict[str, signal.Signals]) -> None:
    """Send a signal to each run as soon as it has started."""

    def are_all_warned() -> bool:
        for pattern in list(warnings):
            for run in filter(has_begun, sweep.glob(pattern)):
                os.kill(holder(run), warnings.pop(pattern))
        return not warnings

    wait_for(are_all_warned)


def assert_both_resumed(workspace: Workspace, sweep: Path) -> None:
    """Assert that both runs of a sweep were interrupted, and have the metrics of uninterrupted ones."""
    workspace.environment.pop("GPT2_FAULT", None)
    workspace.run("train.py", "-m", *SWEEP, "hydra.sweep.dir=straight")
    for number in "01":
        assert "Resuming after step" in (sweep / number / "train.log").read_text()
        assert figures(sweep / number) == figures(workspace.folder / "straight" / number)
        assert len(figures(sweep / number)) == 19


@pytest.mark.slow
def test_warned_jobs_are_requeued_and_resume(workspace: Workspace):
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    line = [*SWEEP, "hydra/launcher=submitit_local", "hydra.launcher.max_num_timeout=3"]
    process = workspace.start("train.py", "-m", *line)
    sweep = workspace.folder / "outputs/sweeps/sweep"
    warn_each(sweep, {"auto-*/0": signal.SIGUSR1, "auto-*/1": signal.SIGUSR2})
    assert process.wait(timeout=240) == 0
    (folder,) = sweep.iterdir()
    output = "".join(path.read_text() for path in folder.glob(".submitit/*/*.out"))
    assert output.count(" - Requeued job") == 2
    assert_both_resumed(workspace, folder)


@pytest.mark.slow
def test_failed_and_lost_jobs_are_reported(workspace: Workspace):
    line = ["-m", *TINY, "train.seed=1,2", "hydra/launcher=submitit_local"]
    workspace.environment["GPT2_FAULT"] = "kill@6"
    lost = workspace.run("train.py", *line, expect=1)
    (folder,) = workspace.folder.glob("outputs/sweeps/gpt2/*")  # one folder for all files of the sweep
    assert "\t#1 : " in lost.stdout
    *errors, summary = lost.stderr.splitlines()
    for number, error in enumerate(errors):
        start = rf"error: run {number} \(train.seed={number + 1}\): its process ended; Job \d+ "
        assert re.match(rf"{start}.*has not produced any output \(state: FINISHED\)", error)
        assert str(folder / ".submitit") in error
    assert summary == "error: 2 of 2 runs failed: 0, 1 (its process ended)"
    workspace.environment["GPT2_FAULT"] = "out_of_memory@6"
    failed = workspace.run("train.py", *line, expect=1)
    assert failed.stderr.startswith("error: run 0 (train.seed=1): out of memory: ")
    assert failed.stderr.splitlines()[-1].startswith("error: 2 of 2 runs failed: 0, 1 (out of memory: ")


@pytest.mark.slow
def test_killed_sweep_resumes_unfinished_runs(workspace: Workspace):
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    line = [*SWEEP, "train.auto_resume=true", "hydra.sweep.dir=killed"]
    process = workspace.start("train.py", "-m", *line)
    sweep = workspace.folder / "killed"
    wait_for(lambda: has_begun(sweep / "1"))
    process.kill()
    process.wait()
    finished = (sweep / "0" / "checkpoints" / "last.pth").stat().st_mtime_ns
    workspace.environment.pop("GPT2_FAULT")
    workspace.run("train.py", "-m", *line)
    assert (sweep / "0" / "checkpoints" / "last.pth").stat().st_mtime_ns == finished
    assert_both_resumed(workspace, sweep)


@pytest.mark.slow
def test_warned_and_preempted_slurm_jobs_resume(workspace: Workspace, with_slurm):
    workspace.environment |= {name: os.environ[name] for name in ("PATH", slurm.STATE)}
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    process = workspace.start("train.py", "-m", *SWEEP, "hydra/launcher=submitit_slurm_requeue")
    sweep = workspace.folder / "outputs/sweeps/sweep"
    warn_each(sweep, {"auto-*/0": signal.SIGUSR2})
    wait_for(lambda: any(map(has_begun, sweep.glob("auto-*/1"))))
    slurm.preempt(with_slurm, "100_1", grace=1.5)
    (folder,) = sweep.iterdir()
    assert process.wait(timeout=240) == 0
    wait_for(lambda: all((with_slurm / f"100_{n}.state").read_text() == "COMPLETED" for n in (0, 1)), seconds=120)
    output = [next(folder.glob(f".submitit/100_{n}/*.out")).read_text() for n in (0, 1)]
    assert "Requeued job 100_0 (100 remaining timeouts)" in output[0]
    assert "Requeued" not in output[1]
    assert_both_resumed(workspace, folder)


@pytest.mark.slow
def test_warned_trials_resume_in_new_jobs(workspace: Workspace):
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    line = [*STUDY, "train.max_steps=30", "train.eval_every=5", "train.save_every=5", "hydra/sweeper/pruner=none"]
    line += ["hydra.sweeper.n_trials=2"]
    jobs = ["hydra/launcher=submitit_local", "hydra.launcher.max_num_timeout=3", "hydra.sweeper.n_jobs=2"]
    process = workspace.start("train.py", *line, *jobs)
    folder = workspace.folder / "outputs/sweeps/mine"
    warn_each(folder, {"0": signal.SIGUSR1, "1": signal.SIGUSR2})
    assert process.wait(timeout=240) == 0
    study = study_in(workspace.folder)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert all("Resuming after step" in (folder / number / "train.log").read_text() for number in "01")
    interrupted = [figures(folder / number) for number in "01"]

    workspace.environment.pop("GPT2_FAULT")
    folder.rename(workspace.folder / "before")
    workspace.run("train.py", *line)
    assert interrupted == [figures(folder / number) for number in "01"]
    assert [trial.value for trial in study_in(workspace.folder).trials] == [trial.value for trial in study.trials]
