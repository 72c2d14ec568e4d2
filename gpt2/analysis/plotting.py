"""The style of all plots, and the plot of the losses of a single run."""

import io
from hashlib import sha256
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gpt2.analysis.runs import RunResult
from gpt2.runtime.console import printable

BEST, FAINT = "#c8502d", "#9db4d0"
LABEL_HEIGHT = 0.22  # inches


def new_figure(width: float = 6.5, height: float = 4) -> Figure:
    """Return a figure without pyplot's global state, sizes in inches. Shown 600 pixels wide, its text is 13 high."""
    return Figure(figsize=(width, height), dpi=180, layout="constrained")


def plain(axes: Axes, **labels: Any) -> None:
    """Set the labels of axes, and give them a faint grid and no frame."""
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], panels: int = 1) -> None:
    """Write the name of each line at the right edge of the axes, in the colour of the line, instead of a legend.

    Names that would overlap are moved apart, and a thin line connects each name with its point. Call this last, because
    it reads the limits of the axes.

    Args:
        ends: For each line its last point, name and colour: (x, y, name, colour).
        panels: The number of axes below each other in the figure.
    """
    axes.autoscale_view()  # matplotlib would compute the limits when it draws
    figure, to_axes = axes.get_figure(root=True), axes.transScale + axes.transLimits
    assert figure
    heights = list[float]()
    named = sorted((to_axes.transform((x, y))[1], x, y, name, colour) for x, y, name, colour in ends)
    # All labels fit beside the axes.
    gap = min(LABEL_HEIGHT * panels / figure.get_figheight(), 1 / max(1, len(ends) - 1))
    for height, *_ in named:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    highest = 1.0
    for place in reversed(range(len(heights))):
        heights[place] = highest = min(heights[place], highest)
        highest -= gap
    for height, (_, x, y, name, colour) in zip(heights, named, strict=True):
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "color": colour, "linewidth": 0.7, "alpha": 0.6}
        line |= {"shrinkA": 1, "shrinkB": 3}
        axes.annotate(
            *(as_label(name), (x, y), (1.03, height)),
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops=line,
            annotation_clip=False,
        )


def as_label(text: str) -> str:
    """Escape a text for matplotlib, where `$...$` is a formula and labels that begin with `_` are hidden.

    Control characters are removed: no font has them, and they make an SVG file invalid.
    """
    return ("\u200b" if text.startswith("_") else "") + printable(text).replace("$", r"\$")


def picture(figure: Figure, kind: str = "png", source: bytes | None = None) -> bytes:
    """Return a figure as the content of a png, svg or pdf file.

    Args:
        source: The content of the file from which a png is drawn. Its SHA-256 becomes the metadata `Source`.
    """
    content = io.BytesIO()
    figure.savefig(content, format=kind, metadata={"Source": sha256(source).hexdigest()} if source else None)
    return content.getvalue()


def draw_curves(metrics: Path, target: Path) -> None:
    """Plot the training and validation loss of a run over tokens."""
    source = metrics.read_bytes() if metrics.exists() else None
    target.write_bytes(picture(loss_curves(RunResult(metrics.parent)), source=source))


def loss_curves(run: RunResult) -> Figure:
    axes = (figure := new_figure()).subplots()
    training, validation = (run.curve(key, "tokens") for key in ("train/loss", "val/loss"))
    ends = []
    if training:
        axes.plot(*zip(*training, strict=True), color=FAINT, linewidth=1.2)
        ends.append((*training[-1], "training", FAINT))
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color=BEST, linewidth=2, markersize=4)
        ends.append((*validation[-1], f"validation, best {min(loss for _, loss in validation):.3f}", BEST))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    plain(axes, xlabel="tokens", ylabel="loss (nats per token)")
    label_ends(axes, ends)
    return figure
