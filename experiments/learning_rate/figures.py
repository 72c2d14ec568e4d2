"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

from pathlib import Path
from statistics import mean

from gpt2.experiments.results import Results, rows_of

FOLDER = Path(__file__).parent
results = Results(FOLDER)
runs = {(c.value_of("model.d_model"), c.value_of("train.learning_rate")): c.results for c in results.cells}
loss = {setting: mean(losses) for setting, losses in runs.items()}
widths, rates = ({setting[place] for setting in runs} for place in (0, 1))
best = {width: min(rates, key=lambda rate: loss[width, rate]) for width in widths}
spread = {setting: max(losses) - min(losses) for setting, losses in runs.items()}
half = [loss[width, best[width] / 2] - loss[width, best[width]] for width in widths]
twice = max(loss[width, best[width] * 2] - loss[width, best[width]] for width in widths)
most = max(spread, key=lambda setting: spread[setting])
narrow = min((row for row in results.rows if row["model.d_model"] == most[0]), key=lambda row: row["loss"])


def longer(rate):
    """The loss of two layers of width 128 after 1,000 steps."""
    rows = rows_of((FOLDER.parent / "depth_or_width" / "results.csv").read_text())
    return mean(r["loss"] for r in rows if (r["model.num_layers"], r["train.learning_rate"]) == (2, rate))


assert best[32] == best[64] == best[128]
assert loss[256, 0.004] > loss[32, 0.004]
assert {row["state"] for row in results.rows} == {"finished"}

FIGURES = [
    f"the best of the six rates is {best[128]} up to width 128 and {best[256]} at 256",
    f"between 0.004 and 0.008 the loss jumps by {loss[128, 0.008] - loss[128, 0.004]:.2f} nats at width 128, and "
    f"between 0.002 and 0.004 by {loss[256, 0.004] - loss[256, 0.002]:.2f} at width 256, which is then no better than "
    "width 32",
    f"Half the best rate costs {min(half):.2f} to {max(half):.2f} nats and twice the best rate up to {twice:.2f}",
    f"differ by at most {max(spread[s] for s in spread if s[1] <= best[s[0]]):.2f}; beyond it by up to "
    f"{spread[most]:.2f}, most at width {most[0]}, whose single best run used {narrow['train.learning_rate']}",
    f"end at {longer(0.004):.3f} with a rate of 0.004 and at {longer(0.008):.3f} with 0.008. Here 0.008 is "
    f"{loss[128, 0.008] - loss[128, 0.004]:.2f} worse",
]
GIVEN = [
    "width 32 to 256",
    "400 steps of 8 blocks of 128 bytes, AdamW, 40 steps of warm-up",
    "the first 64 batches of the validation split (2 % of the files)",
    "2022",
    "two layers of width 128 (two heads, 1,000 steps, 100 of them warm-up)",
    "a gradient clip below 1",
    "400 steps are few",
]
