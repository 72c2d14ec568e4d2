"""The report of a study: `study.md` with a table of all trials, `trials.csv`, and pictures."""

import csv
import io
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from gpt2.analysis.tables import as_markdown
from gpt2.errors import counted
from gpt2.runtime.files import atomic_write, exclusive_change
from gpt2.search.plots import MIN_TRIALS_FOR_IMPORTANCES, draw
from gpt2.search.study import shown_parameters, state_name
from gpt2.search.trial import REASON, SPENT, best_of


def write(study: optuna.Study, folder: Path) -> None:
    """Write `study.md`, `trials.csv` and the pictures for which there is data.

    The folder is locked meanwhile, so that the last of several processes reads and writes the results of all.
    """
    with exclusive_change(folder):
        trials = csv_of(study).encode()
        pictures = draw(study, trials)
        images = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
        parts = [f"# Study {study.study_name}", summary(study), images, table(study)]
        text = "\n\n".join(filter(None, parts)) + "\n"
        for name, content in {**pictures, "trials.csv": trials, "study.md": text.encode()}.items():
            with atomic_write(folder / name) as file:
                file.write(content)


def summary(study: optuna.Study) -> str:
    """Return the number of trials in each state, the best trial, and the tokens that pruning saved, as text."""
    trials = study.get_trials(deepcopy=False)
    counts = Counter(map(state_name, trials))
    lines = [
        f"{counted(len(trials), 'trial')}: " + ", ".join(f"{count} {state}" for state, count in counts.items()) + "."
    ]
    if best := best_of(study):
        lines.append(f"The best is trial {best.number}, {best.value:.4f}: {shown_parameters(best)}.")
    if counts["complete"] < MIN_TRIALS_FOR_IMPORTANCES:
        lines.append(f"importances.png needs {MIN_TRIALS_FOR_IMPORTANCES} complete trials.")
    spent = sum(trial.user_attrs.get(SPENT, {}).get("tokens", 0) for trial in trials)
    if saved := sum(trial.user_attrs.get(SPENT, {}).get("tokens_saved", 0) for trial in trials):
        share = saved / (saved + spent)
        lines.append(f"It trained on {spent:,} tokens; pruning saved {saved:,}, {share:.0%} of all.")
    return "\n".join(lines)


def _rank(trial: FrozenTrial, sign: int) -> tuple[int, float]:
    """Sort key: complete trials, then pruned ones, then the others; better values first."""
    place = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1}.get(trial.state, 2)
    return place, inf if trial.value is None else sign * trial.value


def _columns(trials: list[FrozenTrial], *others: str) -> list[str]:
    return ["trial", "state", "value", *sorted({key for trial in trials for key in trial.params}), *others]


def _row(trial: FrozenTrial) -> dict[str, Any]:
    losses = {f"evaluation {number + 1}": loss for number, loss in trial.intermediate_values.items()}
    reason = trial.user_attrs.get(REASON) or ""
    spent = trial.user_attrs.get(SPENT, {})
    values = {"trial": trial.number, "state": state_name(trial), "value": trial.value, "reason": reason}
    return {**values, **trial.params, **spent, **losses}


def table(study: optuna.Study) -> str:
    """Return a Markdown table of all trials, the best first."""
    trials = study.get_trials(deepcopy=False)
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    columns = _columns(trials, "evaluations", "seconds", "reason")
    rows = [columns]
    for trial in sorted(trials, key=lambda trial: _rank(trial, sign)):
        values = {**_row(trial), "evaluations": len(trial.intermediate_values)}
        rows.append([_short(values.get(column), 5 if column == "value" else 4) for column in columns])
    return as_markdown(rows)


def _short(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else "" if value is None else str(value)[:120]


def csv_of(study: optuna.Study) -> str:
    """Return the content of `trials.csv`, one line per trial, with the loss at each evaluation."""
    trials = study.get_trials(deepcopy=False)
    evaluations = sorted({number for trial in trials for number in trial.intermediate_values})
    losses = [f"evaluation {number + 1}" for number in evaluations]
    columns = _columns(trials, "steps", "tokens", "seconds", "reason", *losses)
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(map(_row, trials))
    return file.getvalue()
