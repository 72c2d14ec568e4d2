"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two.

`python experiments/shakespeare_char/figures.py` draws the picture.
"""

import json
from pathlib import Path

from gpt2.analysis.plotting import draw_curves
from gpt2.tracking.tracker import read_metrics

FOLDER = Path(__file__).parent
records = read_metrics(FOLDER / "metrics.jsonl")
evaluations = [record for record in records if "val/loss" in record]
theirs = json.loads((FOLDER / "nanogpt.json").read_text())
last = evaluations[-1]
loss, seconds, nanogpt = f"{last['val/loss']:.3f}", f"{last['seconds']:.0f} s", f"{theirs['loss']:.3f}"

FIGURES = [
    f"Yes: {loss} nats a character over the whole validation split, where nanoGPT ends at {nanogpt}",
    f"| this repository | **{loss}** | {seconds} ({len(evaluations)} evaluations of the whole split) |",
    f"| nanoGPT | {nanogpt} |",
    " ".join(f"| {record['step']:,} | {record['val/loss']:.3f} |" for record in evaluations),
    f"from {theirs['config']['eval_iters']} random batches, is {theirs['estimate']:.3f}",
    f"{last['tokens'] / 1e6:.2f} million tokens in {seconds}",
]
GIVEN = [
    "4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps, learning rate 1e-3 to 1e-4",
    "all 256 bytes",
    "1,115,394 bytes",
    "one thread, seed 1337, 30 November 2026",
    "on 2 cores of an Intel Xeon, PyTorch 2.13.0 (CPU), Python 3.11.7, fp32, 1 December 2026",
    "the seed was 1 here and 1337 there",
]
ELSEWHERE = {
    "docs/training.md": [f"| `shakespeare_char` | {nanogpt}; {loss} here |"],
    "conf/experiment/shakespeare_char.yaml": [f"ends at {nanogpt}, this preset at {loss}"],
}

if __name__ == "__main__":
    draw_curves(FOLDER / "metrics.jsonl", FOLDER / "curves.png")
