"""A comparison as one self-contained HTML file: table, curves, and the details of each run."""

import io
import json
import os
from contextlib import suppress
from html import escape
from math import isfinite
from pathlib import Path
from string import Template

import matplotlib as mpl

from gpt2.analysis.compare import Comparison, shown_value
from gpt2.analysis.compare_plot import curves
from gpt2.analysis.runs import RunResult
from gpt2.analysis.tables import numeric_columns

TEMPLATE = Path(__file__).with_name("compare.html")


def page(comparison: Comparison) -> str:
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(comparison.headline),
        sort=escape(comparison.sort),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in comparison.notes),
        table=_table(comparison),
        unfold=_unfold(comparison.rest),
        curves=_svg(comparison),
        details="\n".join(_details(run, comparison) for run in comparison.runs),
    )


def _unfold(text: str) -> str:
    """A switch for the columns of class `more`."""
    return f'<input type="checkbox" id="all"> <label for="all">{escape(text)}</label>' if text else ""


def _table(comparison: Comparison) -> str:
    table, shown = comparison.rows(all_keys=True), len(comparison.rows()[0])
    classes = (
        ["number"] * numeric + ["more"] * (place >= shown) for place, numeric in enumerate(numeric_columns(table))
    )
    kinds = [f' class="{" ".join(names)}"' if names else "" for names in classes]
    head, *rows = table
    heads = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(
            f"<td{kind} data-value='{escape(_sort_value(cell), quote=True)}'>{escape(cell)}</td>"
            for cell, kind in zip(row, kinds, strict=True)
        )
        lines.append(f'<tr id="row-{place}">{cells}</tr>')
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _sort_value(cell: str) -> str:
    """The value of a cell as JSON; empty if there is none."""
    if cell in ("n/a", "null", ""):
        return ""
    with suppress(ValueError):
        number = float(cell.replace(",", "").removesuffix("%"))
        if isfinite(number):  # nan and inf are no JSON
            return json.dumps(number)
    return json.dumps(cell)


def _svg(comparison: Comparison) -> str:
    content = io.StringIO()
    places = {run.folder: place for place, run in enumerate(comparison.runs)}
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "gpt2"}):
        figure = curves(comparison, identify=lambda run: f"run-{places[run.folder]}")
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = content.getvalue()
    return text[text.index("<svg") :]


def _details(run: RunResult, comparison: Comparison) -> str:
    repository = run.about.get("repository") or {}
    changes = " with uncommitted changes" if repository.get("dirty") else ""
    facts = {
        "folder": os.path.relpath(run.folder),
        "state": ", ".join(filter(None, [run.state, run.about.get("reason")])),
        "started": run.about.get("started"),
        "commit": repository.get("commit") and f"{repository['commit'][:12]}{changes}",
        "machine": _joined(run.about.get("machine")),
        "versions": _joined(run.about.get("versions")),
    }
    lines = [f"{name:<10}{value}" for name, value in facts.items() if value]
    config = [f"{key} = {shown_value(value)}" for key, value in run.config.items() if not key.startswith("choices")]
    sample = next((record["sample"] for record in reversed(run.records) if "sample" in record), None)
    return (
        f"<details><summary>{escape(comparison.label(run))}</summary>{_pre(lines)}{_pre([sample]) if sample else ''}"
        f"<details><summary>Configuration</summary>{_pre(config)}</details></details>"
    )


def _pre(lines: list[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _joined(facts: dict[str, object] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (facts or {}).items() if value is not None)
