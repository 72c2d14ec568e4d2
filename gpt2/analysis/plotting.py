"""The style of all plots, and the loss curves of a single run."""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gpt2.analysis.runs import RunResult
from gpt2.runtime.console import printable

BEST, FAINT = "#c8502d", "#9db4d0"


def new_figure(width: float = 8, height: float = 4.5) -> Figure:
    """A figure without pyplot's global state; sizes in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def plain(axes: Axes, **labels: Any) -> None:
    """Label axes, with a faint grid and no frame."""
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def as_label(text: str) -> str:
    """Escape a text for matplotlib, which sets text between dollars as formulas and hides labels that begin with _.

    Without control characters, which no font has, and which make an SVG file invalid.
    """
    return ("\u200b" if text.startswith("_") else "") + printable(text).replace("$", r"\$")


def picture(figure: Figure, kind: str = "png") -> bytes:
    """The content of a png, svg or pdf file."""
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()


def draw_curves(metrics: Path, picture: Path) -> None:
    """Plot the training and validation loss of a run over tokens."""
    loss_curves(RunResult(metrics.parent)).savefig(picture)


def loss_curves(run: RunResult) -> Figure:
    """The legend is above the axes, where it covers no curve of any shape."""
    figure = new_figure()
    axes = figure.subplots()
    training, validation = (run.curve(key, "tokens") for key in ("train/loss", "val/loss"))
    if training:
        axes.plot(*zip(*training, strict=True), color=FAINT, linewidth=1.2, label="training")
    if validation:
        label = f"validation, best {min(loss for _, loss in validation):.3f}"
        axes.plot(*zip(*validation, strict=True), "o-", color=BEST, linewidth=2, markersize=4, label=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    plain(axes, xlabel="tokens", ylabel="loss (nats per token)")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure
