"""The pictures of a study: those that Optuna draws, and the learning curves of the trials."""

import warnings
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.study import StudyDirection
from optuna.trial import TrialState
from optuna.visualization import matplotlib as optuna_plots

from gpt2.analysis.plotting import BEST, FAINT, label_ends, new_figure, picture, plain
from gpt2.search.trial import WITH_VALUE, best_of

PRUNED = "#b9b9b9"
MIN_TRIALS_FOR_IMPORTANCES = 10  # the least number of complete trials
LOSS = "validation loss (nats a token)"
STYLE: dict[Any, Any] = {"figure.dpi": 150, "savefig.bbox": "tight", "axes.formatter.min_exponent": 4}


def draw(study: optuna.Study, source: bytes) -> dict[str, bytes]:
    """The pictures for which there is data, as PNG by file name. See `picture` for `source`."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pictures = {}
    if curves := evaluations(study):
        pictures["evaluations.png"] = picture(curves, source=source)
    if complete:
        pictures["history.png"] = _draw_with_optuna(optuna_plots.plot_optimization_history, study, source)
    if any(trial.params for trial in complete):
        pictures["slices.png"] = _draw_with_optuna(optuna_plots.plot_slice, study, source)
    if len(complete) >= MIN_TRIALS_FOR_IMPORTANCES:
        pictures["importances.png"] = _draw_with_optuna(optuna_plots.plot_param_importances, study, source)
    return pictures


def _draw_with_optuna(plot: Callable[..., Any], study: optuna.Study, source: bytes) -> bytes:
    with plt.rc_context(STYLE), warnings.catch_warnings():  # the context also undoes what Optuna changes in the style
        warnings.simplefilter("ignore")
        figure = np.ravel(plot(study, target_name=LOSS))[0].figure
        for axes in figure.axes:
            if (legend := axes.get_legend()) and len(legend.get_texts()) == 1:  # it repeats the label of the y axis
                legend.remove()
        try:
            return picture(figure, source=source)
        finally:
            plt.close(figure)


def evaluations(study: optuna.Study) -> Figure | None:
    """The loss of each trial at its evaluations; None without any."""
    trials = [trial for trial in study.get_trials(deepcopy=False, states=WITH_VALUE) if trial.intermediate_values]
    if not trials:
        return None
    axes = (figure := new_figure()).subplots()
    best, ends = best_of(study), dict[str, tuple[float, float, str, str]]()
    sign, style = 1 if study.direction == StudyDirection.MINIMIZE else -1, dict[str, Any]()
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
        if name not in ends or sign * values[-1] < sign * ends[name][1]:  # the best trial of each kind gets the label
            ends[name] = points[0][-1], values[-1], name, style["color"]
    losses = [loss for trial in trials for loss in trial.intermediate_values.values()]
    # The worst tenth, such as trials that diverged, is cut off.
    low, high = np.quantile(losses, [0, 0.9] if study.direction == StudyDirection.MINIMIZE else [0.1, 1])
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, xlabel="evaluation", ylabel=LOSS)
    label_ends(axes, list(ends.values()))
    return figure
