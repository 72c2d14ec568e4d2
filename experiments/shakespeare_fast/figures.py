"""The figures of README.md; tests/experiments/test_figures.py compares."""

from pathlib import Path
from statistics import mean

from gpt2.experiments.plan import read_plan
from gpt2.experiments.results import Results, rows_of

FOLDER = Path(__file__).parent
results = Results(FOLDER, read_plan(FOLDER))
loss = {(c.value_of("train.optimizer"), c.value_of("train.learning_rate")): c.loss for c in results.cells}
best = {name: min((rate for kind, rate in loss if kind == name), key=lambda rate: loss[name, rate]) for name, _ in loss}
theirs, *ours = rows_of((FOLDER / "seeds.csv").read_text())
losses = [row["loss"] for row in ours]
seconds = [f"{row['user_seconds']:.0f}" for row in ours]
shares = [ours[0]["tokens"] / theirs["tokens"], mean(row["user_seconds"] for row in ours) / theirs["user_seconds"]]
assert min(loss["adamw", rate] for kind, rate in loss if rate > best["adamw"]) > 2.5
assert loss["muon", best["muon"]] == losses[0]

FIGURES = [
    f"for a loss of {theirs['loss']:.3f} over the whole validation split",
    f"With {shares[0]:.2f} of the text and {shares[1]:.2f} of the processor time",
    f"{loss['adamw', best['adamw']] - loss['muon', best['muon']]:.2f} below AdamW at its best",
    f"ends between {min(losses):.3f} and {max(losses):.3f}",
    f"| nanoGPT, unmodified, fp32, {theirs['steps']:,} steps | {theirs['tokens']:,} | {theirs['user_seconds']:.0f} s | "
    f"{theirs['loss']:.3f} |",
    f"| `shakespeare_fast`, seeds 1, 2, 3 | {ours[0]['tokens']:,} | {', '.join(seconds[:2])} and {seconds[2]} s | "
    f"{', '.join(f'{each:.3f}' for each in losses)} |",
    f"differ by {max(losses) - min(losses):.2f}",
    "it ends above 2.5",
]
GIVEN = [
    "(4 layers, width 128, context 64) needs 2,000 steps of 12 blocks",
    "300 steps of 24 blocks, 20 steps of warm-up, a linear decay to zero, and bf16",
    "2 cores of an AMD EPYC, PyTorch 2.13.0, Python 3.11.7, 30 November 2026",
]
ELSEWHERE = {"docs/training.md": [f"| `shakespeare_fast` | {mean(losses):.2f} |"]}
