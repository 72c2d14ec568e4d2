"""The results of a recorded study: `results.csv`, and a table and pictures in its `README.md`."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2.analysis.compare import Comparison, shown_value
from gpt2.analysis.compare_plot import colours, curves
from gpt2.analysis.plotting import as_label, new_figure, picture, plain
from gpt2.analysis.runs import COLUMNS, UNITS, RunResult
from gpt2.analysis.tables import as_markdown
from gpt2.config import StudyPlan
from gpt2.errors import UserError
from gpt2.experiments.plan import PlannedRun, column_key
from gpt2.runtime.files import atomic_write, exclusive_change
from gpt2.tracking.tracker import DIVERGED

RESULTS, README = "results.csv", "README.md"
OPENING, CLOSING = "<!-- results: `python -m gpt2.main study` writes this part -->", "<!-- end of results -->"
FIGURES = (
    *("steps", "tokens", "flops", "parameters"),
    *("loss", "best", "bits_per_byte", "tokens_per_second"),
)


@dataclass
class Cell:
    """A cell of the table: the runs of one setting, which differ in their seed."""

    variant: str
    metric: str
    runs: list[RunResult] = field(default_factory=list)

    def value_of(self, key: str) -> Any:
        """The variant, the mean of a column, or the value of a key of the configuration."""
        if key == "variant":
            return self.variant
        if key in COLUMNS:
            values = [value for run in self.runs if (value := COLUMNS[key].of(run)) is not None]
            return mean(values) if values else None
        return self.runs[0].config.get(key)

    @property
    def results(self) -> list[float]:
        """The metric of each run that did not diverge."""
        values = (COLUMNS[self.metric].of(run) for run in self.runs if run.state != DIVERGED)
        return [value for value in values if value is not None]

    @property
    def loss(self) -> float:
        """The mean metric, with the sign that makes less better; infinite if a run diverged or has no metric."""
        if len(self.results) < len(self.runs):
            return inf
        return mean(self.results) if COLUMNS[self.metric].is_less_better else -mean(self.results)

    def shown(self) -> str:
        diverged = sum(run.state == DIVERGED for run in self.runs)
        if not self.results:
            return "diverged" if diverged else "n/a"
        spread = f" ± {(max(self.results) - min(self.results)) / 2:.3f}" if len(self.results) > 1 else ""
        lost = f" ({diverged} of {len(self.runs)} diverged)" if diverged else ""
        return f"{COLUMNS[self.metric].shown(mean(self.results))}{spread}{lost}"


def best_of(cells: list[Cell]) -> Cell:
    return min(cells, key=lambda cell: cell.loss)


class Results:
    """The results of a complete study."""

    def __init__(self, name: str, plan: StudyPlan, runs: Iterable[PlannedRun]):
        self.name, self.plan = name, plan
        self.runs = [(run, RunResult(run.folder)) for run in runs]
        cells: dict[str, Cell] = {}
        for planned, run in self.runs:
            setting = [planned.variant, *(value for key, value in planned.values.items() if key in plan.sweep)]
            cells.setdefault(repr(setting), Cell(planned.variant, plan.metric)).runs.append(run)
        self.cells = list(cells.values())

    def lines(self) -> dict[Any, list[Cell]]:
        """The cells of each line of the picture, which is a row of the table, in the order of the plan."""
        lines = defaultdict(list)
        for cell in self.cells:
            lines[cell.value_of(self.plan.lines)].append(cell)
        return lines

    def csv(self) -> str:
        """One line a run."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        figures = dict.fromkeys([*FIGURES, self.plan.metric])
        writer.writerow(["variant", *self.runs[0][0].values, "state", *figures, "seconds"])
        for planned, run in self.runs:
            values = [*(COLUMNS[name].of(run) for name in figures), run.last("seconds")]
            shown = ("" if value is None else value for value in values)
            writer.writerow([planned.variant, *map(shown_value, planned.values.values()), run.state, *shown])
        return file.getvalue()

    def table(self) -> str:
        """A row for each line of the picture and a column for each value of its x axis. The best of a row is bold."""
        key = column_key(self.plan)
        heads = list(dict.fromkeys(cell.value_of(key) for cell in self.cells))
        rows = [[f"{_short(self.plan.lines)} \\ {_short(key)}", *map(shown_value, heads)]]
        for line, cells in self.lines().items():
            best = best_of(cells)
            shown = {c.value_of(key): f"**{c.shown()}**" if c is best and c.loss < inf else c.shown() for c in cells}
            rows.append([shown_value(line), *(shown.get(head, "") for head in heads)])
        return as_markdown(rows)

    def section(self) -> str:
        """The generated part of the README."""
        seeds = len(self.plan.seeds)
        metric = UNITS.get(self.plan.metric, COLUMNS[self.plan.metric].header)
        spread = f", mean of {seeds} seeds ± half the distance between the best and the worst" if seeds > 1 else ""
        hours = sum(run.last("seconds") or 0 for _, run in self.runs) / 3600
        machines = dict.fromkeys(_machine(run) for _, run in self.runs)
        return "\n\n".join(
            [
                f"{metric[0].upper()}{metric[1:]} at the end of training{spread}. The best of each row is bold.",
                self.table(),
                f"![{metric} over {_short(self.plan.x)}](results.png)",
                "![loss curves of the best setting of each variant](curves.png)",
                f"{len(self.runs)} runs, {hours:.1f} hours of training in total, on {'; '.join(machines)}.",
            ]
        )

    def over_x(self) -> Figure:
        """The metric over `plan.x`: means, the range over seeds, and a ring around the best of each line."""
        figure = new_figure(8, 5)
        axes = figure.subplots()
        lines, x = self.lines(), self.plan.x
        names = list(dict.fromkeys(cell.value_of(x) for cell in self.cells))
        is_number = all(isinstance(name, int | float) for name in names)
        places = {name: name if is_number else place for place, name in enumerate(names)}
        for (line, cells), colour in zip(lines.items(), colours(list(lines)), strict=True):
            drawn = [(places[cell.value_of(x)], cell) for cell in cells if cell.results]
            if drawn:
                _plot_line(axes, sorted(drawn, key=lambda item: item[0]), colour, as_label(shown_value(line)))
        if is_number and min(names) > 0 and max(names) >= 8 * min(names):
            axes.set_xscale("log")
        if x not in COLUMNS:
            axes.set_xticks(list(places.values()), [as_label(shown_value(name)) for name in names])
            axes.minorticks_off()
        metric = self.plan.metric
        plain(axes, xlabel=UNITS.get(x, _short(x)), ylabel=UNITS.get(metric, COLUMNS[metric].header))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title=_short(self.plan.lines), frameon=False)
        return figure

    def curves(self) -> Figure:
        """Loss curves of the best setting of each variant, over compute: run time depends on what runs beside it."""
        best = {v: best_of([cell for cell in self.cells if cell.variant == v]) for v in self.plan.variants}
        variants = {run.folder: variant for variant, cell in best.items() for run in cell.runs}
        lines = list(self.lines())
        palette = dict(zip(best, colours(lines if len(lines) == len(best) else list(best)), strict=True))
        runs = [run for cell in best.values() for run in cell.runs]
        return curves(Comparison(runs), "flops", palette=palette, group_of=lambda run: variants[run.folder])

    def write(self, folder: Path) -> list[str]:
        """Write all files. Returns their names."""
        readme = folder / README
        with exclusive_change(folder):
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

    def compare_with_recorded(self, folder: Path) -> list[str]:
        """How these results compare with those that the folder has, in one line; empty without any."""
        path = folder / RESULTS
        now = _results_by_setting(self.csv(), self.plan)
        then = _results_by_setting(path.read_text(encoding="utf-8") if path.exists() else "", self.plan)
        both = now.keys() & then.keys()
        if not both:
            return []
        differences = {key: abs(mean(now[key]) - mean(then[key])) for key in both}
        within = sum(differences[key] <= max(then[key]) - min(then[key]) for key in both)
        return [
            f"Compared with the recorded results: {within} of {len(both)} means are within the recorded range over "
            f"seeds; the largest difference is {max(differences.values()):.4f}"
        ]


def _plot_line(axes: Axes, cells: list[tuple[Any, Cell]], colour: str, label: str) -> None:
    x, results = [place for place, _ in cells], [cell.results for _, cell in cells]
    axes.plot(x, list(map(mean, results)), "-", color=colour, linewidth=1.6, label=label)
    axes.vlines(x, list(map(min, results)), list(map(max, results)), color=colour, linewidth=1)
    for place, values in zip(x, results, strict=True):
        axes.plot([place] * len(values), values, ".", color=colour, markersize=5)
    place, best = min(cells, key=lambda cell: cell[1].loss)
    axes.plot(place, mean(best.results), "o", markersize=11, markerfacecolor="none", color=colour)


def _results_by_setting(text: str, plan: StudyPlan) -> dict[tuple[Any, ...], list[float]]:
    """The metric of the runs in a `results.csv`, by variant and swept values."""
    results = defaultdict(list)
    for row in csv.DictReader(io.StringIO(text)):
        if row.get(plan.metric) and row.get("state") != DIVERGED:
            results[row.get("variant"), *(row.get(name) for name in plan.sweep)].append(float(row[plan.metric]))
    return results


def with_section(text: str, section: str) -> str:
    """A README with its generated part replaced, or appended if it has none."""
    marked = f"{OPENING}\n\n{section}\n\n{CLOSING}"
    pattern = re.escape(OPENING) + ".*?" + re.escape(CLOSING)
    if re.search(pattern, text, re.DOTALL):
        return re.sub(pattern, lambda _: marked, text, flags=re.DOTALL)
    if OPENING in text:
        raise UserError(f"{README}: the line {CLOSING} is missing, which ends the generated part")
    return f"{text.rstrip()}\n\n{marked}\n"


def _short(key: str) -> str:
    return COLUMNS[key].header if key in COLUMNS else key.rpartition(".")[2].replace("_", " ")


def _machine(run: RunResult) -> str:
    machine, versions = run.about.get("machine") or {}, run.about.get("versions") or {}
    device = machine.get("device")
    place = f"{machine.get('cpu')} with {machine.get('cores')} cores" if device == "cpu" else device
    threads = f", {machine.get('threads')} of them per run" if device == "cpu" else ""
    return f"{place}{threads} (PyTorch {versions.get('torch')}, Python {versions.get('python')})"
