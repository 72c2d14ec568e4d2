"""Tables as text and as Markdown. A table is a list of rows of cells; the first row is the head."""

import re
from collections.abc import Callable, Sequence
from typing import Any

# For example 12,500 or 31.2% or 1.5 - 1.7 or **2.38 ± 0.01**.
NUMBER = re.compile(r"\**[-+]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?%?( [±-] ([\d,.]+|n/a))?\**")


def is_number(cell: str) -> bool:
    """Return whether a cell has a number or marks a missing one."""
    return cell in ("n/a", "null", "") or NUMBER.fullmatch(cell) is not None


def from_to(values: Sequence[float], digits: int = 0) -> str:
    return f"{min(values):,.{digits}f} - {max(values):,.{digits}f}"


def numeric_columns(rows: list[list[str]]) -> list[bool]:
    """Return for each column whether all its cells are numbers."""
    return [all(map(is_number, column[1:])) for column in zip(*rows, strict=True)]


def as_text(rows: list[list[str]], width: int | None = None) -> str:
    """Return aligned text, numbers to the right. Columns beyond `width` follow below, after the first column again."""
    rows = [[cell.replace("\n", " ") for cell in row] for row in rows]
    first, *others = (
        [f"{cell:{'>' if numeric else '<'}{max(map(len, column))}}" for cell in column]
        for column, numeric in zip(zip(*rows, strict=True), numeric_columns(rows), strict=True)
    )
    blocks = [first]
    for column in others:
        joined = [f"{line}  {cell}" for line, cell in zip(blocks[-1], column, strict=True)]
        if width and len(joined[0]) > width and blocks[-1] is not first:
            blocks.append([f"{line}  {cell}" for line, cell in zip(first, column, strict=True)])
        else:
            blocks[-1] = joined
    return "\n\n".join("\n".join(map(str.rstrip, block)) for block in blocks)


def table(rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """Return a table as text. The keys of `columns` are the headers, and its functions make the cells of a row."""
    return as_text([[*columns], *([cell(row) for cell in columns.values()] for row in rows)])


def as_markdown(rows: list[list[str]]) -> str:
    rule = ["---:" if numeric else "---" for numeric in numeric_columns(rows)]
    cells = ([" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in (rows[0], rule, *rows[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
