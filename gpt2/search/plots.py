"""The pictures of a study: those of Optuna, and the learning curves of its trials."""

import warnings
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as optuna_plots

from gpt2.analysis.plotting import BEST, FAINT, new_figure, picture, plain
from gpt2.search.trial import WITH_VALUE, best_of

PRUNED = "#b9b9b9"
PRUNED_MARK: dict[str, Any] = {"marker": "x", "markersize": 5, "color": PRUNED, "linestyle": "none"}
MIN_TRIALS_FOR_IMPORTANCES = 10  # complete ones
LOSS = "validation loss (nats a token)"
STYLE: dict[Any, Any] = {"figure.dpi": 150, "savefig.bbox": "tight", "axes.formatter.min_exponent": 4}


def draw(study: optuna.Study) -> dict[str, bytes]:
    """The pictures for which there is data, as PNG by file name."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pictures = {}
    if curves := evaluations(study):
        pictures["evaluations.png"] = picture(curves)
    if complete:
        pictures["history.png"] = _draw_with_optuna(optuna_plots.plot_optimization_history, study)
    if any(trial.params for trial in complete):
        pictures["slices.png"] = _draw_with_optuna(optuna_plots.plot_slice, study)
    if len(complete) >= MIN_TRIALS_FOR_IMPORTANCES and _have_importances(study):
        pictures["importances.png"] = _draw_with_optuna(optuna_plots.plot_param_importances, study)
    return pictures


def _draw_with_optuna(plot: Callable[..., Any], study: optuna.Study) -> bytes:
    with plt.rc_context(STYLE), warnings.catch_warnings():  # Optuna changes pyplot's style
        warnings.simplefilter("ignore")
        figure = np.ravel(plot(study, target_name=LOSS))[0].figure
        try:
            return picture(figure)
        finally:
            plt.close(figure)


def _have_importances(study: optuna.Study) -> bool:
    """Whether the complete trials differ enough for PED-ANOVA (Watanabe et al., 2023), which Optuna uses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return sum(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()).values()) > 0
    except (RuntimeError, ValueError, UserWarning):
        return False


def evaluations(study: optuna.Study) -> Figure | None:
    """The loss of each trial at its evaluations; None without any. Optuna's plot has a legend entry for each trial."""
    trials = [trial for trial in study.get_trials(deepcopy=False, states=WITH_VALUE) if trial.intermediate_values]
    if not trials:
        return None
    figure = new_figure()
    axes = figure.subplots()
    best = best_of(study)
    handles = [Line2D([], [], color=FAINT, label="complete")]
    if any(trial.state == TrialState.PRUNED for trial in trials):
        handles.append(Line2D([], [], label="pruned", **PRUNED_MARK))
    if best:
        handles.append(Line2D([], [], color=BEST, linewidth=2, label=f"trial {best.number}, the best"))
    for trial in trials:
        points = sorted((number + 1, value) for number, value in trial.intermediate_values.items())
        is_best, is_pruned = trial == best, trial.state == TrialState.PRUNED
        color = BEST if is_best else PRUNED if is_pruned else FAINT
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2 if is_best else 1, zorder=3 if is_best else 2)
        if is_pruned:
            axes.plot(*points[-1], **PRUNED_MARK)
    axes.set_ylim(*_limits(study, trials))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, xlabel="evaluation", ylabel=LOSS)
    axes.legend(handles=handles, frameon=False)
    return figure


def _limits(study: optuna.Study, trials: list[FrozenTrial]) -> tuple[float, float]:
    """Limits that fit the better nine tenths of the losses if there are many."""
    losses = [loss for trial in trials for loss in trial.intermediate_values.values()]
    losses.sort(reverse=study.direction == StudyDirection.MAXIMIZE)  # the best first
    shown = losses[: len(losses) - len(losses) // 10] if len(losses) >= 20 else losses
    low, high = min(shown), max(shown)
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin
