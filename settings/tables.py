"""Tables as text: Markdown, or columns for a terminal; rows are lists of cells, the header first."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def markdown(rows: Rows) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def aligned_markdown(rows: Rows) -> str:
    """A Markdown table that is also readable as text: the first column left-aligned, numbers right-aligned."""
    widths = _widths(rows)
    lines = [f"| {' | '.join(_cells(row, widths))} |" for row in rows]
    rule = "|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (width + 1) + ":|" for width in widths[1:])
    return "\n".join([lines[0], rule, *lines[1:]])


def columns(rows: Rows) -> str:
    """Padded columns, the first left-aligned, the others right-aligned."""
    widths = _widths(rows)
    return "\n".join("  ".join(_cells(row, widths)).rstrip() for row in rows)


def _widths(rows: Rows) -> list[int]:
    return [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
