"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

from fit import Runs, read, section, size, tokens_per_step  # noqa: E402
from law import fit  # noqa: E402

from gpt2.experiments.results import rows_of  # noqa: E402

text = (FOLDER / "results.csv").read_text()
rows, record = rows_of(text), read(FOLDER / "fit.json")
law = fit(*Runs(text).fitted)
for name in ("e", "a", "b", "alpha", "beta"):
    assert abs(getattr(law, name) / record[name][0] - 1) < 1e-3, "python experiments/scaling/fit.py"
widths = sorted({row["model.d_model"] for row in rows})
narrow, wide = widths[0], widths[-1]
TRAINING = 9.8  # millions of bytes
more = {row["model.d_model"]: row["flops"] / (6e6 * size(row["model.d_model"]) * row["tokens"]) - 1 for row in rows}
longest = max(row["tokens"] for row in rows) / 1e6

pilots = rows_of((FOLDER / "pilots.csv").read_text())
adamw, muon = (
    {(row["width"], row["learning_rate"], row["steps"]): row["loss"] for row in pilots if row["optimizer"] == name}
    for name in ("adamw", "muon")
)
long, short = (muon[64, 0.02, steps] - muon[64, 0.01, steps] for steps in (1987, 497))
behind = min(loss for (width, _, _), loss in adamw.items() if width == 64) - muon[64, 0.02, 497]
assert record["best_size_at_smallest"][0] < size(narrow)

FIGURES = [
    " ".join(section(FOLDER).split()).replace("](compute.png)", "]").replace("](sizes.png)", "]"),
    f"from {size(narrow):.1f} million parameters (width {narrow}, two layers) to {size(wide):.1f} million "
    f"(width {wide}, eight layers)",
    f"{tokens_per_step(narrow):,} bytes a step at width {narrow}, {tokens_per_step(wide):,} at {wide}",
    f"The longest run reads {longest:.1f} million bytes, the text {longest / TRAINING:.1f} times",
    f"They add {more[narrow]:.0%} more at width {narrow} and {more[wide]:.0%} more at {wide}".replace("%", " %"),
    f"one rate for all was chosen from {len(pilots)} short runs (`pilots.csv`). At width 64 this rate ends {long:.2f} "
    f"nats above half the rate in 1,987 steps of 1,024 bytes, and {-short:.2f} below in 497 steps of 4,096",
    f"It ended {behind:.2f} nats above Muon at width 64 in 497 steps (on 2 % of the files)",
    f"at the smallest budget the widest has {min(row['steps'] for row in rows)} steps",
]
GIVEN = [
    "6 N D from 6.25e11 to 1e13 operations",
    f"The text has {TRAINING} million bytes for training and 142,309 for validation (1 % of the files, all of them",
    "Muon at a rate of 0.02",
    "13.5 minutes on two cores of an Intel Xeon with some other work",
    "another text, tokenizer or context length (128 bytes here)",
    "(Muennighoff et al., 2023: harmless up to about four times)",
    "operations that 6 N D does not count",
]
