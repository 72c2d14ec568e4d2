"""The data that W&B receives, read from the files of its process, and failures of W&B, which never change a run."""

import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import wandb

from gpt2.config import TrainRun, WandbConfig
from gpt2.runtime.rng import commit
from gpt2.tracking import wandb_service
from gpt2.tracking.loggers import PATIENCE, LoggedRun, Loggers, comparable, redact, start_loggers, within
from gpt2.tracking.tracker import Ended, ExternalLogger, Record, Tracker, read_about, read_metrics
from gpt2.tracking.wandb_logger import WandbLogger
from gpt2.tracking.wandb_runs import lacking, read_id, resolve_mode, upload_command
from tests.conftest import TEXT, TINY, Workspace
from tests.wandb_file import read_wandb
from tests.wandb_server import KEY, WandbServer, black_hole


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Give calls in this process ten times the time limit, as in a `Workspace`."""
    monkeypatch.setenv(PATIENCE, "10")


def started(mode: str, name: str = "n") -> ExternalLogger:
    return start_loggers(TrainRun(wandb=WandbConfig(mode=mode)), LoggedRun(name, "g", "train"))


def record(step: int) -> Record:
    return {"step": step, "tokens": step * 10, "seconds": float(step)}


def wandb_runs(workspace: Workspace) -> list[dict[str, Any]]:
    """All W&B runs stored in a workspace, oldest first."""
    folders = sorted((workspace.folder / "outputs" / "wandb").glob("*run-*"), key=lambda path: path.stat().st_mtime)
    return [read_wandb(folder) for folder in folders]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """The results of training, without times."""
    keys = ("train/loss", "train/grad_norm", "val/loss")
    return [(r["step"], key, r[key]) for r in read_metrics(folder / "metrics.jsonl") for key in keys if key in r]


def rows_of(run_data: dict[str, Any], key: str) -> list[tuple[int, float]]:
    return [(row["tokens"], row[key]) for row in run_data["history"] if key in row]


# ---------------------------------------------------------------------------------------------------------------------
# What is logged


def test_run_has_name_group_tags_and_configuration(trained):
    (run_data,) = wandb_runs(trained)
    (run,) = trained.runs()
    expected = {"job_type": "train", "group": "gpt2", "exit_code": 0, "id": (run / "wandb_id").read_text()}
    assert {key: run_data[key] for key in expected} == expected
    assert "gpt2_nano" in run_data["display_name"]
    assert "d_model=32" in run_data["display_name"]
    assert {"gpt2_nano", "text"} <= set(run_data["tags"])
    assert run_data["metrics"]["*"] == {"step_metric": "tokens", "summary": []}
    assert run_data["metrics"]["val/loss"]["step_metric"] == "tokens"
    assert set(run_data["metrics"]["val/loss"]["summary"]) == {"min", "last"}
    config = run_data["config"]
    assert (config["model"]["d_model"], config["train"]["batch_size"], config["tokens_per_step"]) == (32, 4, 128)
    assert config["parameters"] > 10_000
    assert config["machine"]["cores"]
    assert (config["repository"] is None) == (commit() is None)
    assert not commit() or len(config["repository"]["commit"]) == 40
    assert config["choices"]["model"] == "gpt2_nano"
    assert not {"wandb", "started_with", "resume"} & config.keys()


def test_logged_metrics_match_metrics_jsonl(trained):
    (run_data,) = wandb_runs(trained)
    (run,) = trained.runs()
    for key in ("train/loss", "val/loss"):
        written = [(r["tokens"], r[key]) for r in read_metrics(run / "metrics.jsonl") if key in r]
        assert rows_of(run_data, key) == written
    validation = [value for _, value in rows_of(run_data, "val/loss")]
    assert run_data["summary"]["val/loss"] == {"last": validation[-1], "min": min(validation)}
    assert run_data["summary"]["state"] == "finished"
    tables = [row for row in run_data["history"] if any(key.startswith("samples") for key in row)]
    assert tables[-1]["samples.nrows"] == 2
    assert any("curves.path" in row for row in run_data["history"])


def test_no_secrets_are_written(workspace):
    workspace.environment |= {"WANDB_MODE": "offline", "MY_SECRET": "marker-of-environment"}
    workspace.run_anew("train.py", *TINY[:-4], "train.max_steps=1", "sample_prompt='marker-of-prompt'", "wandb=auto")
    (folder,) = (workspace.folder / "outputs" / "wandb").glob("*run-*")
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and "debug" not in path.name)
    assert b"marker-of-prompt" in written  # the prompt is in the configuration
    for secret in ("marker-of-environment", sys.executable, "train.py", "wandb=auto", "Stopped"):
        assert secret.encode() not in written, secret
    assert read_wandb(folder)["host"] == "-"
    assert not list(folder.rglob("*requirements*"))


@pytest.mark.slow
def test_resumed_run_is_the_same_wandb_run_and_one_command_uploads_all_of_it(workspace):
    workspace.run("train.py", *TINY, "wandb=offline", "train.max_steps=4")
    for steps in (6, 6, 8):
        done = workspace.run("train.py", "resume=latest", f"train.max_steps={steps}")
    first, *_, last = runs = wandb_runs(workspace)
    assert len({run["id"] for run in runs}) == 1
    assert all(run["resume"] for run in runs)
    assert [[tokens for tokens, _ in rows_of(run, "val/loss")] for run in runs] == [[512], [768], [], [1024]]
    assert last["summary"]["state"] == "finished"

    command = re.findall(r"upload with `(wandb sync .*)`", done.stdout)[0]
    assert command == f"wandb sync outputs/wandb/offline-run-*-{first['id']}"
    with WandbServer() as server:
        environment = {**workspace.environment, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        environment |= {"PATH": f"{Path(wandb.__file__).parents[4]}/bin:{os.environ['PATH']}"}
        for message in ("Syncing 4 run(s)", "No runs to sync"):  # the second time
            shell = {"shell": True, "cwd": workspace.folder, "env": environment, "text": True}
            synced = subprocess.run(command, **shell, capture_output=True, timeout=600, check=True)
            assert message in synced.stdout + synced.stderr
    history = server.runs[first["id"]]["history"]
    assert [row["step"] for row in history if "val/loss" in row] == [4, 6, 8]
    assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 4, 6, 8]


def test_copied_run_gets_its_own_wandb_run_and_a_moved_one_continues(workspace):
    workspace.run("train.py", *TINY, "wandb=offline", "train.max_steps=4")
    (original,) = workspace.runs()
    copy, moved = original.with_name("copy"), original.with_name("moved")
    shutil.copytree(original, copy)

    outputs = [workspace.run("train.py", f"resume={copy}", f"train.max_steps={n}").stdout for n in (4, 6)]
    notes = [f"this folder is a copy of {original}" in output for output in outputs]
    assert notes == [True, False]
    assert read_about(copy)["copy_of"] == str(original)
    original.rename(moved)
    assert "a copy of" not in workspace.run("train.py", f"resume={moved}", "train.max_steps=6").stdout

    first, *of_copy, last = (run["id"] for run in wandb_runs(workspace))
    assert first == last == (moved / "wandb_id").read_text()
    assert {*of_copy} == {(copy / "wandb_id").read_text()} != {first}


@pytest.mark.parametrize(("fault", "exit_code", "state"), [("nan_loss@6", 3, "diverged"), ("exception@6", 1, "failed")])
def test_crash_is_logged_with_its_exit_code(workspace, fault, exit_code, state):
    workspace.environment["GPT2_FAULT"] = fault
    done = workspace.start("train.py", *TINY, "wandb=offline")
    assert done.wait(timeout=600) == exit_code
    (run_data,) = wandb_runs(workspace)
    assert (run_data["exit_code"], run_data["summary"]["state"]) == (exit_code, state)
    assert [tokens for tokens, _ in rows_of(run_data, "val/loss")] == [512]


@pytest.mark.slow
def test_each_trial_of_a_study_is_a_run_with_its_state(workspace):
    workspace.environment["GPT2_FAULT"] = "exception@3#1,nan_loss@3#2"
    study = ["hparams_search=optuna", "hydra.sweeper.study_name=mine", "hydra.sweeper.n_trials=4"]
    overrides = [word for word in TINY if not word.startswith(("wandb", "train.batch_size"))]
    workspace.run(
        "train.py", "-m", *study, *overrides, "train.batch_size=4", "wandb=offline", "hydra/sweeper/pruner=none"
    )
    runs = sorted(wandb_runs(workspace), key=lambda run: run["display_name"])
    assert [run["display_name"] for run in runs] == [f"mine-{number:04}" for number in range(4)]
    assert {(run["group"], run["job_type"]) for run in runs} == {("mine", "trial")}
    assert [run["config"]["study"]["trial"] for run in runs] == [0, 1, 2, 3]
    assert [run["summary"]["state"] for run in runs] == ["finished", "failed", "diverged", "finished"]
    assert [run["exit_code"] for run in runs] == [0, 1, 3, 0]
    assert all(run["summary"]["state"] in run["tags"] for run in runs)
    assert len({run["id"] for run in runs}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", ["evaluate.py", "generate.py"])
def test_evaluation_and_generation_are_logged(trained, script, tmp_path):
    before = len(wandb_runs(trained))
    extra = {
        "evaluate.py": [f"output={tmp_path}/e.json"],
        "generate.py": ["prompt=def f", "inference.max_new_tokens=5"],
    }
    done = trained.run(script, "wandb=offline", *extra[script])
    assert "wandb sync outputs/wandb/offline-run-" in done.stdout + done.stderr
    run_data = wandb_runs(trained)[before:]
    assert [(run["job_type"], run["group"], run["exit_code"]) for run in run_data] == [(script[:-3], "gpt2", 0)]
    if script == "evaluate.py":
        assert run_data[0]["summary"]["loss"] > 0
        assert run_data[0]["config"]["data"]["tokenizer"]
    else:
        assert any(row.get("texts.nrows") == 1 for row in run_data[0]["history"])


def test_configuration_without_private_keys_and_secrets():
    values = comparable(asdict(TrainRun(started_with=["a=b"])))
    assert values["model"]["d_model"] == 768
    assert values["study"] == {"name": None, "trial": None}
    assert "started_with" not in values
    secrets = ["postgresql://me:word@host/x", "https://TOKEN@host/x.txt", "https://host/x?token=abc&n=1"]
    starred = ["postgresql://***@host/x", "https://***@host/x.txt", "https://host/x?token=***&n=***"]
    assert redact({"a": secrets, "b": 1}) == {"a": starred, "b": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Modes


@pytest.mark.parametrize(
    ("mode", "variable", "wanted"),
    [
        ("auto", None, "online"),
        ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", "off"),
        ("auto", "online", "online"),
        ("online", "disabled", "online"),
        ("offline", "online", "offline"),
        ("off", "online", "off"),
    ],
)
def test_mode_auto_follows_the_environment_variable(monkeypatch, mode, variable, wanted):
    if variable is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert resolve_mode(mode) == wanted


def test_off_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    external = started("off")
    assert external.where() == []
    external.finish(Ended("finished"), None)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Failures


class BrokenRun:
    """A W&B run that has lost its connection."""

    offline, id, dir, job_type, url = True, "x", "/tmp/x/files", "train", None

    def __init__(self):
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            self.calls.append(name)
            raise ConnectionError("gone")

        return fail


def broken_logger(monkeypatch) -> tuple[BrokenRun, WandbLogger]:
    run = BrokenRun()
    run.define_metric = lambda *_args, **_more: None
    monkeypatch.setattr(wandb_service, "start", lambda *_, **__: run)
    return run, WandbLogger(TrainRun(), LoggedRun("n", "g", "train"))


def test_failure_of_wandb_is_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_service, "end_service", lambda _code: None)
    run, logger = broken_logger(monkeypatch)
    with caplog.at_level("WARNING"), Tracker(tmp_path, Loggers([logger])) as tracker:
        for step in (1, 2, 3):
            tracker.log(record(step), sample="text")
    assert run.calls.count("log") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert sum("logs nothing more" in r.getMessage() for r in caplog.records) == 1


def test_within_raises_timeout_error():
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        within(0.01, never.wait)
    never.set()
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0)


def test_silent_server_costs_at_most_15_seconds():
    service = wandb_service
    start = service.LOGIN_SECONDS + service.INIT_SECONDS + service.GRACE_SECONDS
    end = 2 * service.TABLE_SECONDS + service.FINISH_SECONDS + 2 * service.GRACE_SECONDS
    assert start + end <= 15


def test_private_api_of_wandb(tmp_path):
    """Settings and attributes that `wandb_service` uses although they may change in any release of wandb."""
    advice = f"in wandb {wandb.__version__}; gpt2/tracking/wandb_service.py was checked with 0.31.0"
    for name in ("graphql_timeout_seconds", "service_wait", "disable_meta", "save_requirements", "executable"):
        assert f"x_{name}" in wandb.Settings.model_fields, f"no setting x_{name} {advice}"
    run = wandb_service.start(False, dir=str(tmp_path), id="private")
    try:
        process = wandb_service.service_process()
        assert isinstance(process, subprocess.Popen), f"the process is no longer in _connection._proc._process {advice}"
        assert process.poll() is None
    finally:
        assert wandb_service.finish(run, 0, wandb_service.LOCAL_SECONDS)


def online(workspace: Workspace, url: str | None) -> None:
    del workspace.environment["WANDB_MODE"]
    if url is not None:
        workspace.environment |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}


def test_online_run_uploads_everything(workspace):
    with WandbServer() as server:
        online(workspace, server.url)
        done = workspace.run("train.py", *TINY, "wandb=auto", "wandb.log_checkpoints=best")
    (run_data,) = server.runs.values()
    assert (run_data["complete"], run_data["exit_code"]) == (True, 0)
    steps = [row["step"] for row in run_data["history"] if "train/loss" in row]
    assert steps == [1, 2, 4, 6, 8]
    assert "W&B: http" in done.stdout
    assert any("best_model.pth" in place for place in server.uploads)
    assert any("curves" in place for place in server.uploads)


@pytest.mark.slow
def test_resumed_run_continues_the_online_run(workspace):
    with WandbServer() as server:
        online(workspace, server.url)
        workspace.run("train.py", *TINY, "wandb=auto", "train.max_steps=4")
        workspace.run("train.py", "resume=latest", "train.max_steps=8")
    ((name, run_data),) = server.runs.items()
    assert name == (workspace.runs()[0] / "wandb_id").read_text()
    assert run_data["resumes"] == 1
    assert [row["step"] for row in run_data["history"] if "val/loss" in row] == [4, 8]


FAULTS = {
    "no key": {},
    "refused": {"url": "http://127.0.0.1:9"},
    "black hole": {"url": None},
    "wrong key": {"server": {"status": 401}},
    "broken": {"server": {"status": 500}},
    "closes in the middle": {"server": {"closes": True, "fails_after": 5}},
    "falls silent in the middle": {"server": {"hangs": True, "fails_after": 5}},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list:
    """The results of a run without W&B."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "corpus.txt").write_text(TEXT)
    workspace = Workspace(folder)
    workspace.run("train.py", *TINY)
    return losses(workspace.runs()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_server_failure_changes_nothing_and_loses_nothing(workspace, alone, fault):
    del workspace.environment[PATIENCE]  # the product's limits
    with ExitStack() as stack:
        options = FAULTS[fault]
        if "server" in options:
            online(workspace, stack.enter_context(WandbServer(**options["server"])).url)
        else:
            online(workspace, stack.enter_context(black_hole()) if fault == "black hole" else options.get("url"))
        done = workspace.run("train.py", *TINY, "wandb=auto")
    assert "wandb sync" in done.stdout
    (run,) = workspace.runs()
    assert losses(run) == alone
    (run_data,) = wandb_runs(workspace)
    assert run_data["exit_code"] == 0
    assert {row["step"] for row in run_data["history"] if "val/loss" in row} == {4, 8}
    assert {row["step"] for row in run_data["history"] if "train/loss" in row} == {1, 2, 4, 6, 8}


def test_failed_server_is_not_contacted_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_service, "_offline_until", 0.0)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_service, "LOGIN_SECONDS", 0.01)
    logins = []
    monkeypatch.setattr("wandb.login", lambda **_: logins.append(1) or threading.Event().wait())
    for number in (1, 2):
        external = started("auto", f"n{number}")
        external.log(record(1))
        external.finish(Ended("finished"), None)
        assert "wandb sync" in str(external.where())
    assert len(logins) == 1


def test_unwritable_folder_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").write_text("in the way")
    with caplog.at_level("WARNING"):
        started("offline").finish(Ended("finished"), None)
    assert "W&B failed" in caplog.text


def test_failed_start_removes_only_its_own_files(tmp_path, monkeypatch):
    """Other processes may start runs at the same time."""
    theirs = tmp_path / "wandb" / "offline-run-1-theirs"
    ours = tmp_path / "wandb" / "run-1-ours"

    def fail(**how) -> None:
        if how["mode"] == "online":
            theirs.mkdir(parents=True)
            ours.mkdir()
        raise ConnectionError

    monkeypatch.setattr(wandb_service, "can_go_online", lambda _seconds: True)
    monkeypatch.setattr(wandb_service, "end_service", lambda _code: None)
    monkeypatch.setattr(wandb_service, "_offline_until", 0.0)
    monkeypatch.setattr("wandb.init", fail)
    monkeypatch.setattr("wandb.setup", lambda _settings: None)
    with pytest.raises(ConnectionError):
        wandb_service.start(True, dir=str(tmp_path), id="ours")
    assert theirs.exists()
    assert not ours.exists()


def test_table_is_logged_when_it_grew_by_a_tenth_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logged = []
    monkeypatch.setattr(WandbLogger, "_log_table", lambda _self, _name, _columns, rows: logged.append(len(rows)))
    monkeypatch.setattr(wandb_service, "finish", lambda *_: True)
    run, external = broken_logger(monkeypatch)
    run.summary = {}
    external.start()
    for count in range(1, 101):
        external.show_table("samples", ["text"], [["a"]] * count)
        external._table_thread.join()
    external.finish(Ended("finished"), None)
    assert logged[:3] == [1, 2, 3]
    assert logged[-1] == 100
    assert sum(logged) < 13 * 100


def test_runs_that_wandb_lacks_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "wandb_id").write_text(f"id{number}")
    for number, content in enumerate((b"", b"\xff", b"id1\n", b"*", b"../id1")):
        (tmp_path / f"damaged {number}").mkdir()
        (tmp_path / f"damaged {number}" / "wandb_id").write_bytes(content)
        assert read_id(tmp_path / f"damaged {number}") is None
    for folder in ("offline-run-1-id11", "offline-run-2-id11", "offline-run-3-id2", "run-4-id3", "run-5-id4"):
        (tmp_path / "outputs" / "wandb" / folder).mkdir(parents=True)
    for uploaded in ("run-5-id4", "offline-run-1-id11"):
        wandb_service.mark_as_synced(with_file(tmp_path / "outputs" / "wandb" / uploaded))
    folders = [path for path in tmp_path.iterdir() if path.name != "outputs"]
    assert lacking(folders, "run") == (
        "W&B lacks 3 runs (2, 3, 11); upload with `wandb sync --include-online outputs/wandb/*run-*`"
    )
    assert upload_command(["id3"]) == "wandb sync --include-online outputs/wandb/*run-*-id3"
    (tmp_path / "outputs" / "wandb" / "offline-run-26-id11").mkdir()
    assert upload_command(["id11"]) == "wandb sync outputs/wandb/offline-run-*-id11"
    assert lacking([tmp_path / "11", tmp_path / "2"], "trial") == (
        "W&B lacks 2 trials (2, 11); upload with `wandb sync outputs/wandb/offline-run-*`"
    )
    (tmp_path / "outputs" / "wandb" / "offline-run-27-private").mkdir()
    assert upload_command(["id11", "id2"]) == ("wandb sync outputs/wandb/offline-run-*  # and 1 folder of other runs")
    assert (lacking([], "run"), upload_command(["id4", "id7"])) == (None, None)


def with_file(folder: Path) -> Path:
    (folder / "run-id.wandb").touch()
    return folder


def test_home_folder_gets_only_caches_and_settings(trained):
    assert {path.name for path in (trained.folder / "home").iterdir()} <= {".cache", ".config"}
