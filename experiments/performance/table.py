"""Print the tables of docs/performance.md and README.md from the JSON files.

Run: python experiments/performance/table.py
tests/benchmarks/test_scripts.py checks that both pages have these tables.
"""

import json
from pathlib import Path

from gpt2.analysis.tables import from_to

FOLDER = Path(__file__).parent
SHAPES = {
    "gpt2": "GPT-2 124M, 2 blocks of 256 tokens",
    "small": "16 million weights (4 layers, width 256, GPT-2's vocabulary), 4 blocks of 256 tokens",
    "shakespeare": "nanoGPT's Shakespeare model (0.8 million weights, 65 characters), 12 blocks of 64 tokens",
}


def table(rows):
    """One row per contestant: its time, and its speed relative to unmodified nanoGPT and to the fastest nanoGPT."""
    seconds = {row["contestant"]: row["step_seconds"] for row in rows}
    theirs = {name: value for name, value in seconds.items() if name.lower().startswith("nanogpt")}
    lines = [
        "| | ms a step | from - to | ratio | to its best | first step, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name, precision = row["contestant"], row["contestant"].rpartition(", ")[2]
        best = [value for peer, value in theirs.items() if peer.endswith(precision)]
        milliseconds = [1e3 * each for each in row["step_seconds_of_each"]]
        digits = 0 if 1e3 * row["step_seconds"] >= 100 else 2
        cells = [
            name.replace("nanogpt", "nanoGPT").replace("gpt2, ", "this repository, "),
            f"{1e3 * row['step_seconds']:,.{digits}f}",
            from_to(milliseconds, digits),
            f"{next(iter(theirs.values())) / row['step_seconds']:.2f}",
            f"{min(best) / row['step_seconds']:.2f}" if best else "not recorded",
            f"{row['first_step_seconds']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables():
    files = {title: FOLDER / f"{name}.json" for name, title in SHAPES.items()}
    recorded = {title: json.loads(file.read_text())["results"] for title, file in files.items() if file.exists()}
    return "\n\n".join(f"{title}:\n\n{table(rows)}" for title, rows in recorded.items())


if __name__ == "__main__":
    print(tables())
