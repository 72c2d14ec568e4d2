"""The loss curves of a run."""

from gpt2.analysis.plotting import draw_curves
from gpt2.tracking.tracker import Tracker
from tests.tracking.test_tracker import record


def test_draw_curves_of_runs_with_and_without_evaluations(tmp_path):
    tracker = Tracker(tmp_path)
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "nothing.png")
    tracker.log(record(1, **{"train/loss": 2.5}))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "training.png")
    tracker.log(record(2, **{"val/loss": 2.0}))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "both.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("nothing", "training", "both")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3
