"""The pictures of a study: losses during each trial, values by trial and by parameter, importances."""

import warnings
from math import sqrt
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from gpt2.analysis.plotting import BEST, FAINT, as_label, label_ends, new_figure, picture, plain
from gpt2.errors import shortened
from gpt2.search.trial import WITH_VALUE, best_of

PRUNED = "#b9b9b9"
MIN_TRIALS_FOR_IMPORTANCES = 10  # fewer complete trials do not give reliable importances
PANELS_PER_ROW = 3  # in `slices`
MAX_LETTERS = 16  # the choices of a parameter are slanted if their names are longer in total
LOSS = "validation loss (nats a token)"
COMPLETE = (TrialState.COMPLETE,)


def draw(study: optuna.Study, source: bytes) -> dict[str, bytes]:
    """Return the pictures for which there is data, as PNG by file name. See `picture` for `source`."""
    figures = {f"{draw.__name__}.png": draw(study) for draw in (evaluations, history, slices, importances)}
    return {name: picture(figure, source=source) for name, figure in figures.items() if figure}


def history(study: optuna.Study) -> Figure | None:
    """Plot the values of the complete trials in order, and the best so far. None without a complete trial."""
    trials = study.get_trials(deepcopy=False, states=COMPLETE)
    if not trials:
        return None
    axes = (figure := new_figure()).subplots()
    numbers, values = [trial.number for trial in trials], np.array([trial.value for trial in trials], dtype=float)
    so_far = (np.minimum if _is_minimized(study) else np.maximum).accumulate(values)
    axes.plot(numbers, values, "o", color=FAINT, markersize=4)
    axes.step(numbers, so_far, where="post", color=BEST, linewidth=2)
    _show_all_but_the_worst(axes, study, values)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    plain(axes, xlabel="trial", ylabel=LOSS)
    label_ends(axes, [(numbers[-1], so_far[-1], "best so far", BEST)])
    return figure


def slices(study: optuna.Study) -> Figure | None:
    """Plot the values of the complete trials over each parameter. None without parameters."""
    trials = study.get_trials(deepcopy=False, states=COMPLETE)
    parameters = {key: values for trial in trials for key, values in trial.distributions.items()}
    best = best_of(study)
    if not parameters or best is None:
        return None
    rows, columns = -(-len(parameters) // PANELS_PER_ROW), min(len(parameters), PANELS_PER_ROW)
    figure = new_figure(height=1 + 2.4 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (key, distribution) in zip(panels.flat, sorted(parameters.items()), strict=False):
        for trial in [*trials, best]:  # the best one again, on top
            if key in trial.params:
                place = distribution.to_internal_repr(trial.params[key])  # the index of a choice
                axes.plot(place, trial.value, "o", color=BEST if trial.number == best.number else FAINT, markersize=4)
        _set_range(axes, distribution)
        plain(axes, xlabel=as_label(key))
    for axes in panels.flat[len(parameters) :]:
        axes.set_visible(False)
    _show_all_but_the_worst(panels[0, 0], study, [trial.value for trial in trials])
    figure.supylabel(LOSS, fontsize="medium")
    figure.suptitle(f"\u25cf  trial {best.number}, the best", color=BEST, fontsize="medium")
    return figure


def _set_range(axes: Axes, distribution: Any) -> None:
    """Make the x axis show the range of a distribution, with few labels: the panels are narrow."""
    if isinstance(distribution, CategoricalDistribution):
        names = [as_label(shortened(str(choice), 12)) for choice in distribution.choices]
        rotation, side = (30, "right") if len("".join(names)) > MAX_LETTERS else (0, "center")
        axes.set_xticks(range(len(names)), names, rotation=rotation, ha=side)
        axes.margins(x=0.2)
        return
    low, high = distribution.low, distribution.high
    if distribution.log:
        axes.set_xscale("log")
        ticks = [low, float(f"{sqrt(low * high):.2g}"), high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        for label, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set(ha=side)  # inside the panel
    else:
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=isinstance(distribution, IntDistribution)))


def importances(study: optuna.Study) -> Figure | None:
    """Plot the importance of each parameter by PED-ANOVA (Watanabe et al., 2023). None with too few complete trials."""
    if len(study.get_trials(deepcopy=False, states=COMPLETE)) < MIN_TRIALS_FOR_IMPORTANCES:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(study)
    keys = list(reversed(shares))  # the most important one at the top
    figure = new_figure(height=1 + 0.4 * len(keys))
    axes = figure.subplots()
    bars = axes.barh([as_label(key) for key in keys], [shares[key] for key in keys], color=FAINT)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    plain(axes, xlabel="importance for the validation loss (sum: 1)")
    axes.grid(visible=False, axis="y")
    return figure


def _is_minimized(study: optuna.Study) -> bool:
    return study.direction == StudyDirection.MINIMIZE


def _show_all_but_the_worst(axes: Axes, study: optuna.Study, losses: Any) -> None:
    """Limit the y axis to the best 90 % of more than ten losses: diverged trials would flatten the others."""
    if _is_minimized(study):
        low, high = np.quantile(losses, [0, 0.9], method="higher")
    else:
        low, high = np.quantile(losses, [0.1, 1], method="lower")
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def evaluations(study: optuna.Study) -> Figure | None:
    """Plot the losses at the evaluations of each trial. None without evaluations."""
    trials = [trial for trial in study.get_trials(deepcopy=False, states=WITH_VALUE) if trial.intermediate_values]
    if not trials:
        return None
    axes = (figure := new_figure()).subplots()
    best, ends = best_of(study), dict[str, tuple[float, float, str, str]]()
    sign, style = 1 if _is_minimized(study) else -1, dict[str, Any]()
    for trial in trials:
        numbers, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        points = [number + 1 for number in numbers], values
        if trial == best:
            name, style = f"trial {trial.number}, the best", {"color": BEST, "linewidth": 2, "zorder": 3}
        elif trial.state == TrialState.PRUNED:
            name, style = "pruned", {"color": PRUNED, "linewidth": 1, "marker": "x", "markevery": [-1]}
        else:
            name, style = "complete", {"color": FAINT, "linewidth": 1}
        axes.plot(*points, **style)
        if name not in ends or sign * values[-1] < sign * ends[name][1]:  # only the best trial of each kind is labelled
            ends[name] = points[0][-1], values[-1], name, style["color"]
    losses = [loss for trial in trials for loss in trial.intermediate_values.values()]
    _show_all_but_the_worst(axes, study, losses)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, xlabel="evaluation", ylabel=LOSS)
    label_ends(axes, list(ends.values()))
    return figure
