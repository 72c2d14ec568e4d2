"""The loss curves of a run."""

import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from gpt2.analysis.plotting import draw_curves, label_ends, loss_curves, new_figure
from gpt2.analysis.runs import RunResult
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


SHAPES = {  # validation losses
    "rising": [2.0, 3.0, 5.0, 9.0],
    "everywhere": [1.0, 9.0] * 20,
    "steep": [1e6, 1.0, 1e-3],
}


@pytest.mark.parametrize("losses", SHAPES.values(), ids=SHAPES)
def test_names_cover_no_curve(tmp_path, losses):
    records = []
    for number, loss in enumerate(losses, 1):
        at = {"step": number, "tokens": number * 1000, "seconds": 1.0}
        records += [{**at, "train/loss": loss * 0.9}, {**at, "val/loss": loss}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    figure = loss_curves(RunResult(tmp_path))
    FigureCanvasAgg(figure).draw()  # the canvas of a bare figure draws nothing
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"training", f"validation, best {min(losses):.3f}"}
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without its leader line
    for box in boxes:
        assert figure.bbox.fully_containsx(box.x1 - 1)
        assert figure.bbox.fully_containsy(box.y0 + 1)
        assert figure.bbox.fully_containsy(box.y1 - 1)
        assert not box.overlaps(axes.bbox)  # curves are clipped to it
    assert not boxes[0].overlaps(boxes[1])


@pytest.mark.parametrize("lines", [1, 18, 60])
def test_names_of_many_lines_stay_beside_the_axes(lines):
    axes = new_figure().subplots()
    ends = [(1.0, float(number), str(number), "black") for number in range(lines)]
    for x, y, *_ in ends:
        axes.plot([0, x], [0, y])
    label_ends(axes, ends)
    heights = [text.xyann[1] for text in axes.texts]
    assert heights == sorted(set(heights))
    assert heights[0] > -1e-9 and heights[-1] <= 1
