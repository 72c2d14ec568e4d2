"""A comparison as one HTML file that needs nothing beside it: table, curves, and each run in detail."""

import io
import json
import os
from html import escape

import matplotlib as mpl

from gpt2.analysis.compare import Comparison, is_number, shown_value
from gpt2.analysis.compare_plot import curves
from gpt2.analysis.runs import RunResult

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 78rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { color: #666; margin: .3rem 0 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid #e6e6e6; }
th { cursor: pointer; color: #666; font-weight: 600; user-select: none; } th:hover { color: #222; }
th[aria-sort=ascending]::after { content: ' ▴'; } th[aria-sort=descending]::after { content: ' ▾'; }
.number { text-align: right; } tbody tr:hover { background: #f5f8fb; } .note { color: #9a4a10; }
svg { max-width: 100%; height: auto; } svg.some g[id^=run-] { opacity: .15; } svg.some g.shown { opacity: 1; }
summary { cursor: pointer; padding: .3rem 0; }
pre { background: #f6f6f6; padding: .8rem 1rem; overflow-x: auto; font-size: 13px; }
"""

SCRIPT = """
const body = document.querySelector('tbody'), svg = document.querySelector('svg');
const texts = new Intl.Collator(undefined, { numeric: true });
document.querySelectorAll('th').forEach((head, column) => head.onclick = () => {
  const up = head.getAttribute('aria-sort') !== 'ascending';
  document.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const value = row => { const text = row.cells[column].dataset.value; return text === '' ? null : JSON.parse(text); };
  const order = (a, b) => a === null || b === null ? (a === null) - (b === null)
    : (up ? 1 : -1) * (typeof a === 'number' && typeof b === 'number' ? a - b : texts.compare(String(a), String(b)));
  [...body.rows].sort((a, b) => order(value(a), value(b))).forEach(row => body.append(row));
});
body.querySelectorAll('tr').forEach(row => {
  const lines = svg.querySelectorAll(`g[id^="${row.id.replace('row', 'run')}-"]`);
  row.onmouseenter = () => { svg.classList.add('some'); lines.forEach(line => line.classList.add('shown')); };
  row.onmouseleave = () => { svg.classList.remove('some'); lines.forEach(line => line.classList.remove('shown')); };
});
"""


def page(found: Comparison) -> str:
    title = f"{len(found.runs)} runs in {os.path.relpath(found.parent)}"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)
    details = "\n".join(_details(run, found) for run in found.runs)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p>Sorted by {escape(found.sort)}. A click on a heading sorts by it; a run under the pointer is shown alone.</p>
{notes}
<div class="wide">{_table(found)}</div>
<h2>Validation loss</h2>
{_svg(found)}
<h2>Each run</h2>
{details}
<script>{SCRIPT}</script>
</body></html>
"""


def _table(found: Comparison) -> str:
    head, *rows = found.rows()
    numeric = [all(is_number(row[place]) for row in rows) for place in range(len(head))]
    kind = [' class="number"' if number else "" for number in numeric]
    heads = "".join(f"<th{k}>{escape(name)}</th>" for name, k in zip(head, kind, strict=True))
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(
            f"<td{k} data-value='{escape(_value(cell), quote=True)}'>{escape(cell)}</td>"
            for cell, k in zip(row, kind, strict=True)
        )
        lines.append(f'<tr id="row-{place}">{cells}</tr>')
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _value(cell: str) -> str:
    """What a cell is sorted by, as JSON; empty for nothing."""
    if cell in ("n/a", "null", ""):
        return ""
    try:
        return json.dumps(float(cell.replace(",", "").removesuffix("%")))
    except ValueError:
        return json.dumps(cell)


def _svg(found: Comparison) -> str:
    content = io.StringIO()
    places = {run.folder: place for place, run in enumerate(found.runs)}
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "gpt2"}):
        figure = curves(found, identify=lambda run: f"run-{places[run.folder]}")
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = content.getvalue()
    return text[text.index("<svg") :]


def _details(run: RunResult, found: Comparison) -> str:
    repository = run.about.get("repository") or {}
    changed = " with changes" if repository.get("dirty") else ""
    facts = {
        "folder": os.path.relpath(run.folder),
        "state": ", ".join(filter(None, [run.state, run.about.get("reason")])),
        "started": run.about.get("started"),
        "commit": repository.get("commit") and f"{repository['commit'][:12]}{changed}",
        "machine": _joined(run.about.get("machine")),
        "versions": _joined(run.about.get("versions")),
    }
    lines = [f"{name:<10}{value}" for name, value in facts.items() if value]
    config = [f"{key} = {shown_value(value)}" for key, value in run.config.items() if not key.startswith("choices")]
    sample = next((record["sample"] for record in reversed(run.records) if "sample" in record), None)
    shown = f"<pre>{escape(sample)}</pre>" if sample else ""
    return (
        f"<details><summary>{escape(found.label(run))}</summary><pre>{escape(chr(10).join(lines))}</pre>{shown}"
        f"<details><summary>Configuration</summary><pre>{escape(chr(10).join(config))}</pre></details></details>"
    )


def _joined(facts: dict[str, object] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (facts or {}).items() if value is not None)
