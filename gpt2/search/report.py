"""The report of a study: `study.md` with all trials, `trials.csv`, and pictures."""

import csv
import io
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from gpt2.analysis.compare import as_markdown
from gpt2.runtime.files import atomic_write
from gpt2.search.plots import draw
from gpt2.search.study import shown_parameters, shown_value, state_name
from gpt2.search.trial import REASON, SPENT, best_of

FIGURES = ("steps", "tokens", "seconds")  # of SPENT


def write(study: optuna.Study, folder: Path, how_to_run_best: str = "") -> None:
    """Write `study.md`, `trials.csv` and the pictures for which there is data.

    Args:
        how_to_run_best: A paragraph for `study.md`.
    """
    pictures = draw(study)
    images = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
    parts = [f"# Study {study.study_name}", summary(study), how_to_run_best, images, table(study)]
    text = "\n\n".join(filter(None, parts)) + "\n"
    for name, content in {**pictures, "trials.csv": csv_of(study).encode(), "study.md": text.encode()}.items():
        with atomic_write(folder / name) as file:
            file.write(content)


def summary(study: optuna.Study) -> str:
    """How many trials ended in which way, the best one, and the tokens that pruning saved."""
    trials = study.get_trials(deepcopy=False)
    counts = Counter(map(state_name, trials))
    lines = [f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items()) + "."]
    if best := best_of(study):
        lines.append(f"The best is trial {best.number}, {best.value:.4f}: {shown_parameters(best)}.")
    tokens = {trial.number: _spent(trial, "tokens") or 0 for trial in trials}
    whole = max((tokens[trial.number] for trial in trials if trial.state == TrialState.COMPLETE), default=0)
    pruned = [tokens[trial.number] for trial in trials if trial.state == TrialState.PRUNED]
    if pruned and whole:
        spent, saved = sum(tokens.values()), sum(max(0, whole - n) for n in pruned)
        share = saved / (saved + spent)
        lines.append(f"It trained on {spent:,} tokens; pruning saved {saved:,}, {share:.0%} of all.")
    return "\n".join(lines)


def _spent(trial: FrozenTrial, figure: str) -> Any:
    return trial.user_attrs.get(SPENT, {}).get(figure)


def _keys(trials: list[FrozenTrial]) -> list[str]:
    return sorted({key for trial in trials for key in trial.params})


def _rank(trial: FrozenTrial, sign: int) -> tuple[int, float]:
    """Complete trials before pruned ones before those without a value; the better first."""
    states = [TrialState.COMPLETE, TrialState.PRUNED]
    place = states.index(trial.state) if trial.state in states else len(states)
    return place, inf if trial.value is None else sign * trial.value


def table(study: optuna.Study) -> str:
    """All trials in Markdown, the best first."""
    trials = study.get_trials(deepcopy=False)
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    keys = _keys(trials)
    rows = [["trial", "state", "value", *keys, "evaluations", "seconds", "reason"]]
    for trial in sorted(trials, key=lambda trial: _rank(trial, sign)):
        seconds = _spent(trial, "seconds")
        rows.append(
            [
                *(str(trial.number), state_name(trial), shown_value(trial).split(" at ")[0].strip()),
                *(_short(trial.params.get(key)) for key in keys),
                *(str(len(trial.intermediate_values)), "" if seconds is None else f"{seconds:.1f}"),
                (trial.user_attrs.get(REASON) or "")[:120],
            ]
        )
    return as_markdown(rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


def csv_of(study: optuna.Study) -> str:
    """One line a trial: state, value, parameters, steps, tokens, seconds, and the loss at each evaluation."""
    trials = study.get_trials(deepcopy=False)
    keys = _keys(trials)
    evaluations = sorted({number for trial in trials for number in trial.intermediate_values})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    losses = [f"evaluation {number + 1}" for number in evaluations]
    writer.writerow(["trial", "state", "value", *keys, *FIGURES, "reason", *losses])
    for trial in trials:
        writer.writerow(
            [
                *(trial.number, state_name(trial), trial.value),
                *(trial.params.get(key) for key in keys),
                *(_spent(trial, figure) for figure in FIGURES),
                trial.user_attrs.get(REASON) or "",
                *(trial.intermediate_values.get(number) for number in evaluations),
            ]
        )
    return file.getvalue()
