"""Several loggers: each gets everything, and a failure of one affects neither the run nor the others."""

import csv
import json
import sys
import threading
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2.config import MlflowConfig, TrainRun
from gpt2.runtime.signals import Interrupted
from gpt2.tracking import csv_logger, loggers
from gpt2.tracking.loggers import LoggedRun, Loggers, start_loggers
from gpt2.tracking.tracker import Ended, ExternalLogger, Tracker, read_about, read_metrics
from gpt2.validation import validate
from tests.conftest import TEXT, TINY, Workspace, made_once
from tests.wandb_server import black_hole

ALL = "loggers=[wandb,tensorboard,mlflow,csv]"
METHODS = [name for name, value in vars(ExternalLogger).items() if callable(value)]


def record(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "tokens": step * 100, "seconds": step / 10, **values}


# ---------------------------------------------------------------------------------------------------------------------
# Faults: no fault of a logger changes the run


class Listener(ExternalLogger):
    """Remembers the calls of its methods."""

    def __init__(self):
        self.calls: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in METHODS:
            return super().__getattribute__(name)
        return lambda *arguments: self.calls.append((name, *arguments)) or []


class Faulty(Listener):
    """Raises or hangs in one method. `abandon` is called only after `finish` hangs, so in that case both do."""

    title, seconds = "Faulty", 0.05

    def __init__(self, method: str, fault: str, released: threading.Event):
        super().__init__()
        self.method, self.fault, self.released = method, fault, released

    def __getattribute__(self, name: str) -> Any:
        if name not in METHODS or name not in (self.method, "finish" if self.method == "abandon" else ""):
            return super().__getattribute__(name)
        return partial(self.fail, "hangs" if name != self.method else self.fault)

    def fail(self, fault: str, *_arguments: Any) -> None:
        if fault == "hangs":
            self.released.wait()
        raise {"exits": SystemExit(3), "interrupts": KeyboardInterrupt()}.get(
            fault, ValueError("https://me:word@host failed")
        )


def log_a_run(folder: Path, logger: ExternalLogger, steps: int = 4) -> None:
    with Tracker(folder, logger) as tracker:
        for step in range(1, steps + 1):
            tracker.log(record(step, **{"train/loss": 2.0}))
            tracker.log(record(step, **{"val/loss": 2.0}), sample=f"text {step}")
        tracker.external.summarize({"loss": 2.0})


@pytest.mark.parametrize("fault", ["raises", "exits", "interrupts", "hangs"])
@pytest.mark.parametrize("method", METHODS)
def test_no_fault_of_a_logger_reaches_the_run_or_another_logger(tmp_path, caplog, method, fault):
    released, good, steps = threading.Event(), Listener(), 4
    faulty = Faulty(method, fault, released)
    both = Loggers([faulty, good])
    began = time.monotonic()
    log_a_run(tmp_path, both, steps)
    released.set()
    assert time.monotonic() - began < 60  # the limits are far shorter; this ends a hang
    assert read_about(tmp_path)["state"] == "finished"
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2 * steps
    names = [name for name, *_ in good.calls if name != "flush"]
    assert names == ["start", *["log", "log", "show_table"] * steps, "summarize", "finish", "where"]
    warnings = [entry.getMessage() for entry in caplog.records]
    assert len(warnings) == (method != "where" or fault == "hangs"), warnings
    assert all("Faulty failed and logs nothing more of this run" in line and "word" not in line for line in warnings)


def test_second_interruption_ends_the_waiting(tmp_path, monkeypatch):
    released = threading.Event()
    hanging = Faulty("finish", "hangs", released)
    hanging.seconds = 3600.0

    def interrupt(*_: Any) -> None:
        raise Interrupted.by(2)

    monkeypatch.setattr(loggers._Isolated, "wait", interrupt)
    with pytest.raises(Interrupted):
        log_a_run(tmp_path, Loggers([hanging]))
    released.set()
    assert ("abandon", Ended("finished")) in hanging.calls


def test_slow_start_does_not_delay_the_run_or_lose_records(tmp_path):
    started, calls = threading.Event(), []

    class Slow(Listener):
        def __getattribute__(self, name: str) -> Any:
            if name == "start":
                return started.wait
            return super().__getattribute__(name)

    logger = Slow()
    with Tracker(tmp_path, Loggers([logger])) as tracker:
        for step in range(3):
            tracker.log(record(step))
        calls += logger.calls
        started.set()
    assert calls == []
    assert [entry[1]["step"] for entry in logger.calls if entry[0] == "log"] == [0, 1, 2]


def test_secrets_are_redacted_for_all_loggers(monkeypatch):
    class Recording(Listener):
        def __init__(self, run: LoggedRun):
            super().__init__()
            calls.append(run)

    calls: list[Any] = []
    monkeypatch.setattr(csv_logger, "CsvLogger", lambda _config, run: Recording(run) and listener)
    listener = Listener()
    run = LoggedRun("https://me:word@host", "postgresql://me:word@host", "train", {"a": ["https://word@host"]})
    external = start_loggers(TrainRun(loggers=["csv", "csv"]), run)
    external.finish(Ended("failed", 1, "no answer of https://me:word@host/x?token=word"), None)
    assert len(calls) == 1
    assert "word" not in f"{calls} {listener.calls}"
    assert (calls[0].name, calls[0].config) == ("https://***@host", {"a": ["https://***@host"]})


def test_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr("gpt2.validation.find_spec", lambda name: None if name == "mlflow" else find_spec(name))
    (problem,) = [line for line in validate(TrainRun(loggers=["mlflow", "csv"])) if line.startswith("loggers")]
    assert problem == "loggers: mlflow is not installed; pip install -e '.[mlflow]', or leave it out"


def test_library_that_does_not_import_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    external = start_loggers(TrainRun(loggers=["tensorboard"]), LoggedRun("n", "g", "train", folder=tmp_path))
    external.log(record(1))
    external.finish(Ended("finished"), None)
    assert "The logger tensorboard did not start" in caplog.text


def test_full_disk_is_one_warning_of_each_logger(tmp_path, monkeypatch, caplog, capfd):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    monkeypatch.setattr("gpt2.tracking.csv_logger.atomic_write", full)
    run = LoggedRun("n", "g", "train", folder=tmp_path)
    log_a_run(tmp_path, start_loggers(TrainRun(loggers=["tensorboard", "csv"]), run))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8
    messages = sorted(entry.getMessage() for entry in caplog.records)
    assert [message.split(" failed")[0] for message in messages] == ["CSV", "TensorBoard"]
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The records of each logger after a run was killed and resumed


def kill_and_resume(folder: Path) -> None:
    (folder / "corpus.txt").write_text(TEXT)
    workspace = Workspace(folder)
    workspace.environment["GPT2_FAULT"] = "kill@7"
    arguments = [*TINY, "hydra.run.dir=run", "train.save_every=4", "train.max_steps=10", "train.log_every=1", ALL]
    assert workspace.start("train.py", *arguments).wait(600) == -9
    del workspace.environment["GPT2_FAULT"]
    (folder / "output").write_text(workspace.run("train.py", "resume=run").stdout)


@pytest.fixture(scope="module")
def resumed() -> Path:
    return made_once("loggers", kill_and_resume)


def records_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def test_run_prints_where_each_logger_writes(resumed):
    lines = (resumed / "output").read_text().splitlines()
    assert "  TensorBoard: tensorboard --logdir ." in lines
    assert "  MLflow: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri outputs/mlruns" in lines
    assert "  CSV: run/metrics.csv" in lines


def test_csv_is_metrics_jsonl(resumed):
    with (resumed / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    numbers = [{key: float(value) for key, value in row.items() if value} for row in rows]
    records = records_of(resumed / "run")
    written = [{key: value for key, value in r.items() if isinstance(value, int | float)} for r in records]
    assert numbers == written
    assert list(rows[0])[:4] == ["step", "tokens", "seconds", "train/loss"]


def test_tensorboard_has_everything_once(resumed):
    events = EventAccumulator(str(resumed / "run" / "tensorboard"))
    events.Reload()
    records = records_of(resumed / "run")
    for key in ("train/loss", "val/loss", "tokens"):
        written = [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in records if key in r]
        assert [(event.step, event.value) for event in events.Scalars(key)] == written
    texts = events.Tags()["tensors"]
    samples = [(r["step"], r["sample"]) for r in records if "sample" in r]
    shown = [
        (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("samples/text_summary")
    ]
    assert [(step, text.replace("    ", "").rstrip("\n")) for step, text in shown] == [
        (step, sample.rstrip("\n")) for step, sample in samples
    ]
    assert {"configuration/text_summary", "state/text_summary"} <= set(texts)
    assert b"finished" in events.Tensors("state/text_summary")[-1].tensor_proto.string_val[0]
    assert "curves" in events.Tags()["images"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_mlflow_continues_the_run(resumed):
    name = (resumed / "run" / "mlflow_id").read_text()
    (folder,) = (resumed / "outputs" / "mlruns").glob(f"*/{name}")
    (experiment,) = [path for path in (resumed / "outputs" / "mlruns").iterdir() if path.name not in ("0", ".trash")]
    assert list(experiment.glob("*/tags")) == [folder / "tags"]
    metrics = [line.split() for line in (folder / "metrics" / "train" / "loss").read_text().splitlines()]
    written = {r["step"]: r["train/loss"] for r in records_of(resumed / "run") if "train/loss" in r}
    assert {int(step): float(value) for _, value, step in metrics} == written  # repeated steps are recorded twice
    assert (folder / "params" / "model.d_model").read_text() == "32"
    tags = {path.name: path.read_text() for path in (folder / "tags").iterdir()}
    assert (tags["group"], tags["job_type"], tags["state"]) == ("gpt2", "train", "finished")
    samples = json.loads((folder / "artifacts" / "samples.json").read_text())
    assert [row[0] for row in samples["data"]] == [4, 8, 10]
    assert (folder / "artifacts" / "curves.png").exists()
    assert "status: 3" in (folder / "meta.yaml").read_text()  # finished
    assert json.loads((folder / "artifacts" / "config.json").read_text())["train"]["max_steps"] == 10


def test_tensorboard_has_the_sample_of_the_step_that_is_resumed(tmp_path):
    """The run was interrupted during a validation, which the resumed run repeats."""
    run = LoggedRun("n", "g", "train", folder=tmp_path, step=8)
    with Tracker(tmp_path, start_loggers(TrainRun(loggers=["tensorboard"]), run)) as tracker:
        tracker.log(record(8, **{"val/loss": 2.0}), sample="of step 8")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("samples/text_summary")] == [8]


@pytest.mark.slow
def test_mlflow_database_writes_below_outputs_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainRun(loggers=["mlflow"], mlflow=MlflowConfig(tracking_uri="sqlite:///outputs/mlflow.db"))
    external = start_loggers(config, LoggedRun("n", "g", "train", {"a": 1}))
    external.log(record(1, **{"train/loss": 2.0}))
    external.finish(Ended("finished"), None)
    assert external.where()[0].endswith(" at sqlite:///outputs/mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert len(list(tmp_path.glob("outputs/mlartifacts/*/artifacts/config.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("server", ["silent", "refuses"])
def test_failing_mlflow_server_costs_seconds_and_changes_nothing(trained, workspace, server):
    del workspace.environment[loggers.PATIENCE]  # the product's limits
    with black_hole() as url:
        uri = url if server == "silent" else "http://127.0.0.1:9"
        done = workspace.run("train.py", *TINY, "sample_prompt=def f", "loggers=[mlflow]", f"mlflow.tracking_uri={uri}")
    assert [line for line in done.stdout.splitlines() if "MLflow" in line] == [
        "MLflow failed and logs nothing more of this run; metrics.jsonl is complete: no answer within 5 s"
    ]
    losses = [[r.get("train/loss", r.get("val/loss")) for r in records_of(w.runs()[0])] for w in (trained, workspace)]
    assert losses[0] == losses[1]
    assert read_about(workspace.runs()[0])["state"] == "finished"
