"""Print the tables of README.md, and the summary of them in docs/performance.md, from the JSON files.

Run: python experiments/performance/table.py
tests/benchmarks/test_scripts.py checks that both pages have them.
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


def recorded():
    """The rows of each file, by the description of its model and batch."""
    files = {title: FOLDER / f"{name}.json" for name, title in SHAPES.items()}
    return {title: json.loads(file.read_text())["results"] for title, file in files.items() if file.exists()}


def tables():
    return "\n\n".join(f"{title}:\n\n{table(rows)}" for title, rows in recorded().items())


def summary():
    """The milliseconds per step of each model: the fastest variant of other programs, and ours with and without
    compilation."""
    models = [{row["contestant"]: row["step_seconds"] for row in rows} for rows in recorded().values()]

    def fastest(model, program, precision):
        return min(value for name, value in model.items() if name.startswith(program) and name.endswith(precision))

    lines = {"nanoGPT, fp32, unmodified": [model["nanoGPT, fp32"] for model in models]}
    for precision in ("fp32", "bf16"):
        for program in ("transformers", "nanoGPT"):
            lines[f"{program}, {precision}, fastest"] = [fastest(model, program, precision) for model in models]
        for name in ("", "compiled, "):
            lines[f"this repository, {name}{precision}"] = [model[f"gpt2, {name}{precision}"] for model in models]
    return "\n".join(
        f"| {line} | {' | '.join(f'{1e3 * each:,.{0 if each >= 0.1 else 1}f}' for each in seconds)} |"
        for line, seconds in lines.items()
    )


if __name__ == "__main__":
    print(tables(), summary(), sep="\n\n")
