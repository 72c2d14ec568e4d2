"""What a recorded study has found: `results.csv`, a table and pictures in its `README.md`."""

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from gpt2.analysis.compare import Comparison, as_markdown, shown_value
from gpt2.analysis.compare_plot import colours, curves
from gpt2.analysis.plotting import as_label, new_figure, picture, plain
from gpt2.analysis.runs import COLUMNS, UNITS, RunResult
from gpt2.config import StudyPlan
from gpt2.errors import UserError
from gpt2.experiments.plan import Point, key_of_columns
from gpt2.runtime.files import atomic_write
from gpt2.tracking.tracker import DIVERGED

RESULTS, README = "results.csv", "README.md"
OPENING, CLOSING = "<!-- results: `python -m gpt2.main study` writes this part -->", "<!-- end of results -->"
FIGURES = (
    *("steps", "tokens", "text_bytes", "flops", "parameters"),
    *("loss", "best", "bits_per_byte", "tokens_per_second"),
)


@dataclass
class Cell:
    """What the runs of a study came to that differ by their seed only."""

    variant: str
    values: dict[str, Any]  # of the sweep
    runs: list[RunResult]
    metric: str

    def of(self, key: str) -> Any:
        """The value of a key of the configuration, or of a column, in the mean; or the variant."""
        if key == "variant":
            return self.variant
        if key in COLUMNS:
            found = [value for run in self.runs if (value := COLUMNS[key].of(run)) is not None]
            return mean(found) if found else None
        return self.runs[0].config.get(key)

    @property
    def results(self) -> list[float]:
        """Of the runs that did not diverge."""
        kept = (COLUMNS[self.metric].of(run) for run in self.runs if run.state != DIVERGED)
        return [value for value in kept if value is not None]

    @property
    def value(self) -> float:
        """Their mean; infinitely bad if any run diverged, or none has the metric."""
        worst = inf if COLUMNS[self.metric].is_less_better else -inf
        return mean(self.results) if len(self.results) == len(self.runs) else worst

    @property
    def spread(self) -> float:
        """Half the distance between the best and the worst."""
        return (max(self.results) - min(self.results)) / 2 if self.results else 0.0

    def shown(self) -> str:
        diverged = sum(run.state == DIVERGED for run in self.runs)
        if not self.results:
            return "diverged" if diverged else "n/a"
        spread = f" ± {self.spread:.3f}" if len(self.results) > 1 else ""
        lost = f" ({diverged} of {len(self.runs)} diverged)" if diverged else ""
        return f"{COLUMNS[self.metric].shown(mean(self.results))}{spread}{lost}"


class Results:
    """The runs of a study, all of them done."""

    def __init__(self, name: str, plan: StudyPlan, points: Iterable[Point]):
        self.name, self.plan = name, plan
        self.runs = [(point, RunResult(point.folder)) for point in points]
        groups: dict[str, Cell] = {}
        for point, run in self.runs:
            swept = {key: value for key, value in point.values.items() if key in plan.sweep}
            cell = groups.setdefault(f"{point.variant} {swept}", Cell(point.variant, swept, [], plan.metric))
            cell.runs.append(run)
        self.cells = list(groups.values())

    @property
    def sign(self) -> int:
        return 1 if COLUMNS[self.plan.metric].is_less_better else -1

    def lines(self) -> dict[Any, list[Cell]]:
        """The cells of each line of the picture, in the order of the plan."""
        lines: dict[Any, list[Cell]] = {}
        for cell in self.cells:
            lines.setdefault(cell.of(self.plan.lines), []).append(cell)
        return lines

    def best(self, cells: list[Cell]) -> Cell:
        return min(cells, key=lambda cell: self.sign * cell.value)

    def csv(self) -> str:
        """A line a run."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        keys = list(self.runs[0][0].values)
        figures = dict.fromkeys([*FIGURES, self.plan.metric])
        writer.writerow(["variant", *keys, "state", *figures, "seconds"])
        for point, run in self.runs:
            values = [*(COLUMNS[name].of(run) for name in figures), run.last("seconds")]
            shown = ("" if value is None else value for value in values)
            writer.writerow([point.variant, *(shown_value(v) for v in point.values.values()), run.state, *shown])
        return file.getvalue()

    def table(self) -> str:
        """A row a line of the picture, a column a value of what it is drawn over; the best of each row is bold."""
        key = key_of_columns(self.plan)
        heads = list(dict.fromkeys(cell.of(key) for cell in self.cells))
        rows = [[f"{_short(self.plan.lines)} \\ {_short(key)}", *map(shown_value, heads)]]
        for line, cells in self.lines().items():
            best = self.best(cells)
            is_good = len(best.results) == len(best.runs)
            by_head = {c.of(key): f"**{c.shown()}**" if c is best and is_good else c.shown() for c in cells}
            rows.append([shown_value(line), *(by_head.get(head, "") for head in heads)])
        return as_markdown(rows)

    def section(self) -> str:
        """What stands in the README."""
        seeds = len(self.plan.seeds)
        what = UNITS.get(self.plan.metric, COLUMNS[self.plan.metric].header)
        spread = f", mean of {seeds} seeds ± half the distance between the best and the worst" if seeds > 1 else ""
        hours = sum(run.last("seconds") or 0 for _, run in self.runs) / 3600
        machines = dict.fromkeys(map(_machine, (run for _, run in self.runs)))
        return "\n\n".join(
            [
                f"{what[0].upper()}{what[1:]} at the end of training{spread}. The best of each row is bold.",
                self.table(),
                f"![{what} over {_short(self.plan.x)}](results.png)",
                "![the runs on their way: the best of each variant](curves.png)",
                f"{len(self.runs)} runs, {hours:.1f} hours of training one after another, on {'; '.join(machines)}.",
            ]
        )

    def over_x(self) -> Figure:
        """The metric over `plan.x`: means, the range over seeds, and the best of each line in a ring."""
        figure = new_figure(8, 5)
        axes = figure.subplots()
        lines, metric = self.lines(), COLUMNS[self.plan.metric]
        places = [cell.of(self.plan.x) for cell in self.cells]
        is_number = all(isinstance(place, int | float) for place in places)
        names = list(dict.fromkeys(places))
        for (line, cells), colour in zip(lines.items(), colours(list(lines)), strict=True):
            drawn = [cell for cell in cells if cell.results]
            if not drawn:
                continue
            drawn.sort(key=lambda cell: cell.of(self.plan.x) if is_number else names.index(cell.of(self.plan.x)))
            x = [cell.of(self.plan.x) if is_number else names.index(cell.of(self.plan.x)) for cell in drawn]
            y = [mean(cell.results) for cell in drawn]
            axes.plot(x, y, "-", color=colour, linewidth=1.6, label=as_label(shown_value(line)))
            axes.vlines(x, [min(c.results) for c in drawn], [max(c.results) for c in drawn], color=colour, linewidth=1)
            for place, cell in zip(x, drawn, strict=True):
                axes.plot([place] * len(cell.results), cell.results, ".", color=colour, markersize=5)
            best = drawn.index(self.best(drawn))
            axes.plot(x[best], y[best], "o", markersize=11, markerfacecolor="none", color=colour)
        if is_number and min(places) > 0 and max(places) >= 8 * min(places):
            axes.set_xscale("log")
        if self.plan.x not in COLUMNS:
            axes.set_xticks(names if is_number else range(len(names)), [as_label(shown_value(name)) for name in names])
            axes.minorticks_off()
        plain(
            axes,
            xlabel=UNITS.get(self.plan.x, _short(self.plan.x)),
            ylabel=UNITS.get(self.plan.metric, metric.header),
        )
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title=_short(self.plan.lines), frameon=False)
        return figure

    def curves(self) -> Figure:
        """The runs of the best cell of each variant, on their way; against compute, for several share a machine."""
        best = {v: self.best([cell for cell in self.cells if cell.variant == v]) for v in self.plan.variants}
        names = {run.folder: variant for variant, cell in best.items() for run in cell.runs}
        lines = self.lines()
        is_same = len(lines) == len(best)  # a variant is a line of the other picture, and has its colour
        shades = colours(list(lines)) if is_same else colours(list(best))
        palette = dict(zip(best, shades, strict=True))
        runs = [run for cell in best.values() for run in cell.runs]
        return curves(Comparison(runs), "flops", palette=palette, group_of=lambda run: names[run.folder])

    def write(self, folder: Path) -> list[str]:
        """Write everything. Returns the names of the files."""
        readme = folder / README
        text = readme.read_text(encoding="utf-8") if readme.exists() else f"# {self.name}\n"
        contents = {
            RESULTS: self.csv().encode(),
            "results.png": picture(self.over_x()),
            "curves.png": picture(self.curves()),
            README: with_section(text, self.section()).encode(),
        }
        for name, content in contents.items():
            with atomic_write(folder / name) as file:
                file.write(content)
        return list(contents)

    def beside_recorded(self, folder: Path) -> str | None:
        """How these results compare with those in the folder, of an earlier time; None without any."""
        path = folder / RESULTS
        if not path.exists():
            return None
        now = _means(self.csv(), self.plan)
        then = _means(path.read_text(encoding="utf-8"), self.plan)
        both = [key for key in now if key in then]
        if not both:
            return None
        off = {key: abs(mean(now[key]) - mean(then[key])) for key in both}
        within = [key for key in both if off[key] <= max(then[key]) - min(then[key])]
        same = sum(now[key] == then[key] for key in both)
        return (
            f"Beside the recorded results: {len(within)} of {len(both)} means lie within the recorded range over seeds,"
            f" {same} are the same to all digits; the largest difference is {max(off.values()):.4f}"
        )


def _means(text: str, plan: StudyPlan) -> dict[str, list[float]]:
    """The results in a `results.csv`, by all that its runs have in common but their seed."""
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        key = json.dumps([row.get("variant"), *(row.get(name) for name in plan.sweep)])
        value = row.get(plan.metric)
        if value and row.get("state") != DIVERGED:
            found.setdefault(key, []).append(float(value))
    return found


def with_section(text: str, section: str) -> str:
    """A README with our part of it exchanged, or added at its end."""
    marked = f"{OPENING}\n\n{section}\n\n{CLOSING}"
    pattern = re.escape(OPENING) + ".*?" + re.escape(CLOSING)
    if re.search(pattern, text, re.DOTALL):
        return re.sub(pattern, lambda _: marked, text, flags=re.DOTALL)
    if OPENING in text:
        raise UserError(f"{README}: the line {CLOSING} is missing, which ends the part that is written anew")
    return f"{text.rstrip()}\n\n{marked}\n"


def _short(key: str) -> str:
    return COLUMNS[key].header if key in COLUMNS else key.rpartition(".")[2].replace("_", " ")


def _machine(run: RunResult) -> str:
    machine, versions = run.about.get("machine") or {}, run.about.get("versions") or {}
    device = machine.get("device")
    place = f"{machine.get('cpu')} with {machine.get('cores')} cores" if device == "cpu" else device
    threads = f", {machine.get('threads')} of them a run" if device == "cpu" else ""
    return f"{place}{threads} (PyTorch {versions.get('torch')}, Python {versions.get('python')})"
