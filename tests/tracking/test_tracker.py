"""The files of a run: metrics, samples, and how it ended."""

import json
from contextlib import nullcontext

import pytest

from gpt2.errors import DivergenceError, UserError
from gpt2.runtime.signals import Interrupted
from gpt2.tracking.tracker import KINDS, Ended, ExternalLogger, LoggedSteps, Tracker, read_about, read_metrics


def record(step: int, **values: float) -> dict:
    return {"step": step, "tokens": step * 100, "seconds": step / 10, **values}


def test_metrics_are_json_lines(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log(record(1, **{"train/loss": 2.5}))
    tracker.log(record(2, **{"val/loss": float("nan"), "val/perplexity": float("inf")}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == record(1, **{"train/loss": 2.5})
    assert json.loads(lines[1]) == record(2, **{"val/loss": None, "val/perplexity": None})


def test_rewind_removes_later_steps_and_damaged_lines(tmp_path):
    tracker = Tracker(tmp_path)
    for step in range(1, 6):
        tracker.log(record(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')
    tracker.rewind(3, evaluated_at=0)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_rewind_removes_later_evaluation_with_sample(tmp_path):
    tracker = Tracker(tmp_path)
    for step in (2, 4):
        tracker.log(record(step, **{"train/loss": 2.0}))
        tracker.log(record(step, **{"val/loss": 2.0}), sample=f"text {step}")
    before = (tmp_path / "samples.md").read_text()
    resumed = Tracker(tmp_path)
    resumed.rewind(4, evaluated_at=2)
    assert [(r["step"], "val/loss" in r) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (2, False),
        (2, True),
        (4, False),
    ]
    assert resumed.samples == [(2, "text 2")]
    resumed.log(record(4, **{"val/loss": 2.0}), sample="text 4")
    assert (tmp_path / "samples.md").read_text() == before


def test_logged_steps_take_little_space_and_name_what_is_missing():
    logged = LoggedSteps()
    for step in (1, *range(10, 10_001, 10), *range(10_007, 20_000, 7)):
        logged.add("training records", step)
    assert logged.ranges["training records"] == [[1, 10, 9], [20, 10_000, 10], [10_007, 19_996, 7]]
    assert LoggedSteps(json.loads(json.dumps(logged.ranges))).ranges == logged.ranges
    here = {kind: set() for kind in KINDS}
    assert logged.missing_from(here) == "training records of steps 1, 10, 20, ... 19996"
    here["training records"] = {*range(20_000)} - {30, 19_989}
    assert logged.missing_from(here) == "training records of steps 30, 19989"
    here["training records"] -= {40, 50, 60}
    assert logged.missing_from(here) == "training records of steps 30, 40, 50, ... 19989"
    here["training records"] = {*range(20_000)}
    assert logged.missing_from(here) == ""


@pytest.mark.parametrize("value", [None, 5, "abc", [[1, 2]], [[1, 2, "x"]], [[1, 2, None]], [[1, float("inf"), 1]]])
def test_value_of_a_wrong_type_counts_as_no_logged_steps(value):
    for saved in (value, dict.fromkeys(KINDS, value), {"samples": []}):
        assert LoggedSteps(saved).missing_from({kind: set() for kind in KINDS}) == ""


def test_huge_ranges_are_not_enumerated():
    saved = {"training records": [], "evaluations": [], "samples": [[1, 10**30, 1], [5, 1, 1], [1, 9, -1]]}
    missing = LoggedSteps(saved).missing_from({kind: set() for kind in KINDS})
    assert missing == f"samples of steps 1, 2, 3, ... {10**30}"


def test_samples_of_either_file_are_restored(tmp_path):
    tracker = Tracker(tmp_path)
    for step in (1000, 2000, 3000):
        tracker.log(record(step, **{"val/loss": 2.0}), sample=f"text {step}\r\n## Step 7\n\n```\n")
    whole, path = (tmp_path / "samples.md").read_bytes(), tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[2])
    parts = whole.split(b"## Step 2,000")
    (tmp_path / "samples.md").write_bytes(b"## Step 2,000" + parts[1])
    resumed = Tracker(tmp_path)
    resumed.rewind(3000, 3000, tracker.logged)
    assert [step for step, _ in resumed.samples] == [2000, 3000]
    assert (tmp_path / "samples.md").read_bytes() == b"## Step 2,000" + parts[1]
    later = Tracker(tmp_path)
    logged = LoggedSteps({**resumed.logged.ranges, "samples": [[2000, 2000, 0]]})  # as in a checkpoint of step 2,500
    later.rewind(2500, 2500, logged)
    assert (tmp_path / "samples.md").read_bytes() == b"## Step 2,000" + parts[1].split(b"## Step 3,000")[0]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracker() as tracker:
        tracker.log(record(1), sample="text")
        tracker.rewind(0, 0)
        tracker.flush()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "state", "exit_code"),
    [
        (None, "finished", 0),
        (Interrupted.by(15), "interrupted", 143),
        (KeyboardInterrupt(), "interrupted", 130),
        (DivergenceError("the loss is nan"), "diverged", 3),
        (UserError("no"), "failed", 2),
        (ZeroDivisionError("division"), "failed", 1),
        (SystemExit(7), "failed", 7),
    ],
)
def test_outcome_is_stored_and_reported(tmp_path, error, state, exit_code):
    outcomes = []

    class Listener(ExternalLogger):
        def finish(self, ended: Ended, folder) -> None:
            outcomes.append((ended.state, ended.exit_code))

    tracker = Tracker(tmp_path, Listener(), about={"parameters": 7})
    with pytest.raises(type(error)) if error else nullcontext(), tracker:
        assert read_about(tmp_path)["state"] == "running"
        if error:
            raise error
    about = read_about(tmp_path)
    assert (about["state"], about["exit_code"], about["parameters"]) == (state, exit_code, 7)
    assert outcomes == [(state, exit_code)]


def test_resumed_run_keeps_start_and_clears_outcome(tmp_path):
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, about={"title": "a"}):
        raise ZeroDivisionError
    first = read_about(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**first, "started": "2026-01-01T00:00:00+00:00"}))
    with Tracker(tmp_path, about={"title": "a"}):
        now = read_about(tmp_path)
        assert (now["state"], now["reason"], now["ended"]) == ("running", None, None)
    assert read_about(tmp_path)["started"] == "2026-01-01T00:00:00+00:00"


def test_full_disk_at_end_does_not_hide_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    tracker = Tracker(tmp_path)
    with pytest.raises(ZeroDivisionError), tracker:
        monkeypatch.setattr(tracker, "_write_about", full)
        raise ZeroDivisionError


def test_full_disk_at_end_is_reported_to_external_logger(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    outcomes = []

    class Listener(ExternalLogger):
        def finish(self, ended: Ended, folder) -> None:
            outcomes.append((ended.state, ended.exit_code))

    tracker = Tracker(tmp_path, Listener())
    with pytest.raises(OSError, match="No space"), tracker:
        monkeypatch.setattr(tracker, "_write_about", full)
    assert outcomes == [("failed", 1)]


@pytest.mark.parametrize("content", [None, "", "[1]", '{"state":'])
def test_damaged_run_json_is_empty(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert read_about(tmp_path) == {}
