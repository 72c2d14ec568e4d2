"""Metrics, pictures and W&B: what is told is kept, and no listener can stop a run."""

import json
import logging
import subprocess
import sys

import pytest

from gpt2.config import TrainRun, WandbConfig
from gpt2.tracking import Tracker, _modes, draw_curves, read_metrics, start_wandb, time_left


def record(step: int, **values: float) -> dict:
    return {"step": step, "tokens": step * 100, "seconds": step / 10, **values}


def test_metrics_are_one_json_object_a_line(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log(record(1, **{"train/loss": 2.5}))
    tracker.log(record(2, **{"val/loss": float("nan"), "val/perplexity": float("inf")}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == record(1, **{"train/loss": 2.5})
    assert json.loads(lines[1]) == record(2, **{"val/loss": None, "val/perplexity": None})


def test_cutting_back_forgets_later_steps_and_a_line_cut_by_a_crash(tmp_path):
    tracker = Tracker(tmp_path)
    for step in range(1, 6):
        tracker.log(record(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')
    tracker.cut_back(3, evaluated_at=0)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_an_evaluation_that_the_checkpoint_does_not_know_of_is_forgotten_with_its_sample(tmp_path):
    tracker = Tracker(tmp_path)
    for step in (2, 4):
        tracker.log(record(step, **{"train/loss": 2.0}))
        tracker.log(record(step, **{"val/loss": 2.0}), sample=f"text {step}")
    before = (tmp_path / "samples.md").read_text()
    resumed = Tracker(tmp_path)
    resumed.cut_back(4, evaluated_at=2)
    assert [(r["step"], "val/loss" in r) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (2, False),
        (2, True),
        (4, False),
    ]
    assert resumed.samples == [(2, "text 2")]
    resumed.log(record(4, **{"val/loss": 2.0}), sample="text 4")
    assert (tmp_path / "samples.md").read_text() == before


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracker() as tracker:
        tracker.log(record(1), sample="text")
        tracker.cut_back(0, 0)
        tracker.flush()
    assert not list(tmp_path.iterdir())


def test_curves_are_drawn_also_of_a_run_that_was_never_evaluated(tmp_path):
    tracker = Tracker(tmp_path)
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "nothing.png")
    tracker.log(record(1, **{"train/loss": 2.5}))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "training.png")
    tracker.log(record(2, **{"val/loss": 2.0}))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "both.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("nothing", "training", "both")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3


class BrokenGuest:
    """A W&B run whose connection is gone."""

    calls = 0

    def log(self, _record):
        self.calls += 1
        raise ConnectionError("gone")


def test_a_wandb_that_fails_is_dropped_with_one_warning_and_the_file_has_everything(tmp_path, caplog):
    guest = BrokenGuest()
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, guest) as tracker:
        for step in (1, 2, 3):
            tracker.log(record(step))
    assert guest.calls == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_wandb_off_starts_nothing(tmp_path):
    assert start_wandb(TrainRun(wandb=WandbConfig(mode="off")), tmp_path, tmp_path / "outputs", {}) is None
    assert not (tmp_path / "outputs").exists()


def test_a_server_that_refuses_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    with caplog.at_level(logging.WARNING):
        config = TrainRun("name", wandb=WandbConfig(mode="online"))
        run = start_wandb(config, run_folder, tmp_path / "outputs", {"a": 1})
    assert run is not None
    assert run.offline
    with Tracker(run_folder, run) as tracker:
        tracker.log(record(1))
        assert "wandb sync" in tracker.where_in_wandb()
    assert "kept offline" in caplog.text
    assert (run_folder / "wandb_id").read_text() == run.id


def test_asking_for_online_without_an_account_is_offline_without_a_question(workspace):
    """In a process of its own: within one, wandb remembers an account."""
    code = "import logging as l; l.basicConfig(); from gpt2.tracking import _modes as m; print(m('online'), m('auto'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=workspace.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['offline'] ['offline']"
    assert done.stderr.count("nobody is logged in") == 1


def test_the_environment_variable_of_wandb_counts_in_auto(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _modes("auto") == ["offline"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3661, "1:01:01"), (None, "-:--"), (float("inf"), "-:--")]
)
def test_time_left_is_written_as_clocks_do(seconds, text):
    assert time_left(seconds) == text
