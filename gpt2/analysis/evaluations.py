"""Tables of the results of `evaluate.py`, and curves over the steps of a run."""

from math import isnan
from pathlib import Path
from typing import Any

Result = dict[str, Any]  # the content of `evaluation.json`
CORPUS_FIGURES = ("loss", "perplexity", "bits_per_byte")


def by_name(figures: Result) -> dict[str, float]:
    """Return the figures of a result in one flat dictionary, with names such as `hellaswag/acc_norm`."""
    tasks = figures.get("results", {})
    plain_figures = {name: value for name, value in figures.items() if name != "results"}
    return plain_figures | {f"{task}/{name}": value for task in tasks for name, value in tasks[task].items()}


def task_rows(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """Return a table with a row for each metric of each task."""
    rows = [["task", "documents", "metric", "value", "standard error"]]
    for task, figures in results.items():
        for metric in metrics_of(figures):
            cells = [_shown(metric, figures[name]) for name in (metric, f"{metric}_stderr")]
            rows.append([task, f"{figures['documents']:,}", metric, *cells])
    return rows


def metrics_of(figures: dict[str, float]) -> list[str]:
    return [name for name in figures if f"{name}_stderr" in figures]


def _shown(metric: str, value: float) -> str:
    if isnan(value):  # the standard error of one document
        return "n/a"
    if value >= 1e6:  # the perplexity of an untrained model
        return f"{value:.2e}"
    return f"{value:,.2f}" if metric == "perplexity" else f"{value:.4f}"


def names_of_models(results: list[Result]) -> str:
    """Return a line: the number of models, their folder if it is the same, and whether their losses compare."""
    folder, *others = {str(Path(result["checkpoint"]).parent) for result in results}
    tokenizers = {result["tokenizer_fingerprint"] for result in results if "tokenizer_fingerprint" in result}
    note = "; their tokenizers differ: only bits per byte compare" if len(tokenizers) > 1 else ""
    return f"models {len(results)}{'' if others or folder == '.' else f' of {folder}'}{note}"


def model_rows(results: list[Result]) -> list[list[str]]:
    """Return a table with a row per model: its name, its step, and the loss or the figures of tasks."""
    tasks = {task: metrics_of(figures) for task, figures in results[0].get("results", {}).items()}
    names = [f"{task} {metric}" for task, metrics in tasks.items() for metric in metrics]
    corpus = [] if tasks else [name for name in CORPUS_FIGURES if name in results[0]]
    rows = [["checkpoint", "step", *names, *(name.replace("_", " ") for name in corpus)]]
    folders = {Path(result["checkpoint"]).parent for result in results}
    for result in results:
        cells = [_shown(name, result[name]) for name in corpus]
        for task, metrics in tasks.items():
            figures = result["results"][task]
            cells += [f"{_shown(m, figures[m])} ± {_shown(m, figures[f'{m}_stderr'])}" for m in metrics]
        step = "" if result["step"] is None else f"{result['step']:,}"
        name = result["checkpoint"] if len(folders) > 1 else Path(result["checkpoint"]).name
        rows.append([name, step, *cells])
    return rows


def write_curve(results: list[Result]) -> Path | None:
    """Draw the loss, or the first metric of each task, over the steps of each run.

    Returns:
        The path of the picture, beside the file of the first result; None if no run has two steps.
    """
    from matplotlib.colors import to_hex

    from gpt2.analysis.plotting import label_ends, new_figure, picture, plain  # here: they import matplotlib

    runs: dict[Path, list[Result]] = {}
    for result in results:
        if result["step"] is not None:
            runs.setdefault(Path(result["checkpoint"]).absolute().parent.parent, []).append(result)
    lines = {run: sorted(found, key=lambda result: result["step"]) for run, found in runs.items() if len(found) > 1}
    if not lines:
        return None
    figure = new_figure()
    axes, ends = figure.subplots(), []
    tasks = results[0].get("results", {})
    names = [f"{task}/{metrics_of(figures)[0]}" for task, figures in tasks.items()] or ["loss"]
    for run, found in lines.items():
        steps, figures_of_each = [result["step"] for result in found], [by_name(result) for result in found]
        prefix = f"{run.parent.name}/{run.name} " if len(lines) > 1 else ""
        for name in names:
            values = [figures[name] for figures in figures_of_each]
            errors = [figures[f"{name}_stderr"] for figures in figures_of_each] if tasks else None
            line = axes.errorbar(steps, values, errors, fmt="o-", capsize=3)[0]
            label = name.replace("/", " ") if tasks else ""
            ends.append((steps[-1], values[-1], f"{prefix}{label}".strip(), to_hex(line.get_color())))
    plain(axes, xlabel="step", ylabel="accuracy ± standard error" if tasks else "loss (nats per token)")
    if tasks or len(lines) > 1:
        label_ends(axes, ends)
    path = Path(results[0]["output"])
    path = path.with_name(f"{path.stem}{'_tasks' if tasks else ''}.png")
    path.write_bytes(picture(figure))
    return path
