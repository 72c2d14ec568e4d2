"""The results of a recorded study: `results.csv`, and a picture and a part of `README.md` computed from it."""

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
from gpt2.config import StudyPlan
from gpt2.errors import UserError, counted, few, one_line
from gpt2.experiments.plan import PLAN, PlannedRun, column_key, planned_runs, read_plan, validated_runs
from gpt2.runtime.files import atomic_write, exclusive_change
from gpt2.runtime.repository import ROOT
from gpt2.tracking.tracker import DIVERGED

RESULTS, PICTURE, README = "results.csv", "results.png", "README.md"
OPENING, CLOSING = "<!-- results: `python -m gpt2.main study` writes this part -->", "<!-- end of results -->"
Row = dict[str, Any]  # a line of `results.csv`: one run


def columns_of(plan: StudyPlan) -> list[str]:
    """Return the header of `results.csv`: settings, state, figures, cost."""
    drawn = (key for key in (plan.panels, plan.x, plan.lines) if key and key not in {*plan.sweep, *COLUMNS, SEED})
    figures = ["steps", "tokens", "flops", "parameters", "loss", "best", "bits_per_byte", "tokens_per_second"]
    figures += [plan.metric, *({plan.x} & COLUMNS.keys())]
    return list(dict.fromkeys(["variant", *drawn, *plan.sweep, SEED, "state", *figures, "seconds", "machine"]))


def recorded(plan: StudyPlan, runs: Iterable[PlannedRun]) -> str:
    """Return the content of `results.csv`: one line per run, with everything that table, picture and README need."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns_of(plan), restval="null", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for planned in runs:
        run = RunResult(planned.folder)
        settings = {**run.config, **planned.values, "variant": planned.variant}
        figures = {name: column.of(run) for name, column in COLUMNS.items()}
        cost = {"state": run.state, "seconds": run.last("seconds"), "machine": _machine(run)}
        writer.writerow({**{key: shown_value(value) for key, value in settings.items()}, **figures, **cost})
    return file.getvalue()


def redraw(folder: Path) -> None:
    """Write picture and README of a study again from its `results.csv`.

    Raises:
        UserError: There is no such file, it does not match the plan, the plan has a mistake, or the folder cannot be
            written to.
    """
    if not (folder / RESULTS).is_file():
        raise UserError(f"study: {folder} has no {RESULTS} to draw from; without --redraw its runs are made")
    results = Results(folder)
    if problem := _difference(results.rows, results.plan):
        validated_runs(results.plan, folder)  # raises if the mistake is in the plan
        raise UserError(f"{folder / RESULTS}: has {problem}; the study writes it when its runs are done")
    print(results.write())


def _difference(rows: list[Row], plan: StudyPlan) -> str | None:
    """Return the first difference between the rows and the plan; None if there is none."""
    if lacking := [key for key in columns_of(plan) if not rows or key not in rows[0]]:
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
    """Check the files that `Results.write` changes.

    Raises:
        UserError: One of them is damaged.
    """
    rows_of(_text(folder / RESULTS), folder / RESULTS)
    with_section(_text(folder / README), "")


def _text(path: Path) -> str:
    """Return the content of a file; empty if it does not exist."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def rows_of(text: str, path: str | Path = RESULTS) -> list[Row]:
    """Return the rows of a CSV file as dictionaries. Numbers are converted, and empty fields are None.

    Raises:
        UserError: A line has too few or too many fields, or a result is not a number.
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
    if key != "variant" and word[-1:].isdigit() and "_" not in word:  # float() accepts nan and 1_2, which are names
        for kind in (int, float):
            with suppress(ValueError):
                return kind(word)
    return word or None


@dataclass
class Cell:
    """The runs of one setting, which differ in their seed: a cell of the table."""

    setting: tuple[Any, ...]  # variant and swept values
    metric: str
    runs: list[Row] = field(default_factory=list)

    def value_of(self, key: str) -> Any:
        """Return a setting, or the mean of a figure over the runs."""
        if key not in COLUMNS:
            return self.runs[0].get(key)
        values = [run[key] for run in self.runs if run.get(key) is not None]
        return mean(values) if values else None

    @property
    def results(self) -> list[float]:
        """The metric of each run that did not diverge."""
        return [
            run[self.metric] for run in self.runs if run.get("state") != DIVERGED and run.get(self.metric) is not None
        ]

    @property
    def loss(self) -> float:
        """The mean metric, negated if more is better; infinite if a run diverged or has no metric."""
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


class Results:
    """The results of a complete study, computed from its `results.csv`."""

    def __init__(self, folder: Path, plan: StudyPlan | None = None, text: str | None = None):
        """
        Args:
            folder: The folder of the study.
            plan: Its plan; None: read it from the folder.
            text: The content of `results.csv`; None: read it from the folder.
        """
        self.folder, self.plan = folder.resolve(), plan or read_plan(folder)
        self.text = _text(folder / RESULTS) if text is None else text
        self.rows = rows_of(self.text, folder / RESULTS)
        cells: dict[tuple[Any, ...], Cell] = {}
        for row in self.rows:
            setting = tuple(map(row.get, ("variant", *self.plan.sweep)))
            cells.setdefault(setting, Cell(setting, self.plan.metric)).runs.append(row)
        self.cells = list(cells.values())

    @property
    def line_key(self) -> str | None:
        """The key of the lines; None if it is the x axis as well: then all cells are one line."""
        return None if self.plan.lines == self.plan.x else self.plan.lines

    def panels(self) -> dict[Any, dict[Any, list[Cell]]]:
        """Return the cells by panel and by line of the picture, in the order of the plan."""
        panels: dict[Any, dict[Any, list[Cell]]] = defaultdict(lambda: defaultdict(list))
        for cell in self.cells:
            panels[cell.value_of(self.plan.panels or "")][cell.value_of(self.line_key or "")].append(cell)
        return panels

    def table(self) -> str:
        """Return a Markdown table: a row per line of the picture, a column per x. The best cell of a row is bold."""
        key = column_key(self.plan)
        heads = list(dict.fromkeys(cell.value_of(key) for cell in self.cells))
        row_keys = (self.plan.panels, self.line_key)
        names = ", ".join(_short(name) for name in row_keys if name)
        rows = [[f"{names} \\ {_short(key)}" if names else _short(key), *map(shown_value, heads)]]
        lines = {(panel, line): cells for panel, lines in self.panels().items() for line, cells in lines.items()}
        for name, cells in lines.items():
            best = min(cells, key=lambda cell: cell.loss)
            shown = {c.value_of(key): f"**{c.shown()}**" if c is best and c.loss < inf else c.shown() for c in cells}
            words = ", ".join(shown_value(value) for row_key, value in zip(row_keys, name, strict=True) if row_key)
            words = words or COLUMNS[self.plan.metric].header
            rows.append([words, *(shown.get(head, "") for head in heads)])
        return as_markdown(rows)

    def section(self) -> str:
        """Return the generated part of the README: picture, table, command and cost."""
        seeds, name = len(self.plan.seeds), self.folder.name
        metric = UNITS.get(self.plan.metric, COLUMNS[self.plan.metric].header)
        spread = f", mean of {seeds} seeds ± half the distance between the best and the worst" if seeds > 1 else ""
        place = "experiments" if self.folder.parent == ROOT / "experiments" else "outputs/sweeps"
        one = " ".join(["python train.py", *planned_runs(self.plan, name)[0].overrides])
        tokens, flops, seconds = (sum(row[key] or 0 for row in self.rows) for key in ("tokens", "flops", "seconds"))
        time = f"{seconds / 3600:.1f} hours" if seconds >= 360 else f"{seconds / 60:.1f} minutes"
        machines = dict.fromkeys(row["machine"] for row in self.rows)
        return "\n\n".join(
            [
                f"![{metric} over {_short(self.plan.x)}]({PICTURE})",
                f"{metric[0].upper()}{metric[1:]} at the end of training{spread}. The best of each row is bold, "
                "and in the picture it has a ring.",
                self.table(),
                f"## Command\n\nAll runs, or one of them:\n\n```\npython -m gpt2.main study {place}/{name}\n{one}\n```",
                f"## Cost\n\n{len(self.rows)} runs, {tokens / 1e6:,.3g} million tokens, {flops:.2g} FLOPs, "
                f"{time} of training if one run follows the other, on {'; '.join(machines)}.",
            ]
        )

    def over_x(self) -> Figure:
        """Plot the metric over `plan.x`: means, the range over seeds, and a ring around the best mean of each line."""
        panels, ends = self.panels(), []
        figure = new_figure(height=4 if len(panels) == 1 else 3.4 * len(panels))
        column = figure.subplots(len(panels), squeeze=False, sharex=True, sharey=True)[:, 0]
        for axes, (panel, lines) in zip(column, panels.items(), strict=True):
            ends.append(self._draw(axes, lines))
            if self.plan.panels:
                axes.set_title(as_label(shown_value(panel)))
        for axes, named in zip(column, ends, strict=True):
            axes.label_outer()
            if self.line_key:
                label_ends(axes, named, len(panels))
        return figure

    def _draw(self, axes: Axes, lines: dict[Any, list[Cell]]) -> list[tuple[float, float, str, str]]:
        """Draw the lines of a panel. Return their ends as `label_ends` takes them."""
        x = self.plan.x
        names = list(dict.fromkeys(cell.value_of(x) for cell in self.cells))
        is_number = all(isinstance(name, int | float) for name in names)
        places = {name: name if is_number else place for place, name in enumerate(names)}
        ends = []
        for (line, cells), colour in zip(lines.items(), colours(list(lines)), strict=True):
            drawn = [(places[cell.value_of(x)], cell) for cell in cells if cell.results]
            drawn.sort(key=lambda item: item[0])
            if drawn:
                _plot_line(axes, drawn, colour, "-" if self.line_key or is_number else "none")
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
        """Write picture and README, and `results.csv` if it differs. Return a line that names the written files.

        Raises:
            UserError: The folder cannot be written to.
        """
        changed = {} if self.text == _text(self.folder / RESULTS) else {RESULTS: self.text.encode()}
        readme, contents = self.folder / README, {**changed, PICTURE: picture(self.over_x(), source=self.text.encode())}
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
        """Compare these runs with recorded runs of the same settings and seeds. Return at most one line."""
        before = Results(self.folder, self.plan).cells
        recorded = {(cell.setting, run.get(SEED)): run for cell in before for run in cell.runs}
        compared: list[tuple[float, list[float]]] = []  # per setting: the difference of means, the old results
        for cell in self.cells:
            runs = [run for run in cell.runs if (cell.setting, run[SEED]) in recorded]
            others = [recorded[cell.setting, run[SEED]] for run in runs]
            new, old = (Cell(cell.setting, cell.metric, chosen).results for chosen in (runs, others))
            if new and old and runs != others:  # otherwise these are the recorded runs
                compared.append((abs(mean(new) - mean(old)), old))
        if not compared:
            return []
        within = sum(difference <= max(old) - min(old) for difference, old in compared)
        has_range = any(len(old) > 1 for _, old in compared)
        share = f"{within} of {len(compared)} means are within the recorded range over seeds; " if has_range else ""
        return [f"Compared with the recorded results: {share}the largest difference is {max(compared)[0]:.4f}"]


def _plot_line(axes: Axes, cells: list[tuple[Any, Cell]], colour: str, style: str) -> None:
    x, results = [place for place, _ in cells], [cell.results for _, cell in cells]
    axes.plot(x, list(map(mean, results)), linestyle=style, color=colour, linewidth=1.6)
    axes.vlines(x, list(map(min, results)), list(map(max, results)), color=colour, linewidth=1)
    for place, values in zip(x, results, strict=True):
        axes.plot([place] * len(values), values, ".", color=colour, markersize=5)
    place, best = min(cells, key=lambda cell: cell[1].loss)
    if best.loss < inf:
        axes.plot(place, mean(best.results), "o", markersize=11, markerfacecolor="none", color=colour)


def with_section(text: str, section: str, opening: str = OPENING, closing: str = CLOSING) -> str:
    """Replace the generated part of a README, between an opening and a closing line; append it if it is missing."""
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
    machine, versions = run.about.get("machine", {}), run.about.get("versions", {})
    device = machine.get("device")
    cores = f" with {counted(machine['cores'], 'core')}" if "cores" in machine else ""
    place = f"{machine.get('cpu')}{cores}" if device == "cpu" else device
    threads = f", {machine.get('threads')} of them per run" if device == "cpu" else ""
    return f"{place}{threads} (PyTorch {versions.get('torch')}, Python {versions.get('python')})"
