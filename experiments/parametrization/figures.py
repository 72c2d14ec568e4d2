"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

from pathlib import Path
from statistics import mean, stdev

from gpt2.experiments.results import Results

FOLDER = Path(__file__).parent
KEYS = ("model.parametrization", "model.d_model", "train.learning_rate")
cells = Results(FOLDER).cells
runs = {tuple(map(cell.value_of, KEYS)): cell.results for cell in cells}  # the losses of the seeds, by setting
loss = {setting: mean(losses) for setting, losses in runs.items()}
rates = sorted({rate for _, _, rate in runs})
best = {pair: min(rates, key=lambda rate: loss[*pair, rate]) for pair in {setting[:2] for setting in runs}}
lowest = {pair: loss[*pair, rate] for pair, rate in best.items()}
best_of_seeds = {
    pair: [min(rates, key=lambda rate: runs[*pair, rate][seed]) for seed in range(len(runs[*pair, rate]))]
    for pair, rate in best.items()
}
farthest = max(max(rate / best[pair], best[pair] / rate) for pair, found in best_of_seeds.items() for rate in found)
noise = mean(stdev(runs[*pair, rate]) for pair, rate in best.items())
noise_beyond = mean(stdev(losses) for (*pair, rate), losses in runs.items() if rate > best[*pair,])
assert best["mup", 32] == best["mup", 64] and best["mup", 128] == best["mup", 256] == best["mup", 512]
assert all(rates[0] < rate < rates[-1] for rate in best.values()), "a best rate is at the edge of the grid"


def optimum(way, width):
    """The lowest point of a parabola over the logarithm of the rate, through the best rate and its two neighbours."""
    rate = best[way, width]
    left, middle, right = (loss[way, width, each] for each in (rate / 2, rate, rate * 2))
    return rate * 2 ** ((left - right) / 2 / (left - 2 * middle + right))


def falls(way, narrow, wide=512):
    """The optimum of a narrow model relative to that of a wide one."""
    return optimum(way, narrow) / optimum(way, wide)


def costs(way, narrow, wide=512):
    """The loss of a wide model at the best rate of a narrow one, above its loss at its own best rate, in nats."""
    return loss[way, wide, best[way, narrow]] - lowest[way, wide]


FIGURES = [
    f"with `standard`, the best of the seven rates falls from {best['standard', 32]} at width 32 to "
    f"{best['standard', 512]} at width 512; with `mup` it is {best['mup', 32]} up to width 64 and "
    f"{best['mup', 512]} from 128 on",
    "the lowest point of a parabola through the best rate and its neighbours falls by a factor of "
    f"{falls('standard', 32):.1f} with `standard` and rises by {1 / falls('mup', 32):.1f} with `mup`",
    f"The best rate of width 128 costs the model of width 512 {costs('standard', 128):.2f} nats with `standard` and "
    f"{costs('mup', 128):.2f} with `mup`; that of width 32 costs it {costs('standard', 32):.2f} and "
    f"{costs('mup', 32):.2f}",
    f"the best rate of each single seed is within a factor of {farthest:.0f} of that of the mean",
    f"At the best rates seeds differ by a standard deviation of {noise:.3f} nats, beyond them by {noise_beyond:.3f}.",
    f"at its best rate the widest model ends at {lowest['mup', 512]:.3f} with `mup` and at "
    f"{lowest['standard', 512]:.3f} with `standard`",
]
GIVEN = [
    "Two layers with four heads, of width 32 to 512",
    "150 steps of 8 blocks of 64 bytes, AdamW, 15 steps of warm-up",
    "the first 32 batches of the validation split (2 % of the files)",
    "2022, table 8",
    "The base of `mup` is width 128, with heads of 32",
    "150 steps are few",
]
