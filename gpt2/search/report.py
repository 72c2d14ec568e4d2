"""What a study has found, for people: a table, a file for spreadsheets, pictures."""

import csv
import io
from math import inf
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from gpt2.runtime.files import atomic_write
from gpt2.search.plots import draw
from gpt2.search.study import shown_parameters, shown_state, shown_value
from gpt2.search.trial import REASON, SPENT, best_of


def write(study: optuna.Study, folder: Path, how_to_run_best: str = "") -> None:
    """Write `study.md`, `trials.csv` and the pictures that there is something for.

    Args:
        how_to_run_best: Goes into `study.md`, as a paragraph.
    """
    trials = study.get_trials(deepcopy=False)
    pictures = draw(study)
    for name, content in pictures.items():
        _write(folder / name, content)
    _write(folder / "trials.csv", csv_of(study).encode())
    shown = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
    parts = [f"# Study {study.study_name}", summary(study), how_to_run_best, shown, table(study, trials)]
    _write(folder / "study.md", ("\n\n".join(filter(None, parts)) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def summary(study: optuna.Study) -> str:
    """How many trials ended how, the best one, and what pruning spared."""
    trials = study.get_trials(deepcopy=False)
    counts: dict[str, int] = {}
    for trial in trials:
        counts[shown_state(trial)] = counts.get(shown_state(trial), 0) + 1
    lines = [f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items()) + "."]
    if best := best_of(study):
        lines.append(f"The best is trial {best.number}, {best.value:.4f}: {shown_parameters(best)}.")
    tokens = {trial.number: trial.user_attrs.get(SPENT, {}).get("tokens", 0) for trial in trials}
    whole = max((tokens[trial.number] for trial in trials if trial.state == TrialState.COMPLETE), default=0)
    pruned = [tokens[trial.number] for trial in trials if trial.state == TrialState.PRUNED]
    if pruned and whole:
        spared = sum(max(0, whole - n) for n in pruned)
        share = spared / (spared + sum(tokens.values()))
        lines.append(f"It trained on {sum(tokens.values()):,} tokens; pruning spared {spared:,}, {share:.0%} of all.")
    return "\n".join(lines)


def by_value(study: optuna.Study, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The best first, those without a value last."""
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    order = [TrialState.COMPLETE, TrialState.PRUNED]
    return sorted(
        trials,
        key=lambda trial: (
            order.index(trial.state) if trial.state in order else len(order),
            inf if trial.value is None else sign * trial.value,
        ),
    )


def table(study: optuna.Study, trials: list[FrozenTrial]) -> str:
    """Markdown."""
    keys = sorted({key for trial in trials for key in trial.params})
    rows = [["trial", "state", "value", *keys, "evaluations", "seconds", "reason"]]
    for trial in by_value(study, trials):
        seconds = trial.user_attrs.get(SPENT, {}).get("seconds")
        rows.append(
            [
                *(str(trial.number), shown_state(trial), shown_value(trial).split(" at ")[0].strip()),
                *(_short(trial.params.get(key)) for key in keys),
                *(str(len(trial.intermediate_values)), "" if seconds is None else f"{seconds:.1f}"),
                (trial.user_attrs.get(REASON) or "").replace("|", r"\|")[:120],
            ]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


def csv_of(study: optuna.Study) -> str:
    """A line a trial, by number: state, value, parameters, what it spent, and the loss at each evaluation."""
    trials = study.get_trials(deepcopy=False)
    keys = sorted({key for trial in trials for key in trial.params})
    evaluations = sorted({number for trial in trials for number in trial.intermediate_values})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    spent = ("steps", "tokens", "seconds")
    writer.writerow(["trial", "state", "value", *keys, *spent, "reason", *(f"evaluation {n + 1}" for n in evaluations)])
    for trial in trials:
        writer.writerow(
            [
                *(trial.number, shown_state(trial), trial.value),
                *(trial.params.get(key) for key in keys),
                *(trial.user_attrs.get(SPENT, {}).get(key) for key in spent),
                trial.user_attrs.get(REASON) or "",
                *(trial.intermediate_values.get(number) for number in evaluations),
            ]
        )
    return file.getvalue()
