"""A comparison as one self-contained HTML file: table, curves, and the details of each run."""

import io
import json
import os
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment
from markupsafe import Markup

from gpt2.analysis.compare import Comparison, shown_value
from gpt2.analysis.compare_plot import curves
from gpt2.analysis.runs import RunResult
from gpt2.analysis.tables import numeric_columns

TEMPLATE = Path(__file__).with_name("compare.html")


def page(comparison: Comparison) -> str:
    head, *rows = table = comparison.rows(all_keys=True)
    shown = len(comparison.rows()[0])  # further columns are hidden until a box is checked
    names = [
        " ".join(["number"] * numeric + ["more"] * (place >= shown))
        for place, numeric in enumerate(numeric_columns(table))
    ]
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        comparison=comparison,
        head=head,
        rows=rows,
        classes=[Markup(f' class="{name}"' if name else "") for name in names],
        sort_value=_sort_value,
        svg=Markup(_svg(comparison)),
        details=[_details(run, comparison) for run in comparison.runs],
    )


def _sort_value(cell: str) -> str:
    """Return the value of a cell as JSON, for sorting; empty if the cell has no value."""
    if cell in ("n/a", "null", ""):
        return ""
    with suppress(ValueError):
        number = float(cell.replace(",", "").removesuffix("%"))
        if isfinite(number):  # JSON has no nan and inf
            return json.dumps(number)
    return json.dumps(cell)


def _svg(comparison: Comparison) -> str:
    content = io.StringIO()
    numbers = {run.folder: number for number, run in enumerate(comparison.runs)}
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "gpt2"}):
        figure = curves(comparison, svg_id=lambda run: f"run-{numbers[run.folder]}")
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = content.getvalue()
    return text[text.index("<svg") :]


def _details(run: RunResult, comparison: Comparison) -> dict[str, Any]:
    repository = run.about.get("repository", {})
    changes = " with uncommitted changes" if repository.get("dirty") else ""
    facts = {
        "folder": os.path.relpath(run.folder),
        "state": ", ".join(filter(None, [run.state, run.about.get("reason")])),
        "started": run.about.get("started"),
        "commit": repository.get("commit") and f"{repository['commit'][:12]}{changes}",
        "machine": _joined(run.about.get("machine", {})),
        "versions": _joined(run.about.get("versions", {})),
    }
    config = [f"{key} = {shown_value(value)}" for key, value in run.config.items() if not key.startswith("choices")]
    return {
        "label": comparison.label(run),
        "facts": "\n".join(f"{name:<10}{value}" for name, value in facts.items() if value),
        "sample": next((record["sample"] for record in reversed(run.records) if "sample" in record), None),
        "config": "\n".join(config),
    }


def _joined(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
