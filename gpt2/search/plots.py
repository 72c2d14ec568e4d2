"""The pictures of a study: history, learning curves of the trials, importances, and slices.

Unlike `optuna.visualization`, they show pruned trials, mark the best one, and leave room for the better trials.
"""

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from gpt2.analysis.plotting import BEST, FAINT, new_figure, picture, plain
from gpt2.search.trial import WITH_VALUE, best_of

COMPLETE, PRUNED = "#3f6ea3", "#b9b9b9"
LOSS = "validation loss (nats a token)"
MIN_TRIALS_FOR_IMPORTANCES = 10  # complete ones
PRUNED_MARK: dict[str, Any] = {"marker": "x", "markersize": 5, "color": PRUNED, "linestyle": "none"}
BEST_MARK: dict[str, Any] = {"marker": "o", "markersize": 7, "color": BEST, "zorder": 3}


def draw(study: optuna.Study) -> dict[str, bytes]:
    """The pictures for which there is data, as PNG by file name."""
    figures = {name: plot(study) for name, plot in PICTURES.items()}
    return {name: picture(figure) for name, figure in figures.items() if figure is not None}


def _trials(study: optuna.Study) -> list[FrozenTrial]:
    """Complete and pruned trials. A trial that diverged before its first evaluation has no value."""
    return [trial for trial in study.get_trials(deepcopy=False, states=WITH_VALUE) if trial.value is not None]


def _is_complete(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE


def _set_limits(axes: Axes, study: optuna.Study, values: list[float]) -> None:
    """Fit the axis to the better nine tenths of the values if there are many."""
    values = sorted(values, reverse=study.direction == StudyDirection.MAXIMIZE)  # the best first
    shown = values[: len(values) - len(values) // 10] if len(values) >= 20 else values
    low, high = min(shown), max(shown)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def history(study: optuna.Study) -> Figure | None:
    """The value of each trial, and the best so far."""
    trials = _trials(study)
    best_so_far: list[tuple[int, float]] = []
    better = min if study.direction == StudyDirection.MINIMIZE else max
    figure = new_figure()
    axes = figure.subplots()
    for trial in trials:
        assert trial.value is not None
        if _is_complete(trial):
            best = better(trial.value, best_so_far[-1][1]) if best_so_far else trial.value
            best_so_far.append((trial.number, best))
            axes.plot(trial.number, trial.value, "o", color=COMPLETE)
        else:
            axes.plot(trial.number, trial.value, **PRUNED_MARK)
    if not best_so_far:
        return None
    best_so_far.append((trials[-1].number, best_so_far[-1][1]))
    axes.step(*zip(*best_so_far, strict=True), where="post", color=BEST)
    _set_limits(axes, study, [trial.value for trial in trials if trial.value is not None])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, xlabel="trial", ylabel=LOSS)
    complete = Line2D([], [], color=COMPLETE, marker="o", linestyle="none", label="complete")
    _add_legend(axes, trials, complete, "best so far")
    return figure


def _add_legend(axes: Axes, trials: list[FrozenTrial], complete: Line2D, best: str | None) -> None:
    handles = [complete]
    if not all(map(_is_complete, trials)):
        handles.append(Line2D([], [], label="pruned", **PRUNED_MARK))
    if best:
        handles.append(Line2D([], [], color=BEST, label=best))
    axes.legend(handles=handles, frameon=False)


def evaluations(study: optuna.Study) -> Figure | None:
    """The loss of each trial at its evaluations."""
    trials = [trial for trial in _trials(study) if trial.intermediate_values]
    if not trials:
        return None
    figure = new_figure()
    axes = figure.subplots()
    best = best_of(study)
    for trial in trials:
        points = sorted((number + 1, value) for number, value in trial.intermediate_values.items())
        is_best = best is not None and trial.number == best.number
        color = BEST if is_best else FAINT if _is_complete(trial) else PRUNED
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2 if is_best else 1, zorder=3 if is_best else 2)
        if not _is_complete(trial):
            axes.plot(*points[-1], **PRUNED_MARK)
    _set_limits(axes, study, [value for trial in trials for value in trial.intermediate_values.values()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, xlabel="evaluation", ylabel=LOSS)
    complete = Line2D([], [], color=FAINT, label="complete")
    _add_legend(axes, trials, complete, f"trial {best.number}, the best" if best else None)
    return figure


def importances(study: optuna.Study) -> Figure | None:
    """The importance of each parameter for being among the best trials, by PED-ANOVA (Watanabe et al., 2023)."""
    if sum(map(_is_complete, _trials(study))) < MIN_TRIALS_FOR_IMPORTANCES:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (RuntimeError, ValueError, UserWarning):  # the complete trials differ too little
        return None
    if not shares or not sum(shares.values()) > 0:
        return None
    figure = new_figure(height=1.2 + 0.45 * len(shares))
    axes = figure.subplots()
    names, values = list(reversed(shares.keys())), list(reversed(shares.values()))
    axes.bar_label(axes.barh(names, values, color=COMPLETE), fmt=lambda share: f"{share:.0%}", padding=4)
    axes.set_xlim(0, 1.12 * max(values))
    axes.set_xticks([])
    plain(axes, xlabel="importance for being among the best tenth of the complete trials")
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    return figure


def slices(study: optuna.Study) -> Figure | None:
    """The value over each parameter."""
    trials = _trials(study)
    keys = sorted({key for trial in trials for key in trial.params})
    if not keys:
        return None
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure = new_figure(3.2 * columns + 0.6, 2.8 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    best = best_of(study)
    for axes, key in zip(grid.flat, keys, strict=False):
        _slice(axes, key, [trial for trial in trials if key in trial.params], best)
    _set_limits(grid[0][0], study, [trial.value for trial in trials if trial.value is not None])
    for row in grid:
        row[0].set_ylabel("validation loss")
    for axes in list(grid.flat)[len(keys) :]:
        axes.set_visible(False)
    return figure


def _slice(axes: Axes, key: str, trials: list[FrozenTrial], best: FrozenTrial | None) -> None:
    distribution = trials[0].distributions[key]
    x = [trial.params[key] for trial in trials]
    if isinstance(distribution, CategoricalDistribution):
        x = [distribution.choices.index(choice) for choice in x]
        axes.set_xticks(range(len(distribution.choices)), list(map(str, distribution.choices)))
    elif getattr(distribution, "log", False) and len(set(x)) > 1:
        axes.set_xscale("log")
        is_short = max(x) < 10 * min(x)  # powers of ten alone would not label such an axis
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}" if is_short else NullFormatter())
    for place, trial in zip(x, trials, strict=True):
        style = PRUNED_MARK
        if _is_complete(trial):
            is_best = best is not None and trial.number == best.number
            style = BEST_MARK if is_best else {"marker": "o", "markersize": 4, "color": COMPLETE}
        axes.plot(place, trial.value, **style)  # type: ignore[arg-type]  # `_trials` have values
    plain(axes, xlabel=key)


PICTURES: dict[str, Callable[[optuna.Study], Figure | None]] = {
    "history.png": history,
    "evaluations.png": evaluations,
    "importances.png": importances,
    "slices.png": slices,
}
