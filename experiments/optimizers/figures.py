"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

from itertools import product
from pathlib import Path
from statistics import mean, median

from gpt2.experiments.results import Results, rows_of

FOLDER = Path(__file__).parent
RATE, WARMUP = "train.learning_rate", "train.warmup_steps"
NAMES = ("adamw", "muon", "adafactor", "schedule_free")
CELLS = [(width, steps) for steps, width in product((100, 400), (64, 128))]
KEYS = [(name, *cell) for name, cell in product(NAMES, CELLS)]

trials = {key: rows_of((FOLDER / "trials" / "{}_{}_{}.csv".format(*key)).read_text()) for key in KEYS}
best = {key: min(rows, key=lambda row: row["value"]) for key, rows in trials.items()}
untuned = {key: median(row["value"] for row in rows) - best[key]["value"] for key, rows in trials.items()}
others = rows_of((FOLDER / "trials" / "adamw_64_100_beta2.csv").read_text())
at_edge = [key for key in KEYS if best[key][WARMUP] in (key[2] // 50, -(-key[2] // 3))]
minutes = sum(row["seconds"] for rows in trials.values() for row in rows) / 60
assert {len(rows) for rows in trials.values()} == {10}

results = Results(FOLDER)
runs = {(c.value_of("train.optimizer"), c.value_of("name")): c.results for c in results.cells}
losses = {key: runs[key[0], f"width_{key[1]}.steps_{key[2]}"] for key in KEYS}
behind = {key: mean(losses[key]) - mean(losses["muon", *key[1:]]) for key in KEYS}
order = [sorted(NAMES, key=lambda name: behind[name, *cell]) for cell in CELLS]
assert all((ranks[0], ranks[-1]) == ("muon", "adamw") for ranks in order), order


def of(name, table):
    """The range of an optimizer's figures over widths and numbers of steps."""
    values = [f"{table[name, *cell]:.2f}" for cell in CELLS]
    return " to ".join(dict.fromkeys((min(values), max(values))))


def settings(name):
    return f"| {name} | {' | '.join(f'{best[name, *cell][RATE]:.2g}, {best[name, *cell][WARMUP]}' for cell in CELLS)} |"


FIGURES = [
    f"Adafactor ends {of('adafactor', behind)} nats above it, schedule-free AdamW {of('schedule_free', behind)}, and "
    f"AdamW {of('adamw', behind)}",
    f"the median of the ten trials is {of('muon', untuned)} above the best for Muon, {of('adafactor', untuned)} for "
    f"Adafactor, {of('schedule_free', untuned)} for schedule-free AdamW and {of('adamw', untuned)} for AdamW",
    *map(settings, NAMES),
    f"{len(KEYS) * 10} trials, {minutes:.0f} minutes of training",
    f"Three seeds differ by up to {max(max(each) - min(each) for each in losses.values()):.2f}",
    f"In {len(at_edge)} of the 16 searches the best warm-up is the shortest or the longest",
    f"twelve more trials with a beta2 of 0.9, 0.95 or 0.98 ended at {min(row['value'] for row in others):.3f} at best, "
    f"with 0.99 it was {best['adamw', 64, 100]['value']:.3f}",
]
GIVEN = [
    "a vocabulary of 1,024",
    "100 or 400 steps of 1,024 tokens",
    "at width 64 and at width 128",
    "(2 % to a third of the steps)",
    "Weight decay is 0.1, beta2 0.99, the norm of the gradient at most 1",
    "the first 32 batches",
    "from 0.001 to 0.1, for Adafactor from 0.01 to 1",
    "| optimizer | width 64, 100 steps | width 128, 100 steps | width 64, 400 steps | width 128, 400 steps |",
    "At width 64 and 100 steps",
    "2 cores of an AMD EPYC",
    "30 November 2026",
    "409,600 tokens",
]
