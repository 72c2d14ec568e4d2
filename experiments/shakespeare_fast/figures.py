"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

import json
import re
from pathlib import Path
from statistics import mean, median

from gpt2.experiments.results import Results, rows_of

FOLDER = Path(__file__).parent
results = Results(FOLDER)
loss = {(c.value_of("train.optimizer"), c.value_of("train.learning_rate")): c.loss for c in results.cells}
best = {name: min((rate for kind, rate in loss if kind == name), key=lambda rate: loss[name, rate]) for name, _ in loss}


def race(name):
    """The runs of nanoGPT and of the preset in a file, and how many times as fast the preset is."""
    runs = json.loads((FOLDER / name).read_text())["runs"]
    theirs, ours = ([run for run in runs if run["program"] == each] for each in ("nanoGPT", "shakespeare_fast"))
    return theirs, ours, ratio(theirs, ours)


def ratio(theirs, ours):
    return median(run["seconds"] for run in theirs) / median(run["seconds"] for run in ours)


theirs, ours, times = race("race.json")
avx2_theirs, avx2_ours, avx2_times = race("race_avx2.json")
avx2_pairs = [a["seconds"] / b["seconds"] for a, b in zip(avx2_theirs, avx2_ours, strict=True)]
series = [ratio(theirs[part], ours[part]) for part in (slice(3), slice(3, 6))]
assert all(run["loss"] < theirs[0]["loss"] for run in ours)
losses, seconds = ([run[key] for run in ours] for key in ("loss", "seconds"))
TOKENS = {"nanoGPT": 2000 * 12 * 64, "preset": 230 * 24 * 64}
assert len({run["loss"] for run in theirs}) == 1
tried = rows_of((FOLDER / "tried.csv").read_text())
plain = {row["steps"]: row["loss"] for row in tried if (row["change"], row["blocks"]) == ("none", 24)}
gains = {
    (row["change"], row["steps"]): plain[row["steps"]] - row["loss"]
    for row in tried
    if row["steps"] in plain and row["blocks"] == 24 and row["change"] != "none" and "momentum" not in row["change"]
}
assert all(gain < 0 for (change, _), gain in gains.items() if change.startswith(("rate of", "3 iterations")))
seeds: dict[tuple, list[float]] = {}
for row in tried:
    seeds.setdefault((row["change"], row["steps"], row["blocks"]), []).append(row["loss"])
muon = seeds["momentum 0.9", 200, 24]
variants = [
    abs(row["loss"] - muon[0])
    for row in tried
    if re.search("NorMuon|Polar|from", row["change"]) and row["steps"] == 200
]
of_16_blocks = [losses for (_, steps, blocks), losses in seeds.items() if (steps, blocks) == (250, 16)]
WARMUP, INITIAL = ", 10 steps of warm-up", ", all begin twice as large"
means = {
    change.removeprefix("exact GELU and no biases, momentum 0.9"): mean(losses)
    for (change, steps, _), losses in seeds.items()
    if steps == 225 and len(losses) == 3
}
lower = {change: means[""] - loss for change, loss in means.items()}
others = [gain for change, gain in lower.items() if "warm-up" not in change and "begin" not in change]
others.append(lower[", residual projections begin at 0"])
assert min(loss["adamw", rate] for kind, rate in loss if rate > best["adamw"]) > 2.4


def row(name, tokens, runs):
    values = [", ".join(format(run[key], form) for run in runs) for key, form in (("seconds", ".1f"), ("loss", ".3f"))]
    return f"| {name} | {tokens:,} | {' | '.join(values)} |"


FIGURES = [
    f"for a loss of {theirs[0]['loss']:.3f} over the whole validation split",
    f"With {TOKENS['preset'] / TOKENS['nanoGPT']:.2f} of the text and in {median(seconds):.1f} s instead of "
    f"{median(run['seconds'] for run in theirs):.1f}, {times:.1f} times as fast, three seeds of the preset end between "
    f"{min(losses):.3f} and {max(losses):.3f}",
    f"{loss['adamw', best['adamw']] - loss['muon', best['muon']]:.2f} below AdamW at its best",
    f"is {series[0]:.1f} times as fast, in the second, when both are faster, {series[1]:.1f} times",
    row("nanoGPT, unmodified, fp32, 2,000 steps", TOKENS["nanoGPT"], theirs),
    row("`shakespeare_fast`, bf16, 230 steps", TOKENS["preset"], ours),
    "(Zen 3, AVX2 only)",
    f"the preset is {avx2_times:.1f} times as fast ({median(run['seconds'] for run in avx2_ours):.1f} s instead of "
    f"{median(run['seconds'] for run in avx2_theirs):.1f}; {min(avx2_pairs):.1f} to {max(avx2_pairs):.1f} times in the "
    "three pairs), and its seeds end between "
    f"{min(run['loss'] for run in avx2_ours):.3f} and {max(run['loss'] for run in avx2_ours):.3f}",
    f"differ by {max(losses) - min(losses):.3f}",
    "it ends above 2.4",
    f"changed the loss of 200 steps by at most {max(variants):.3f}, where two seeds differ by {muon[1] - muon[0]:.3f}",
    f"after 250 of them, three seeds differ by up to {max(max(one) - min(one) for one in of_16_blocks):.3f}",
    f"10 steps of warm-up instead of 20 end {lower[WARMUP]:.3f} lower, initial weights of twice the size "
    f"{lower[INITIAL]:.3f} lower, both together {lower[WARMUP + INITIAL]:.3f} lower",
    f"end at most {max(others):.3f} lower or higher than that",
]
ELSEWHERE = {
    "conf/experiment/shakespeare_fast.yaml": [
        f"should reach {mean(losses):.2f}",
        f"twice GPT-2's: {lower[INITIAL]:.3f} lower in 225 steps",
    ],
    "docs/training.md": [
        f"| `shakespeare_fast` | {mean(losses):.2f} |",
        f"| {TOKENS['preset'] / 1e6:.2f} million |",
    ],
}
GIVEN = [
    "(4 layers, width 128, context 64) needs 2,000 steps of 12 blocks",
    "300 steps of 24 blocks, 20 steps of warm-up",
    "a momentum of 0.9, 10 steps of warm-up, initial weights of twice the usual size, and 230 steps",
    "in two series 45 minutes apart",
    "Both estimate their loss from 20 batches",
    "on a processor that computes in bf16 without AMX, such as Zen 4",
    "With nanoGPT's model and 225 steps",
    "at a rate of 0.02 and a momentum of 0.95",
    "NorMuon by Li et al., 2025",
    "Polar Express by Amsel et al., 2025",
    "Steps of 16 blocks",
]
