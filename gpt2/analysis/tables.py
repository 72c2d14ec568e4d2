"""Tables as text and as Markdown. A table is a list of rows of cells; the first row is the head."""

import re

# Such as 12,500 or 31.2% or 1.5 - 1.7 or **2.38 ± 0.01**.
NUMBER = re.compile(r"\**[-+]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?%?( [±-] [\d,.]+)?\**")


def is_number(cell: str) -> bool:
    """Whether a cell is a number, or stands for a missing one."""
    return cell in ("n/a", "null", "") or NUMBER.fullmatch(cell) is not None


def numeric_columns(rows: list[list[str]]) -> list[bool]:
    """Whether all cells of a column are numbers, for each column."""
    return [all(map(is_number, column[1:])) for column in zip(*rows, strict=True)]


def as_text(rows: list[list[str]]) -> str:
    """Aligned text: numbers right, text left."""
    rows = [[cell.replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if numeric else "<" for numeric in numeric_columns(rows)]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    )
    return "\n".join(map(str.rstrip, lines))


def as_markdown(rows: list[list[str]]) -> str:
    rule = ["---:" if numeric else "---" for numeric in numeric_columns(rows)]
    cells = ([" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in (rows[0], rule, *rows[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
