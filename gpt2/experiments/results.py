"""The results of a recorded study: `results.csv`, and what is computed from it: a picture and a part of `README.md`."""

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2.analysis.compare import shown_value
from gpt2.analysis.compare_plot import colours
from gpt2.analysis.plotting import as_label, label_ends, new_figure, picture, plain
from gpt2.analysis.runs import COLUMNS, SEED, UNITS, RunResult
from gpt2.analysis.tables import as_markdown
from gpt2.cli.compose import ROOT
from gpt2.config import StudyPlan
from gpt2.errors import UserError, few, one_line
from gpt2.experiments.plan import PLAN, PlannedRun, column_key, planned_runs, read_plan
from gpt2.runtime.files import atomic_write, exclusive_change
from gpt2.tracking.tracker import DIVERGED

RESULTS, PICTURE, README = "results.csv", "results.png", "README.md"
OPENING, CLOSING = "<!-- results: `python -m gpt2.main study` writes this part -->", "<!-- end of results -->"
FIGURES = (
    *("steps", "tokens", "flops", "parameters"),
    *("loss", "best", "bits_per_byte", "tokens_per_second"),
)
Row = dict[str, Any]  # a run: a line of `results.csv`


def columns_of(plan: StudyPlan) -> tuple[list[str], list[str]]:
    """The settings and the figures in the `results.csv` of a study."""
    drawn = (key for key in (plan.panels, plan.x, plan.lines) if key and key not in {*plan.sweep, SEED})
    figures = dict.fromkeys([*FIGURES, plan.metric, *({plan.x} & COLUMNS.keys())])
    settings = dict.fromkeys(["variant", *drawn, *plan.sweep, SEED])
    return [key for key in settings if key not in COLUMNS], list(figures)


def recorded(plan: StudyPlan, runs: Iterable[PlannedRun]) -> str:
    """The `results.csv` of a study: one line a run, with everything that table, picture and README are made of."""
    settings, figures = columns_of(plan)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*settings, "state", *figures, "seconds", "machine"])
    for planned, run in ((planned, RunResult(planned.folder)) for planned in runs):
        known = {**run.config, **planned.values, "variant": planned.variant}
        values = [*(COLUMNS[name].of(run) for name in figures), run.last("seconds")]
        shown = ("" if value is None else value for value in values)
        writer.writerow([*(shown_value(known.get(key)) for key in settings), run.state, *shown, _machine(run)])
    return file.getvalue()


def redraw(folder: Path) -> None:
    """Write picture and README of a study again, from its `results.csv`.

    Raises:
        UserError: It has none or one of another plan, or the folder cannot be written to.
    """
    if not (folder / RESULTS).is_file():
        raise UserError(f"study: {folder} has no {RESULTS} to draw from; without --redraw its runs are made")
    results = Results(folder, plan := read_plan(folder))
    if problem := _difference(results.rows, plan):
        raise UserError(f"{folder / RESULTS}: has {problem}; the study writes it when its runs are done")
    print(results.write())


def _difference(rows: list[Row], plan: StudyPlan) -> str | None:
    """What rows have or lack, unlike those of a plan."""
    settings, figures = columns_of(plan)
    needed = [*settings, "state", *figures, "seconds", "machine"]
    if lacking := [key for key in needed if not rows or key not in rows[0]]:
        return f"no {few(lacking)}"
    values = ({**run.values, "variant": run.variant} for run in planned_runs(plan, ""))
    keys = ["variant", *plan.sweep, SEED]
    planned = Counter(tuple(_value(key, shown_value(run[key])) for key in keys) for run in values)
    found = Counter(tuple(row[key] for key in keys) for row in rows)
    for run in planned - found:
        return f"no run {' '.join(map(shown_value, run))}, which {PLAN} plans"
    for run in found - planned:
        return f"the run {' '.join(map(shown_value, run))}, which {PLAN} does not plan"
    return None


def validate_recorded(folder: Path) -> None:
    """Check the files that `Results.write` will change.

    Raises:
        UserError: One of them is damaged.
    """
    read_results(folder)
    with_section(_text(folder / README), "")


def read_results(folder: Path) -> list[Row]:
    """The lines of the `results.csv` of a study; none without the file.

    Raises:
        UserError: It cannot be read.
    """
    return rows_of(_text(folder / RESULTS), folder / RESULTS)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def rows_of(text: str, path: str | Path = RESULTS) -> list[Row]:
    """The lines of a table with commas, such as `results.csv`: numbers as numbers, and None where nothing stands.

    Raises:
        UserError: A line has too few or too many fields, or a figure is no number.
    """
    reader = csv.reader(io.StringIO(text))
    header, rows = next(reader, []), list[Row]()
    for words in filter(None, reader):
        problem = f"{len(words)} instead of {len(header)} fields" if len(words) != len(header) else ""
        row = {key: _value(key, word) for key, word in zip(header, words, strict=False)}
        for key in COLUMNS.keys() & row.keys():
            problem = problem or (f"{key}: {row[key]} is no number" if isinstance(row[key], str) else "")
        if problem:
            raise UserError(f"{path}: line {reader.line_num}: {problem}; correct or delete the file")
        rows.append(row)
    return rows


def _value(key: str, word: str) -> Any:
    if key != "variant" and word[-1:].isdigit() and "_" not in word:  # nan, bpe_1k and 1_2 are names
        for kind in (int, float):
            with suppress(ValueError):
                return kind(word)
    return word or None


@dataclass
class Cell:
    """A cell of the table: the runs of one setting, which differ in their seed."""

    metric: str
    runs: list[Row] = field(default_factory=list)

    def value_of(self, key: str) -> Any:
        """A setting, or the mean of a figure."""
        if key not in COLUMNS:
            return self.runs[0].get(key)
        values = [run[key] for run in self.runs if run.get(key) is not None]
        return mean(values) if values else None

    @property
    def results(self) -> list[float]:
        """The metric of each run that did not diverge."""
        return [run[self.metric] for run in self.runs if run["state"] != DIVERGED and run[self.metric] is not None]

    @property
    def loss(self) -> float:
        """The mean metric, with the sign that makes less better; infinite if a run diverged or has no metric."""
        if len(self.results) < len(self.runs):
            return inf
        return mean(self.results) if COLUMNS[self.metric].is_less_better else -mean(self.results)

    def shown(self) -> str:
        diverged = sum(run["state"] == DIVERGED for run in self.runs)
        if not self.results:
            return "diverged" if diverged else "n/a"
        spread = f" ± {(max(self.results) - min(self.results)) / 2:.3f}" if len(self.results) > 1 else ""
        lost = f" ({diverged} of {len(self.runs)} diverged)" if diverged else ""
        return f"{COLUMNS[self.metric].shown(mean(self.results))}{spread}{lost}"


def best_of(cells: list[Cell]) -> Cell:
    return min(cells, key=lambda cell: cell.loss)


class Results:
    """The results of a complete study, computed from its `results.csv` alone."""

    def __init__(self, folder: Path, plan: StudyPlan, text: str | None = None):
        """
        Args:
            folder: The study.
            text: Instead of the `results.csv` in the folder.
        """
        self.folder, self.plan = folder.resolve(), plan
        self.text = _text(folder / RESULTS) if text is None else text
        self.rows = rows_of(self.text, folder / RESULTS)
        cells: dict[str, Cell] = {}
        for row in self.rows:
            cells.setdefault(repr(_setting(row, plan)), Cell(plan.metric)).runs.append(row)
        self.cells = list(cells.values())

    def panels(self) -> dict[Any, dict[Any, list[Cell]]]:
        """The cells of each line of the picture, which is a row of the table, by panel, in the order of the plan."""
        panels: dict[Any, dict[Any, list[Cell]]] = defaultdict(lambda: defaultdict(list))
        for cell in self.cells:
            panels[cell.value_of(self.plan.panels or "")][cell.value_of(self.plan.lines)].append(cell)
        return panels

    def table(self) -> str:
        """A row for each line of the picture and a column for each value of its x axis. The best of a row is bold."""
        key = column_key(self.plan)
        heads = list(dict.fromkeys(cell.value_of(key) for cell in self.cells))
        names = ", ".join(_short(name) for name in (self.plan.panels, self.plan.lines) if name)
        rows = [[f"{names} \\ {_short(key)}", *map(shown_value, heads)]]
        lines = {(panel, line): cells for panel, lines in self.panels().items() for line, cells in lines.items()}
        for name, cells in lines.items():
            best = best_of(cells)
            shown = {c.value_of(key): f"**{c.shown()}**" if c is best and c.loss < inf else c.shown() for c in cells}
            words = ", ".join(map(shown_value, name[0 if self.plan.panels else 1 :]))
            rows.append([words, *(shown.get(head, "") for head in heads)])
        return as_markdown(rows)

    def section(self) -> str:
        """The generated part of the README: picture, table, command and cost."""
        seeds, name = len(self.plan.seeds), self.folder.name
        metric = UNITS.get(self.plan.metric, COLUMNS[self.plan.metric].header)
        spread = f", mean of {seeds} seeds ± half the distance between the best and the worst" if seeds > 1 else ""
        place = "experiments" if self.folder.parent == ROOT / "experiments" else "outputs/sweeps"
        one = " ".join(["python train.py", *planned_runs(self.plan, name)[0].overrides])
        tokens, flops, seconds = (sum(row[key] or 0 for row in self.rows) for key in ("tokens", "flops", "seconds"))
        machines = dict.fromkeys(row["machine"] for row in self.rows)
        return "\n\n".join(
            [
                f"![{metric} over {_short(self.plan.x)}]({PICTURE})",
                f"{metric[0].upper()}{metric[1:]} at the end of training{spread}. The best of each row is bold.",
                self.table(),
                f"## Command\n\nAll runs, or one of them:\n\n```\npython -m gpt2.main study {place}/{name}\n{one}\n```",
                f"## Cost\n\n{len(self.rows)} runs, {tokens / 1e6:,.3g} million tokens, {flops:.2g} FLOPs, "
                f"{seconds / 3600:.1f} hours of training if one run follows the other, on {'; '.join(machines)}.",
            ]
        )

    def picture(self) -> bytes:
        return picture(self.over_x(), source=self.text.encode())

    def over_x(self) -> Figure:
        """The metric over `plan.x`: means, the range over seeds, and a ring around the best of each line."""
        panels, ends = self.panels(), []
        figure = new_figure(height=4 if len(panels) == 1 else 3.4 * len(panels))
        column = figure.subplots(len(panels), squeeze=False, sharex=True, sharey=True)[:, 0]
        for axes, (panel, lines) in zip(column, panels.items(), strict=True):
            ends.append(self._draw(axes, lines))
            if self.plan.panels:
                axes.set_title(as_label(shown_value(panel)))
        for axes, named in zip(column, ends, strict=True):
            axes.label_outer()
            if self.plan.lines != self.plan.x:
                label_ends(axes, named, len(panels))
        return figure

    def _draw(self, axes: Axes, lines: dict[Any, list[Cell]]) -> list[tuple[float, float, str, str]]:
        """Draw the lines of a panel. Returns their ends, see `label_ends`."""
        x = self.plan.x
        names = list(dict.fromkeys(cell.value_of(x) for cell in self.cells))
        is_number = all(isinstance(name, int | float) for name in names)
        places = {name: name if is_number else place for place, name in enumerate(names)}
        ends = []
        for (line, cells), colour in zip(lines.items(), colours(list(lines)), strict=True):
            drawn = sorted(
                ((places[cell.value_of(x)], cell) for cell in cells if cell.results), key=lambda item: item[0]
            )
            if drawn:
                _plot_line(axes, drawn, colour)
                name = f"{_short(self.plan.lines)} " if isinstance(line, int | float) else ""
                ends.append((drawn[-1][0], mean(drawn[-1][1].results), f"{name}{shown_value(line)}", colour))
        if is_number and min(names) > 0 and max(names) >= 8 * min(names):
            axes.set_xscale("log")
        if x not in COLUMNS:
            axes.set_xticks(list(places.values()), [as_label(shown_value(name)) for name in names])
            axes.minorticks_off()
        metric = self.plan.metric
        plain(axes, xlabel=UNITS.get(x, _short(x)), ylabel=UNITS.get(metric, COLUMNS[metric].header))
        return ends

    def write(self) -> str:
        """Write all files. Returns a line that says so.

        Raises:
            UserError: The folder cannot be written to.
        """
        readme, contents = self.folder / README, {RESULTS: self.text.encode(), PICTURE: self.picture()}
        try:
            with exclusive_change(self.folder):
                text = _text(readme) or f"# {self.folder.name}\n"
                contents[README] = with_section(text, self.section()).encode()
                for name, content in contents.items():
                    with atomic_write(self.folder / name) as file:
                        file.write(content)
        except OSError as error:
            raise UserError(f"cannot write {error.filename or self.folder}: {error.strerror}") from error
        return f"Written to {os.path.relpath(self.folder)}: {', '.join(contents)}"

    def compare_with_recorded(self) -> list[str]:
        """How these results compare with those that the folder has, in one line; empty without any."""
        now, then = (_results_by_setting(rows, self.plan) for rows in (self.rows, read_results(self.folder)))
        both = now.keys() & then.keys()
        if not both:
            return []
        differences = {key: abs(mean(now[key]) - mean(then[key])) for key in both}
        within = sum(differences[key] <= max(then[key]) - min(then[key]) for key in both)
        return [
            f"Compared with the recorded results: {within} of {len(both)} means are within the recorded range over "
            f"seeds; the largest difference is {max(differences.values()):.4f}"
        ]


def _plot_line(axes: Axes, cells: list[tuple[Any, Cell]], colour: str) -> None:
    x, results = [place for place, _ in cells], [cell.results for _, cell in cells]
    axes.plot(x, list(map(mean, results)), "-", color=colour, linewidth=1.6)
    axes.vlines(x, list(map(min, results)), list(map(max, results)), color=colour, linewidth=1)
    for place, values in zip(x, results, strict=True):
        axes.plot([place] * len(values), values, ".", color=colour, markersize=5)
    place, best = min(cells, key=lambda cell: cell[1].loss)
    axes.plot(place, mean(best.results), "o", markersize=11, markerfacecolor="none", color=colour)


def _setting(row: Row, plan: StudyPlan) -> tuple[Any, ...]:
    """Variant and swept values of a run."""
    return row.get("variant"), *(row.get(name) for name in plan.sweep)


def _results_by_setting(rows: list[Row], plan: StudyPlan) -> dict[tuple[Any, ...], list[float]]:
    """The metric of the runs in a `results.csv`."""
    results = defaultdict(list)
    for row in rows:
        if row.get(plan.metric) is not None and row.get("state") != DIVERGED:
            results[_setting(row, plan)].append(row[plan.metric])
    return results


def with_section(text: str, section: str, opening: str = OPENING, closing: str = CLOSING) -> str:
    """A README with its generated part, between two lines, replaced; or appended if it has none."""
    marked = f"{opening}\n\n{section}\n\n{closing}"
    pattern = re.escape(opening) + ".*?" + re.escape(closing)
    if re.search(pattern, text, re.DOTALL):
        return re.sub(pattern, lambda _: marked, text, flags=re.DOTALL)
    if opening in text:
        raise UserError(f"{README}: the line {closing} is missing, which ends the generated part")
    return f"{text.rstrip()}\n\n{marked}\n"


def _short(key: str) -> str:
    return COLUMNS[key].header if key in COLUMNS else key.rpartition(".")[2].replace("_", " ")


def _machine(run: RunResult) -> str:
    machine, versions = run.about.get("machine") or {}, run.about.get("versions") or {}
    device = machine.get("device")
    place = f"{machine.get('cpu')} with {machine.get('cores')} cores" if device == "cpu" else device
    threads = f", {machine.get('threads')} of them per run" if device == "cpu" else ""
    return f"{place}{threads} (PyTorch {versions.get('torch')}, Python {versions.get('python')})"
