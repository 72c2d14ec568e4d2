"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

from pathlib import Path

from gpt2.experiments.results import rows_of

FIGURES = []
for path in sorted(Path(__file__).parent.glob("*/results.csv")):
    rows = rows_of(path.read_text())
    FIGURES.append(f"{len(rows)} runs, {sum(row['seconds'] for row in rows) / 3600:.1f} hours")
GIVEN = []
