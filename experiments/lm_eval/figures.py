"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def recorded(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


ours, strided, theirs = (recorded(name) for name in ("evaluate", "evaluate_stride_32", "lm_eval"))
bits, order = theirs["results"]["model_py"]["bits_per_byte,none"], theirs["results"]["word_order"]
lines = len((FOLDER / "word_order.jsonl").read_text().splitlines())
assert order["sample_len"] == lines

FIGURES = [
    f"differ by {100 * (ours['bits_per_byte'] / bits - 1):.1f} %",
    f"| lm-eval | {bits:.4f} | {order['acc,none']:.3f} ± {order['acc_stderr,none']:.3f} |",
    f"| `evaluate.py` | {ours['bits_per_byte']:.4f} |",
    f"| `evaluate.py` with `stride=32` | {strided['bits_per_byte']:.4f} |",
    f"whether {lines} lines",
    f"{lines} lines are few",
    f"lm-eval {theirs['lm_eval_version']}, transformers {theirs['transformers_version']}",
]
GIVEN = [
    "below 1e-5",
    "22 November 2026",
    "2 cores of an AMD EPYC",
    "PyTorch 2.13.0 (CPU), Python 3.11.7, 30 November 2026",
]
