"""Fit the scaling law to results.csv, predict the held-out run, and write fit.json, two pictures and the answer.

    python experiments/scaling/fit.py
    python experiments/scaling/fit.py --held-out outputs/studies/scaling/held_out
    python experiments/scaling/fit.py --so-far

The first command also writes prediction.json if it does not exist: a prediction is made once, before the run. The
second writes the result of the held-out run to held_out.json and compares it with the prediction. The third prints the
law of the runs in outputs/studies/scaling, and writes no file.
"""

import argparse
import json
from datetime import datetime
from functools import cached_property
from hashlib import sha256
from math import ceil, log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from law import bootstrap, fit, interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gpt2.analysis.compare_plot import colours
from gpt2.analysis.plotting import BEST, new_figure, picture, plain
from gpt2.analysis.runs import RunResult
from gpt2.analysis.tables import as_markdown
from gpt2.experiments.plan import planned_runs, read_plan
from gpt2.experiments.results import recorded, rows_of, with_section
from gpt2.tracking.tracker import FINISHED

MIN_STEPS = 100  # shorter runs are not in the fit: they have hardly left their warm-up
FACTOR = 5  # compute of the held-out run over the largest budget
SAMPLES = 300  # bootstrap samples
OPENING, CLOSING = "<!-- fit: `python experiments/scaling/fit.py` writes this part -->", "<!-- end of fit -->"


def size(width: int) -> float:
    """Millions of weights in the matrices of all blocks, at the depth that _base.yaml sets for a width."""
    return 12 * round(0.025 * width) * width**2 / 1e6


def tokens_per_step(width: int) -> int:
    """The tokens of a step, as _base.yaml sets them for a width."""
    return ceil(1536 / width) * 128


class Runs:
    """The runs of a results.csv: arrays with an element for each run."""

    def __init__(self, text: str):
        rows = rows_of(text)
        self.budgets = [row["variant"] for row in rows]
        self.n = np.array([size(row["model.d_model"]) for row in rows])
        self.d = np.array([row["tokens"] for row in rows]) / 1e6
        self.losses = np.array([row["loss"] for row in rows], float)
        self.flops = 6e12 * self.n * self.d
        is_long = np.array([row["steps"] for row in rows]) >= MIN_STEPS
        is_finished = np.array([row["state"] == FINISHED for row in rows])  # a diverged run has no meaningful loss
        self.in_fit = is_long & is_finished
        self.fitted = (self.n[self.in_fit], self.d[self.in_fit], self.losses[self.in_fit])


def masks(keys: Any) -> list[tuple[Any, NDArray]]:
    """Each distinct key with a mask of its runs; `keys` has the size or the budget of each run."""
    return [(key, np.array([other == key for other in keys])) for key in dict.fromkeys(keys)]


class Fit:
    """The fitted law, and the laws of the bootstrap samples."""

    def __init__(self, runs: Runs, samples: int):
        self.runs = runs
        self.law = fit(*runs.fitted)
        self.laws = bootstrap(*runs.fitted, self.law, samples)

    @cached_property
    def residuals(self) -> NDArray:
        """The logarithm of measured over fitted loss of each run."""
        n, d, losses = self.runs.fitted
        return np.log(losses / self.law.loss(n, d))

    def predict(self, n: float, d: float) -> tuple[float, tuple[float, float]]:
        """The predicted loss of another run, and its interval over bootstrap laws with randomly drawn residuals."""
        drawn = np.random.default_rng(1).choice(self.residuals, len(self.laws))
        losses = [float(law.loss(n, d)) for law in self.laws]
        return float(self.law.loss(n, d)), interval(losses * np.exp(drawn))

    def record(self) -> dict[str, Any]:
        """The content of fit.json: each figure with its interval."""
        smallest, largest = min(self.runs.flops), max(self.runs.flops)
        figures = {
            **{name: lambda law, name=name: getattr(law, name) for name in ("e", "a", "b", "alpha", "beta")},
            "size_exponent": lambda law: law.size_exponent,
            "token_exponent": lambda law: 1 - law.size_exponent,
            "best_size_at_smallest": lambda law: float(law.best_size(smallest)),
            "best_size_at_largest": lambda law: float(law.best_size(largest)),
        }
        return {
            "runs": len(self.runs.n),
            "runs_in_fit": int(self.runs.in_fit.sum()),
            "median_residual": float(np.median(np.abs(self.residuals))),
            "largest_residual": float(np.max(np.abs(self.residuals))),
            "largest_flops": float(largest),
            **{name: [float(of(self.law)), *interval([of(law) for law in self.laws])] for name, of in figures.items()},
        }


def prediction(result: Fit) -> dict[str, Any]:
    """The settings and the predicted loss of the held-out run. Its width is a multiple of 32 near the best size."""
    # Rounded, because runs have whole steps, and so nearly the same compute.
    flops = float(f"{FACTOR * max(result.runs.flops):.2g}")
    best = float(result.law.best_size(flops))
    width = min(range(32, 1025, 32), key=lambda width: abs(log(size(width) / best)))
    steps = round(flops / (6e6 * size(width)) / tokens_per_step(width))
    tokens = steps * tokens_per_step(width)
    loss, (low, high) = result.predict(size(width), tokens / 1e6)
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"python train.py +scaling=held_out model.d_model={width}",
        "flops": flops,
        "best_size": best,
        "width": width,
        "size": size(width),
        "steps": steps,
        "tokens": tokens,
        "loss": loss,
        "interval": [low, high],
    }


def held_out(run: RunResult, predicted: dict[str, Any]) -> dict[str, Any]:
    """The result of the held-out run. Other runs, and runs from before the prediction, are refused."""
    made, started = (datetime.fromisoformat(text).astimezone() for text in (predicted["made"], run.about["started"]))
    found = {"width": run.config["model.d_model"], "steps": run.last("step"), "state": run.state}
    wanted = {"width": predicted["width"], "steps": predicted["steps"], "state": FINISHED}
    if found != wanted:
        raise SystemExit(f"error: {run.folder} has {found}, the prediction is for {wanted}")
    if made >= started:
        raise SystemExit(f"error: {run.folder} started before the prediction was made, {predicted['made']}")
    return {
        "started": run.about["started"],
        "state": run.state,
        "width": run.config["model.d_model"],
        "tokens": run.last("tokens"),
        "loss": run.last("val/loss"),
        "bits_per_byte": run.last("val/bits_per_byte"),
        "seconds": run.last("seconds"),
    }


def seed_noise(folder: Path) -> float:
    """The standard deviation between seeds as a share of the loss, over the settings of seeds.csv."""
    settings: dict[Any, list[float]] = {}
    for row in rows_of((folder / "seeds.csv").read_text()):
        settings.setdefault((row["variant"], row["model.d_model"]), []).append(row["loss"])
    return mean((stdev(losses) / mean(losses)) ** 2 for losses in settings.values()) ** 0.5


def read(path: Path) -> Any:
    """Return the content of a JSON file; None if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else None


def over_compute(result: Fit, predicted: dict[str, Any], measured: dict[str, Any] | None) -> Figure:
    """Loss over compute: a line for each size, the frontier of the law, the prediction and the held-out run."""
    figure = new_figure(6.5, 4.6)
    axes, runs = figure.subplots(), result.runs
    sizes = masks(runs.n)
    for (n, mask), colour in zip(sizes, colours([n for n, _ in sizes]), strict=True):
        _points(axes, runs.flops, runs, mask, colour, "-")
        first = np.flatnonzero(mask)[0]
        label = f"{n:.2g} M"
        axes.annotate(label, (runs.flops[first], runs.losses[first]), (-5, 0), textcoords="offset points", ha="right",
                      va="center", color=colour)  # fmt: skip
    flops = np.geomspace(min(runs.flops), predicted["flops"], 100)
    for part, style in ((flops <= max(runs.flops) * 1.05, "-"), (flops >= max(runs.flops), ":")):
        axes.plot(flops[part], result.law.best_loss(flops[part]), style, color="black", linewidth=1.6)
    middle = flops[45]
    axes.annotate("compute-optimal", (middle, float(result.law.best_loss(middle))), (-8, -10), ha="right", va="top",
                  textcoords="offset points")  # fmt: skip
    low, high = predicted["interval"]
    axes.vlines(predicted["flops"], low, high, color=BEST, linewidth=6, alpha=0.35)
    axes.plot(predicted["flops"], predicted["loss"], "_", color=BEST, markersize=14, markeredgewidth=2)
    labels = [(f"predicted\n{predicted['loss']:.3f}", BEST)]
    if measured:
        axes.plot(predicted["flops"], measured["loss"], "*", color="black", markersize=11)
        labels.insert(0, (f"measured ★\n{measured['loss']:.3f}", "black"))
    for number, (text, colour) in enumerate(labels):
        axes.annotate(text, (predicted["flops"], high), (0, 8 + 28 * number), textcoords="offset points", ha="center",
                      va="bottom", color=colour)  # fmt: skip
    axes.set_xlim(min(runs.flops) / 2.2, predicted["flops"] * 1.8)
    _log_axes(axes, "compute, 6 N D (FLOPs); lines: N, parameters without embeddings")
    return figure


def over_size(result: Fit) -> Figure:
    """Loss over size at equal compute: a curve of the law for each budget, with its lowest point."""
    figure = new_figure(6.5, 4.6)
    axes, runs = figure.subplots(), result.runs
    budgets = masks(runs.budgets)
    grid = np.geomspace(min(runs.n) / 1.5, max(runs.n) * 1.2, 200)
    top = max(runs.losses[runs.in_fit]) * 1.12
    for (_, mask), colour in zip(budgets, colours([name for name, _ in budgets]), strict=True):
        flops = float(np.median(runs.flops[mask]))
        _points(axes, runs.n, runs, mask, colour, "none")
        curve = result.law.loss(grid, flops / 6e12 / grid)
        axes.plot(grid[curve < top], curve[curve < top], color=colour, linewidth=1.4)
        best = float(result.law.best_size(flops))
        if grid[0] < best < grid[-1]:
            axes.plot(best, result.law.best_loss(flops), "D", color=colour, markersize=7, markeredgecolor="black")
        last = np.flatnonzero(curve < top)[-1]
        axes.annotate(f"{flops:.1e}".replace("e+", "e"), (grid[last], curve[last]), (4, 0), va="center",
                      textcoords="offset points", color=colour)  # fmt: skip
    axes.set_xlim(grid[0], grid[-1] * 2.2)
    axes.set_ylim(min(runs.losses) * 0.95, top)
    _log_axes(axes, "N, parameters without embeddings (millions); curves: FLOPs of a run")
    return figure


def _points(axes: Axes, x: NDArray, runs: Runs, mask: NDArray, colour: str, line: str) -> None:
    """Draw runs as points: filled if they are in the fit, otherwise hollow."""
    axes.plot(x[mask], runs.losses[mask], linestyle=line, color=colour, linewidth=0.8, alpha=0.6)
    for is_fitted, filling in ((True, colour), (False, "none")):
        chosen = mask & (runs.in_fit == is_fitted)
        axes.plot(x[chosen], runs.losses[chosen], "o", color=colour, markersize=5, markerfacecolor=filling)


def _log_axes(axes: Axes, xlabel: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [tick for tick in (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4) if low < tick < high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    plain(axes, xlabel=xlabel, ylabel="validation loss (nats per byte)")
    axes.minorticks_off()


SHOWN = (  # name in fit.json, label, format
    ("e", "E, irreducible loss (nats)", "{:.3f}"),
    ("a", "A, nats at a million parameters", "{:.3f}"),
    ("alpha", "α, exponent of the size", "{:.3f}"),
    ("b", "B, nats at a million bytes", "{:.3f}"),
    ("beta", "β, exponent of the text", "{:.3f}"),
    ("size_exponent", "the best size grows as compute to the power", "{:.2f}"),
    ("token_exponent", "the best length grows as compute to the power", "{:.2f}"),
    ("best_size_at_largest", "best size at the largest budget, million parameters", "{:.2f}"),
)


def table(record: dict[str, Any]) -> str:
    rows = [["", "fit", "95 % of bootstrap samples"]]
    for name, label, shown in SHOWN:
        value, low, high = map(shown.format, record[name])
        rows.append([label, value, f"{low} to {high}"])
    return as_markdown(rows)


def section(folder: Path) -> str:
    """The part of the README that this script writes, from the files of the study."""
    record, predicted, measured = (read(folder / name) for name in ("fit.json", "prediction.json", "held_out.json"))
    power, at_least, at_most = record["size_exponent"]
    best, length = record["best_size_at_largest"][0], record["largest_flops"] / 6e12 / record["best_size_at_largest"][0]
    low, high = predicted["interval"]
    return "\n\n".join(
        [
            f"The best size grows as the compute to the power {power:.2f} (95 % of bootstrap samples: {at_least:.2f} "
            f"to {at_most:.2f}), the text as the power {1 - power:.2f}: at {record['largest_flops']:.1g} FLOPs, a "
            f"model of {best:.2f} million parameters on {length:.0f} million bytes. Before the run of {FACTOR} times "
            f"that compute, the law predicted {predicted['loss']:.3f} nats a byte ({low:.3f} to {high:.3f}). "
            f"{verdict(predicted, measured, seed_noise(folder)) if measured else 'The run is not done yet.'}",
            "![loss over compute: each size, the best of all, and the prediction](compute.png)",
            "![loss over size at equal compute](sizes.png)",
            f"The law is L(N, D) = E + A / N^α + B / D^β (Hoffmann et al., 2022, approach 3), N in millions of "
            f"parameters without embeddings, D in millions of bytes. It is fitted to the {record['runs_in_fit']} of "
            f"{record['runs']} runs that have {MIN_STEPS} steps or more; the others, hollow in the pictures, have "
            f"hardly left their warm-up. Half of the losses are within {100 * record['median_residual']:.1f} % "
            f"of the law, the farthest is {100 * record['largest_residual']:.1f} % off; the standard deviation between "
            f"seeds is {100 * seed_noise(folder):.1f} %.",
            table(record),
            f"The prediction was made {predicted['made']}, for width {predicted['width']}: "
            f"{predicted['size']:.2f} million parameters, {predicted['tokens'] / 1e6:.1f} million bytes, "
            f"{predicted['flops']:.2g} FLOPs.",
        ]
    )


def verdict(predicted: dict[str, Any], measured: dict[str, Any], noise: float) -> str:
    """The error of a prediction: in nats, in halves of its interval, and in standard deviations between seeds."""
    low, high = predicted["interval"]
    error = measured["loss"] - predicted["loss"]
    return (
        f"The run, started {measured['started']}, reached {measured['loss']:.3f}: {abs(error):.3f} nats "
        f"{'above' if error > 0 else 'below'} the prediction and "
        f"{'inside' if low <= measured['loss'] <= high else 'outside'} its interval, "
        f"{abs(error) / ((high - low) / 2):.1f} times half the interval and "
        f"{abs(error) / (noise * predicted['loss']):.1f} times the standard deviation between seeds."
    )


def so_far(folder: Path) -> None:
    """Print the law of the runs that are done."""
    plan = read_plan(folder)
    done = [run for run in planned_runs(plan, folder.name) if run.is_done]
    result = Fit(Runs(recorded(plan, done)), SAMPLES)
    print(table(result.record()), json.dumps(prediction(result), indent=1), sep="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent, help="of the study")
    parser.add_argument("--held-out", type=Path, metavar="RUN", help="folder of the run that was predicted")
    parser.add_argument("--so-far", action="store_true", help="the runs in outputs/studies, instead of results.csv")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.so_far:
        so_far(folder)
        return
    text = (folder / "results.csv").read_text()
    result = Fit(Runs(text), SAMPLES)
    _write(folder / "fit.json", result.record())
    if not (folder / "prediction.json").exists():
        checksum = sha256(text.encode()).hexdigest()
        _write(folder / "prediction.json", {**prediction(result), "sha256_of_results": checksum})
    predicted = read(folder / "prediction.json")
    if options.held_out:
        _write(folder / "held_out.json", held_out(RunResult(options.held_out), predicted))
    measured = read(folder / "held_out.json")
    (folder / "compute.png").write_bytes(picture(over_compute(result, predicted, measured), source=text.encode()))
    (folder / "sizes.png").write_bytes(picture(over_size(result), source=text.encode()))
    readme = folder / "README.md"
    readme.write_text(with_section(readme.read_text(), section(folder), OPENING, CLOSING))
    print(section(folder))


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
