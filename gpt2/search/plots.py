"""What a study has found, in pictures: its course, its trials on their way, what mattered, and how."""

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from gpt2.analysis.plotting import BEST, FAINT, new_figure, picture, plain
from gpt2.search.trial import best_of

COMPLETE, PRUNED = "#3f6ea3", "#b9b9b9"
FEWEST_FOR_IMPORTANCES = 10  # complete trials
MARK_OF_PRUNED: dict[str, Any] = {"marker": "x", "markersize": 5, "color": PRUNED, "linestyle": "none"}


def draw(study: optuna.Study) -> dict[str, bytes]:
    """PNGs by their names: those that the study has something for."""
    figures = {name: draw_it(study) for name, draw_it in PICTURES.items()}
    drawn = {}
    for name, figure in figures.items():
        if figure is not None:
            drawn[name] = picture(figure)
    return drawn


def _limit(axes: Axes, study: optuna.Study, values: list[float]) -> None:
    """Of many values, leave room for the better nine tenths, not for what went astray."""
    values = sorted(values)
    worst = len(values) // 10 if len(values) >= 20 else 0
    is_less_better = study.direction == optuna.study.StudyDirection.MINIMIZE
    kept = values[: len(values) - worst] if is_less_better else values[worst:]
    margin = 0.08 * (kept[-1] - kept[0]) or 0.1
    axes.set_ylim(kept[0] - margin, kept[-1] + margin)


def _trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Those that have a value; a trial that diverged before its first evaluation has none."""
    return [trial for trial in study.get_trials(deepcopy=False, states=states) if trial.value is not None]


def _values(trials: list[FrozenTrial]) -> list[float]:
    return [trial.value for trial in trials if trial.value is not None]


def history(study: optuna.Study) -> Figure | None:
    """The value of each trial, and the best so far."""
    complete, pruned = (_trials(study, state) for state in (TrialState.COMPLETE, TrialState.PRUNED))
    if not complete:
        return None
    figure = new_figure()
    axes = figure.subplots()
    if pruned:
        axes.plot([t.number for t in pruned], _values(pruned), label="pruned, when it was", **MARK_OF_PRUNED)
    axes.plot([t.number for t in complete], _values(complete), "o", color=COMPLETE, label="complete")
    better = min if study.direction == optuna.study.StudyDirection.MINIMIZE else max
    so_far = [better(_values(complete)[: n + 1]) for n in range(len(complete))]
    last = max(trial.number for trial in [*complete, *pruned])
    axes.step(
        [*(t.number for t in complete), last], [*so_far, so_far[-1]], where="post", color=BEST, label="best so far"
    )
    _limit(axes, study, _values([*complete, *pruned]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, xlabel="trial", ylabel="validation loss (nats a token)")
    axes.legend(frameon=False)
    return figure


def evaluations(study: optuna.Study) -> Figure | None:
    """The loss of each trial on its way."""
    trials = [t for t in _trials(study, TrialState.COMPLETE, TrialState.PRUNED) if t.intermediate_values]
    if not trials:
        return None
    figure = new_figure()
    axes = figure.subplots()
    best = best_of(study)
    last_values = []
    for trial in trials:
        points = sorted((number + 1, value) for number, value in trial.intermediate_values.items())
        is_best = best is not None and trial.number == best.number
        is_pruned = trial.state == TrialState.PRUNED
        colour = BEST if is_best else PRUNED if is_pruned else FAINT
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=2 if is_best else 1, zorder=3 if is_best else 2)
        if is_pruned:
            axes.plot(*points[-1], **MARK_OF_PRUNED)
        last_values += [value for _, value in points]
    _limit(axes, study, last_values)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, xlabel="evaluation", ylabel="validation loss (nats a token)")
    handles = [Line2D([], [], color=FAINT, label="complete")]
    if any(trial.state == TrialState.PRUNED for trial in trials):
        handles.append(Line2D([], [], label="pruned", **MARK_OF_PRUNED))
    if best:
        handles.insert(0, Line2D([], [], color=BEST, linewidth=2, label=f"trial {best.number}, the best"))
    axes.legend(handles=handles, frameon=False)
    return figure


def importances(study: optuna.Study) -> Figure | None:
    """How much each parameter has to do with being among the better trials, by PED-ANOVA (Watanabe et al., 2023)."""
    if len(_trials(study, TrialState.COMPLETE)) < FEWEST_FOR_IMPORTANCES:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (RuntimeError, ValueError, UserWarning):  # too few complete trials to tell
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
    """The value over each parameter by itself."""
    trials = _trials(study, TrialState.COMPLETE, TrialState.PRUNED)
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
    _limit(grid[0][0], study, _values(trials))
    for row in grid:
        row[0].set_ylabel("validation loss")
    for axes in list(grid.flat)[len(keys) :]:
        axes.set_visible(False)
    return figure


def _slice(axes: Axes, key: str, trials: list[FrozenTrial], best: FrozenTrial | None) -> None:
    distribution = trials[0].distributions[key]
    places = [trial.params[key] for trial in trials]
    if isinstance(distribution, CategoricalDistribution):
        places = [distribution.choices.index(choice) for choice in places]
        axes.set_xticks(range(len(distribution.choices)), list(map(str, distribution.choices)))
    elif isinstance(distribution, FloatDistribution | IntDistribution) and distribution.log and len(set(places)) > 1:
        axes.set_xscale("log")
        is_short = max(places) < 10 * min(places)  # too short for powers of ten to label it
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}" if is_short else NullFormatter())
    for place, trial, value in zip(places, trials, _values(trials), strict=True):
        if trial.state == TrialState.PRUNED:
            axes.plot(place, value, **MARK_OF_PRUNED)
        elif best is not None and trial.number == best.number:
            axes.plot(place, value, "o", color=BEST, markersize=7, zorder=3)
        else:
            axes.plot(place, value, "o", color=COMPLETE, markersize=4)
    plain(axes, xlabel=key)


PICTURES: dict[str, Callable[[optuna.Study], Figure | None]] = {
    "history.png": history,
    "evaluations.png": evaluations,
    "importances.png": importances,
    "slices.png": slices,
}
