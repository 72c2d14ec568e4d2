"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two.

`python experiments/optuna_quick/figures.py` draws the pictures.
"""

from pathlib import Path

from gpt2.experiments.results import rows_of
from gpt2.tracking.tracker import read_metrics

FOLDER = Path(__file__).parent
NAMES = ("dropout", "batch_size", "beta2", "learning_rate", "warmup_steps", "weight_decay")


def table_row(trials):
    best = min((trial for trial in trials if trial["state"] == "complete"), key=lambda trial: trial["value"])
    states = [trial["state"] for trial in trials]
    tokens, seconds = (sum(trial[key] for trial in trials) for key in ("tokens", "seconds"))
    counts = f"{states.count('complete')}, {states.count('pruned')}"
    row = f"| **{best['value']:.4f}**, trial {best['trial']} | {counts} | {tokens:,} | {seconds:.0f} |"
    return best, row, tokens, seconds


pruned, whole = (rows_of((FOLDER / f"{name}.csv").read_text()) for name in ("trials", "trials_without_pruner"))
(best, row, tokens, seconds), (_, whole_row, all_tokens, all_seconds) = map(table_row, (pruned, whole))
params = [[[trial[key] for key in trial if key.endswith(NAMES)] for trial in trials] for trials in (pruned, whole)]
assert params[0] == params[1]
assert len(params[0][0]) == len(NAMES)
complete = [trial for trial in pruned if trial["state"] == "complete"]
small = sum(trial["train.batch_size"] == 4 for trial in complete)
longer, by_hand = (read_metrics(FOLDER / f"longer_{name}.jsonl")[-1] for name in ("best", "by_hand"))
assert longer["tokens"] == by_hand["tokens"]
saved = [f"{100 * (1 - mine / theirs):.0f} %" for mine, theirs in ((tokens, all_tokens), (seconds, all_seconds))]

FIGURES = [
    f"A learning rate of {best['train.learning_rate']:.4f} and the smallest offered batch, "
    f"{best['train.batch_size']} blocks",
    f"Pruning saved {saved[0]} of the tokens and {saved[1]} of the training time at the same best trial",
    f"| median pruner (after 4 complete trials and 2 evaluations) {row}",
    f"| no pruner {whole_row}",
    f"{seconds + all_seconds:.0f} seconds of training for both",
    f"On {longer['tokens'] / 1e6:.2f} million tokens",
    f"ends at {longer['val/loss']:.3f}, and with",
    f"half the steps at {by_hand['val/loss']:.3f}",
    f"of those {small} of {len(complete)} have 4 blocks",
]
GIVEN = [
    "each of 150,000 tokens",
    "of 128 tokens",
    "2 cores of an AMD EPYC, PyTorch 2.13.0 (CPU), Optuna 5.0.0, Python 3.11.7, 23 November 2026",
    "30 November 2026",
    "Seed 1; no other",
]


def draw():
    """Draw the pictures of the study from `trials.csv`."""
    from optuna import create_study
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    from gpt2.search.plots import draw as pictures_of

    values = {key: [trial[key] for trial in pruned] for key in pruned[0] if key.endswith(NAMES)}
    ranges = {key: FloatDistribution(min(v), max(v), log=key.endswith(NAMES[3:])) for key, v in values.items()}
    study = create_study()
    for trial in pruned:
        losses = {n: loss for n in range(10) if (loss := trial[f"evaluation {n + 1}"]) is not None}
        params, state = {key: trial[key] for key in ranges}, TrialState[trial["state"].upper()]
        about = {"params": params, "distributions": ranges, "intermediate_values": losses}
        study.add_trial(create_trial(state=state, value=trial["value"], **about))
    pictures = pictures_of(study, source=(FOLDER / "trials.csv").read_bytes())
    for name in ("evaluations.png", "importances.png"):
        (FOLDER / name).write_bytes(pictures[name])


if __name__ == "__main__":
    draw()
