"""Runs in one picture: validation loss against tokens, and against time or compute."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gpt2.analysis.compare import Comparison
from gpt2.analysis.plotting import as_label, new_figure, plain
from gpt2.analysis.runs import SEED, UNITS, RunResult

MOST_NAMED = 12  # runs, or groups of seeds, in a legend; the rest is grey
GREY = "#c9c9c9"


def colours(values: Sequence[Any]) -> list[str]:
    """A colour for each of some distinct values: a scale for three or more numbers, which have an order."""
    if len(values) > 2 and all(isinstance(value, int | float) for value in values):
        order = sorted(range(len(values)), key=lambda place: values[place])
        scale = colormaps["viridis"]
        return [to_hex(scale(0.9 * order.index(place) / (len(values) - 1))) for place in range(len(values))]
    scale = colormaps["tab10"] if len(values) <= 10 else colormaps["tab20"]
    return [to_hex(scale(place % scale.N)) for place in range(len(values))]


def curves(
    found: Comparison,
    cost: str = "seconds",
    identify: Callable[[RunResult], str] | None = None,
    palette: dict[str, str] | None = None,
    group_of: Callable[[RunResult], str] | None = None,
) -> Figure:
    """Draw all runs; those that differ by their seed only have one colour, and one line in the legend.

    Args:
        cost: What the right half is drawn against: seconds or flops.
        identify: The id of a run's lines, in SVG.
        palette: A colour for each group.
        group_of: What a run is called in the legend, if it is not what tells it from the others.
    """
    groups: dict[str, list[RunResult]] = {}
    for run in found.runs:
        groups.setdefault((group_of or found.group)(run), []).append(run)
    key = "val/bits_per_byte" if _needs_bits(found) else "val/loss"
    figure = new_figure(11, 4.8)
    by_tokens, by_cost = figure.subplots(1, 2, sharey=True)
    named = list(groups)[:MOST_NAMED]
    if palette is None:
        palette = dict(zip(named, colours(_values(found, [groups[label][0] for label in named])), strict=True))
    unit, size = _unit_of_time(found.runs) if cost == "seconds" else (UNITS[cost], 1.0)
    for label, runs in groups.items():
        for number, run in enumerate(runs):
            style: dict[str, Any] = {"color": palette.get(label, GREY), "zorder": 2 + (label in palette)}
            if label in palette and number == 0:
                seeds = len({run.config.get(SEED) for run in runs})
                many = f" ({seeds} seeds)" if seeds > 1 else f" ({len(runs)} runs)" if len(runs) > 1 else ""
                style["label"] = as_label(label + many)
            for axes, x, part in ((by_tokens, "tokens", 1.0), (by_cost, cost, size)):
                points = [(place / part, y) for place, y in run.curve(key, x)]
                _line(axes, points, style, identify and identify(run))
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    plain(by_tokens, xlabel="tokens", ylabel=UNITS["bits_per_byte" if key == "val/bits_per_byte" else "loss"])
    plain(by_cost, xlabel=unit)
    if len(groups) > len(named):
        by_tokens.plot([], [], color=GREY, label=f"{len(groups) - len(named)} others")
    handles, labels = by_tokens.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _line(axes: Axes, points: list[tuple[float, float]], style: dict[str, Any], gid: str | None) -> None:
    if points:
        x, y = zip(*points, strict=True)
        mark: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) < 25 else {}
        axes.plot(x, y, linewidth=1.4, gid=gid and f"{gid}-{id(axes)}", **mark, **style)


def _values(found: Comparison, runs: list[RunResult]) -> list[Any]:
    """What tells runs apart, if it is one key; else nothing with an order."""
    keys = [key for key in found.telling if key != SEED]
    return [run.config.get(keys[0]) if len(keys) == 1 else found.group(run) for run in runs]


def _needs_bits(found: Comparison) -> bool:
    """Whether bits a byte are what compares; then all runs must have them."""
    has_bits = all(run.values("val/bits_per_byte") for run in found.runs if run.values("val/loss"))
    return has_bits and found.tokenizers_differ


def _unit_of_time(runs: list[RunResult]) -> tuple[str, float]:
    longest = max((run.last("seconds") or 0 for run in runs), default=0)
    return ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60) if longest > 120 else ("seconds", 1)
