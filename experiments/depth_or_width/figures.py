"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

from pathlib import Path
from statistics import mean

from gpt2.experiments.results import Results

FOLDER = Path(__file__).parent
results = Results(FOLDER)
runs = {(c.value_of("model.num_layers"), c.value_of("train.learning_rate")): c.results for c in results.cells}
layers, rates = ({setting[place] for setting in runs} for place in (0, 1))
best = {n: min((runs[n, rate] for rate in rates), key=mean) for n in layers}
costs = [mean(best[2 * n]) - mean(best[n]) for n in (1, 2, 4)]
sizes = [row["parameters"] for row in results.rows]
assert max(best[1]) < min(best[2]) < max(best[2]) < min(best[4])
assert costs[2] < max(best[8]) - min(best[8])
assert mean(runs[8, 0.008]) == mean(best[8])
assert max(rates) == 0.008
assert mean(runs[2, 0.008]) == min(mean(runs[n, 0.008]) for n in layers)
assert max(sizes) / min(sizes) - 1 < 0.02

FIGURES = [
    f"one layer of width 176 reaches {mean(best[1]):.3f}, two of 128 reach {mean(best[2]):.3f}, four of 92 reach "
    f"{mean(best[4]):.3f} and eight of 66 reach {mean(best[8]):.3f}",
    f"Each doubling of the depth costs {min(costs):.2f} to {max(costs):.2f} nats",
    f"the largest rate, {max(rates)}, where the single wide layer fails ({mean(runs[1, 0.008]):.2f})",
    f"Every run reads {results.rows[0]['tokens']:,} bytes",
]
GIVEN = [
    "about 440,000 parameters: one layer of width 176, eight layers of width 66",
    "1,000 steps of 8 blocks of 128 bytes, two heads, AdamW, 100 steps of warm-up",
    "the first 64 batches of the validation split (2 % of the files)",
    "the 440,000 parameters, and shapes differ by 2 % or less",
    "beyond 0.008, their best rate and the edge of the grid. 0.016 was not tried",
]
