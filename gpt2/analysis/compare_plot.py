"""A comparison as a figure: the validation loss over tokens and over time."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from gpt2.analysis.compare import Comparison, without_middle
from gpt2.analysis.plotting import label_ends, new_figure, plain
from gpt2.analysis.runs import SEED, UNITS, RunResult

MAX_NAMED = 12  # groups with a name and a colour; the others are grey
MAX_LETTERS = 40  # longer names would leave no room for the lines
GREY_LINE, GREY_TEXT = "#c9c9c9", "#7f7f7f"


def colours(values: Sequence[Any]) -> list[str]:
    """Return a colour for each of the distinct values. Three or more numbers get a colour scale in their order."""
    if len(values) > 2 and all(isinstance(value, int | float) for value in values):
        order = sorted(values)
        return [to_hex(colormaps["viridis"](0.85 * order.index(value) / (len(values) - 1))) for value in values]
    scale = colormaps["tab10" if len(values) <= 10 else "tab20"]
    return [to_hex(scale(place % scale.N)) for place in range(len(values))]


def curves(comparison: Comparison, svg_id: Callable[[RunResult], str] | None = None) -> Figure:
    """Plot all runs over tokens and over time. Runs that differ only in their seed share a colour and a name.

    Args:
        svg_id: Returns the id of a run's lines in SVG.
    """
    groups: dict[str, list[RunResult]] = {}
    for run in comparison.runs:
        groups.setdefault(comparison.group(run), []).append(run)
    named = list(groups)[:MAX_NAMED]
    palette = dict(zip(named, colours(_values(comparison, [groups[label][0] for label in named])), strict=True))

    metric = "bits_per_byte" if comparison.in_bits else "loss"
    time_label, scale = _unit_of_time(comparison.runs)
    by_tokens, by_time = (figure := new_figure(8.5, 4)).subplots(1, 2, sharey=True)
    ends: dict[str, tuple[float, float, str, str]] = {}
    for label, runs in groups.items():
        style = {"color": palette.get(label, GREY_LINE), "zorder": 2 + (label in palette)}
        name = f"{len(groups) - len(named)} others"
        if label in palette:
            name = without_middle(label, MAX_LETTERS) + _count(runs)
        for run in runs:
            for axes, x, factor in ((by_tokens, "tokens", 1.0), (by_time, "seconds", scale)):
                points = [(place / factor, y) for place, y in run.curve(f"val/{metric}", x)]
                _line(axes, points, style, svg_id and svg_id(run))
            if points:
                ends.setdefault(label if label in palette else "", (*points[-1], name, palette.get(label, GREY_TEXT)))

    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_tokens.xaxis.set_major_locator(MaxNLocator(4))
    plain(by_tokens, xlabel="tokens", ylabel=UNITS[metric])
    plain(by_time, xlabel=time_label)
    label_ends(by_time, list(ends.values()))
    return figure


def _line(axes: Axes, points: list[tuple[float, float]], style: dict[str, Any], gid: str | None) -> None:
    if points:
        x, y = zip(*points, strict=True)
        mark: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) < 25 else {}
        axes.plot(x, y, linewidth=1.4, gid=gid and f"{gid}-{id(axes)}", **mark, **style)


def _count(runs: list[RunResult]) -> str:
    seeds = len({run.config.get(SEED) for run in runs})
    return f" ({seeds} seeds)" if seeds > 1 else f" ({len(runs)} runs)" if len(runs) > 1 else ""


def _values(comparison: Comparison, runs: list[RunResult]) -> list[Any]:
    """Return what the colours of runs show: the values of the only distinguishing key, or otherwise their groups."""
    keys = [key for key in comparison.distinguishing if key != SEED]
    return [run.config.get(keys[0]) if len(keys) == 1 else comparison.group(run) for run in runs]


def _unit_of_time(runs: list[RunResult]) -> tuple[str, float]:
    longest = max((run.last("seconds") or 0 for run in runs), default=0)
    return ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60) if longest > 120 else ("seconds", 1)
