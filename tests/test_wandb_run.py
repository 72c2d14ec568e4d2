"""What W&B hears, read from the files that its own process writes; and that whatever it does, a run goes on."""

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gpt2.config import TrainRun, WandbConfig
from gpt2.runtime.rng import commit
from gpt2.tracking.tracker import Ended, ExternalLogger, Tracker, read_metrics, wandb_service
from gpt2.tracking.wandb_logger import WandbRun, harmless, kept_offline, start_wandb, told, wanted_mode
from tests.conftest import TEXT, TINY, Workspace
from tests.test_tracking import record
from tests.wandb_file import read_wandb
from tests.wandb_server import KEY, WandbServer, black_hole


def files_of(workspace: Workspace) -> list[dict[str, Any]]:
    """All runs that W&B keeps in a workspace, oldest first."""
    folders = sorted((workspace.folder / "outputs" / "wandb").glob("*run-*"), key=lambda path: path.stat().st_mtime)
    return [read_wandb(folder) for folder in folders]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """What training computed, without what the clock says."""
    keys = ("train/loss", "train/grad_norm", "val/loss")
    return [(r["step"], key, r[key]) for r in read_metrics(folder / "metrics.jsonl") for key in keys if key in r]


def rows_of(told: dict[str, Any], key: str) -> list[tuple[int, float]]:
    return [(row["tokens"], row[key]) for row in told["history"] if key in row]


# ---------------------------------------------------------------------------------------------------------------------
# What is told


def test_a_run_is_told_in_the_conventions_by_which_runs_compare(trained):
    (told,) = files_of(trained)
    (run,) = trained.runs()
    expected = {"job_type": "train", "group": "gpt2", "exit_code": 0, "id": (run / "wandb_id").read_text()}
    assert {key: told[key] for key in expected} == expected
    assert "gpt2_nano" in told["display_name"]
    assert "d_model=32" in told["display_name"]
    assert {"gpt2_nano", "text"} <= set(told["tags"])
    assert told["metrics"]["*"] == {"step_metric": "tokens", "summary": []}
    assert told["metrics"]["val/loss"]["step_metric"] == "tokens"
    assert set(told["metrics"]["val/loss"]["summary"]) == {"min", "last"}
    config = told["config"]
    assert (config["model"]["d_model"], config["train"]["batch_size"], config["tokens_per_step"]) == (32, 4, 128)
    assert config["parameters"] > 10_000
    assert config["machine"]["cores"]
    assert (config["repository"] is None) == (commit() is None)
    assert not commit() or len(config["repository"]["commit"]) == 40
    assert config["choices"]["model"] == "gpt2_nano"
    assert not {"wandb", "started_with", "resume"} & config.keys()


def test_the_numbers_are_those_of_the_file_over_tokens(trained):
    (told,) = files_of(trained)
    (run,) = trained.runs()
    for key in ("train/loss", "val/loss"):
        written = [(r["tokens"], r[key]) for r in read_metrics(run / "metrics.jsonl") if key in r]
        assert rows_of(told, key) == written
    validation = [value for _, value in rows_of(told, "val/loss")]
    assert told["summary"]["val/loss"] == {"last": validation[-1], "min": min(validation)}
    assert told["summary"]["state"] == "finished"
    tables = [row for row in told["history"] if any(key.startswith("samples") for key in row)]
    assert tables[-1]["samples.nrows"] == 2
    assert any("curves.path" in row for row in told["history"])


def test_nothing_secret_goes_in(workspace):
    workspace.environment |= {"WANDB_MODE": "offline", "MY_SECRET": "marker-of-environment"}
    workspace.run_anew("train.py", *TINY[:-4], "train.max_steps=1", "sample_prompt='marker-of-prompt'", "wandb=auto")
    (folder,) = (workspace.folder / "outputs" / "wandb").glob("*run-*")
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and "debug" not in path.name)
    assert b"marker-of-prompt" in written  # it is in the configuration
    for secret in ("marker-of-environment", sys.executable, "train.py", "wandb=auto", "Stopped"):
        assert secret.encode() not in written, secret
    assert read_wandb(folder)["host"] == "-"
    assert not list(folder.rglob("*requirements*"))


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(workspace):
    workspace.run("train.py", *TINY, "wandb=offline", "train.max_steps=4")
    workspace.run("train.py", "resume=latest", "train.max_steps=8")
    first, second = files_of(workspace)
    assert first["id"] == second["id"]
    assert (first["resume"], second["resume"]) == (True, True)
    assert [tokens for tokens, _ in rows_of(first, "val/loss")] == [512]
    assert [tokens for tokens, _ in rows_of(second, "val/loss")] == [1024]
    assert second["summary"]["state"] == "finished"


@pytest.mark.parametrize(("fault", "exit_code", "state"), [("nan_loss@6", 3, "diverged"), ("exception@6", 1, "failed")])
def test_a_crash_is_a_crash(workspace, fault, exit_code, state):
    workspace.environment["GPT2_FAULT"] = fault
    done = workspace.start("train.py", *TINY, "wandb=offline")
    assert done.wait(timeout=60) == exit_code
    (told,) = files_of(workspace)
    assert (told["exit_code"], told["summary"]["state"]) == (exit_code, state)
    assert [tokens for tokens, _ in rows_of(told, "val/loss")] == [512]


@pytest.mark.slow
def test_trials_of_a_study_are_told_apart_and_each_by_how_it_ended(workspace):
    workspace.environment["GPT2_FAULT"] = "exception@3#1,nan_loss@3#2"
    study = ["hparams_search=optuna", "hydra.sweeper.study_name=mine", "hydra.sweeper.n_trials=4"]
    overrides = [word for word in TINY if not word.startswith(("wandb", "train.batch_size"))]
    workspace.run(
        "train.py", "-m", *study, *overrides, "train.batch_size=4", "wandb=offline", "hydra/sweeper/pruner=none"
    )
    runs = sorted(files_of(workspace), key=lambda run: run["display_name"])
    assert [run["display_name"] for run in runs] == [f"mine-{number:04}" for number in range(4)]
    assert {(run["group"], run["job_type"]) for run in runs} == {("mine", "trial")}
    assert [run["config"]["study"]["trial"] for run in runs] == [0, 1, 2, 3]
    assert [run["summary"]["state"] for run in runs] == ["finished", "failed", "diverged", "finished"]
    assert [run["exit_code"] for run in runs] == [0, 1, 3, 0]
    assert all(run["summary"]["state"] in run["tags"] for run in runs)
    assert len({run["id"] for run in runs}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", ["evaluate.py", "generate.py"])
def test_scores_and_texts_are_told_too(trained, script, tmp_path):
    before = len(files_of(trained))
    extra = {
        "evaluate.py": [f"output={tmp_path}/e.json"],
        "generate.py": ["prompt=def f", "inference.max_new_tokens=5"],
    }
    done = trained.run(script, "wandb=offline", *extra[script])
    assert "wandb sync outputs/wandb/offline-run-" in done.stdout + done.stderr
    told = files_of(trained)[before:]
    assert [(run["job_type"], run["group"], run["exit_code"]) for run in told] == [(script[:-3], "gpt2", 0)]
    if script == "evaluate.py":
        assert told[0]["summary"]["loss"] > 0
        assert told[0]["config"]["data"]["tokenizer"]
    else:
        assert any(row.get("texts.nrows") == 1 for row in told[0]["history"])


def test_a_configuration_is_told_without_what_is_nobodys_business():
    values = told(asdict(TrainRun(started_with=["a=b"])))
    assert values["model"]["d_model"] == 768
    assert values["study"] == {"name": None, "trial": None}
    assert "started_with" not in values
    secrets = ["postgresql://me:word@host/x", "https://TOKEN@host/x.txt", "https://host/x?token=abc&n=1"]
    starred = ["postgresql://***@host/x", "https://***@host/x.txt", "https://host/x?token=***&n=***"]
    assert harmless({"a": secrets, "b": 1}) == {"a": starred, "b": 1}


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
def test_what_is_asked_for_beats_the_variable_and_auto_heeds_it(monkeypatch, mode, variable, wanted):
    if variable is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wanted_mode(mode) == wanted


def test_off_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    external = start_wandb(WandbConfig(mode="off"), name="n", group="g", job_type="train")
    assert type(external) is ExternalLogger
    assert external.where() is None
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# A guest that misbehaves


class BrokenRun:
    """A W&B run whose connection is gone."""

    offline, id, dir, job_type, url = True, "x", "/tmp/x/files", "train", None

    def __init__(self):
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            self.calls.append(name)
            raise ConnectionError("gone")

        return fail


def test_a_wandb_that_fails_is_told_once_and_the_file_has_everything(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(wandb_service, "end_service", lambda _code: None)
    run = BrokenRun()
    run.define_metric = lambda *_args, **_more: None
    with caplog.at_level("WARNING"), Tracker(tmp_path, WandbRun(run, WandbConfig(), 1.0)) as tracker:
        for step in (1, 2, 3):
            tracker.log(record(step), sample="text")
    assert run.calls.count("log") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert sum("gets nothing more" in r.getMessage() for r in caplog.records) == 1


def test_what_takes_too_long_is_left_to_itself():
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        wandb_service.within(0.05, lambda: time.sleep(5))
    assert time.monotonic() - began < 2
    assert wandb_service.within(1, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        wandb_service.within(1, lambda: 1 / 0)


def online(workspace: Workspace, url: str | None) -> None:
    del workspace.environment["WANDB_MODE"]
    if url is not None:
        workspace.environment |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}


def test_online_everything_arrives(workspace):
    with WandbServer() as server:
        online(workspace, server.url)
        done = workspace.run("train.py", *TINY, "wandb=auto", "wandb.log_checkpoints=best")
    (told,) = server.runs.values()
    assert (told["complete"], told["exit_code"]) == (True, 0)
    steps = [row["step"] for row in told["history"] if "train/loss" in row]
    assert steps == [1, 2, 4, 6, 8]
    assert "W&B: http" in done.stdout
    assert any("best_model.pth" in place for place in server.uploads)
    assert any("curves" in place for place in server.uploads)


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_run_there(workspace):
    with WandbServer() as server:
        online(workspace, server.url)
        workspace.run("train.py", *TINY, "wandb=auto", "train.max_steps=4")
        workspace.run("train.py", "resume=latest", "train.max_steps=8")
    ((name, told),) = server.runs.items()
    assert name == (workspace.runs()[0] / "wandb_id").read_text()
    assert told["resumes"] == 1
    assert [row["step"] for row in told["history"] if "val/loss" in row] == [4, 8]


FAULTS = {
    "no key": {},
    "refused": {"url": "http://127.0.0.1:9"},
    "black hole": {"url": None},
    "wrong key": {"server": {"status": 401}},
    "broken": {"server": {"status": 500}},
    "closes in the middle": {"server": {"closes": True, "fails_after": 5}},
    "falls silent in the middle": {"server": {"hangs": True, "fails_after": 5}},
}
LONGEST = 15  # seconds that a run may lose


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[list, float]:
    """What a run without W&B computes, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "corpus.txt").write_text(TEXT)
    workspace = Workspace(folder)
    workspace.run("train.py", *TINY, "train.max_steps=1")  # prepares the data
    began = time.monotonic()
    workspace.run("train.py", *TINY)
    return losses(workspace.runs()[-1]), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_the_server_does_the_run_is_the_same_and_nothing_is_lost(workspace, alone, fault):
    expected, seconds = alone
    with ExitStack() as stack:
        options = FAULTS[fault]
        if "server" in options:
            online(workspace, stack.enter_context(WandbServer(**options["server"])).url)
        else:
            online(workspace, stack.enter_context(black_hole()) if fault == "black hole" else options.get("url"))
        began = time.monotonic()
        done = workspace.run("train.py", *TINY, "wandb=auto")
        lost = time.monotonic() - began - seconds
    assert lost < LONGEST + 10, lost  # another machine may be slower, and this run prepares its data
    assert "wandb sync" in done.stdout
    (run,) = workspace.runs()
    assert losses(run) == expected
    (told,) = files_of(workspace)
    assert told["exit_code"] == 0
    assert {row["step"] for row in told["history"] if "val/loss" in row} == {4, 8}
    assert {row["step"] for row in told["history"] if "train/loss" in row} == {1, 2, 4, 6, 8}


def test_a_server_that_failed_is_not_asked_again_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_service, "_offline_until", 0.0)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_service, "LOGIN_SECONDS", 0.2)
    asked = []
    monkeypatch.setattr("wandb.login", lambda **_: asked.append(1) or time.sleep(1))
    for number in (1, 2):
        external = start_wandb(WandbConfig(mode="auto"), name=f"n{number}", group="g", job_type="train")
        assert isinstance(external, WandbRun)
        external.log(record(1))
        external.finish(Ended("finished"))
        assert "wandb sync" in str(external.where())
    assert len(asked) == 1


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").write_text("in the way")
    with caplog.at_level("WARNING"):
        external = start_wandb(WandbConfig(mode="offline"), name="n", group="g", job_type="train")
    assert type(external) is ExternalLogger
    assert "W&B did not start" in caplog.text


def test_a_start_that_fails_takes_nothing_of_other_runs_away(tmp_path, monkeypatch):
    """Which begin meanwhile, in other processes."""
    theirs = tmp_path / "wandb" / "offline-run-1-theirs"
    ours = tmp_path / "wandb" / "run-1-ours"

    def fail(**how) -> None:
        if how["mode"] == "online":
            theirs.mkdir(parents=True)
            ours.mkdir()
        raise ConnectionError

    monkeypatch.setattr(wandb_service, "can_go_online", lambda: True)
    monkeypatch.setattr(wandb_service, "end_service", lambda _code: None)
    monkeypatch.setattr(wandb_service, "_offline_until", 0.0)
    monkeypatch.setattr("wandb.init", fail)
    assert wandb_service.start(True, dir=str(tmp_path), id="ours") is None
    assert theirs.exists()
    assert not ours.exists()


def test_a_table_goes_in_when_it_has_grown_and_once_more_at_the_end(monkeypatch):
    handed_in = []
    monkeypatch.setattr(WandbRun, "_log_tables", lambda self: handed_in.append(len(self._next_table[2])))
    monkeypatch.setattr(wandb_service, "finish", lambda *_: True)
    run = BrokenRun()
    run.define_metric = lambda *_args, **_more: None
    external = WandbRun(run, WandbConfig(), 1.0)
    for count in range(1, 101):
        external.show_table("samples", ["text"], [["a"]] * count)
        external._table.join()
    external.finish(Ended("finished"))
    external._table.join()
    assert handed_in[:3] == [1, 2, 3]
    assert handed_in[-1] == 100
    assert sum(handed_in) < 13 * 100


def test_what_is_kept_offline_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "wandb_id").write_text(f"id{number}")
    (tmp_path / "outputs" / "wandb" / "offline-run-1-id1").mkdir(parents=True)
    assert kept_offline(tmp_path.glob("run*")).startswith("1 run is kept offline; `wandb sync outputs/wandb/offline")
    assert kept_offline([]) is None


def test_a_home_is_left_alone_but_for_caches_and_settings(trained):
    assert {path.name for path in (trained.folder / "home").iterdir()} <= {".cache", ".config"}
