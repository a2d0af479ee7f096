"""``summary.md`` for people and ``summary.json`` for programs, rewritten before and after every part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu.schedule import NOT_REACHED, PASSED, RUNNING, WAITING, Outcome, log_file

MARKDOWN, JSON = "summary.md", "summary.json"
_CUT = "This file is written before and after every part. If nothing runs any more, the command was killed here."


def write(out: Path, outcomes: Sequence[Outcome], about: Mapping[str, str]) -> None:
    """Both files.

    Args:
        out: folder.
        outcomes: of all parts, in order.
        about: what the figures depend on, by name.
    """
    for name, text in ((MARKDOWN, markdown(outcomes, about)), (JSON, as_json(outcomes, about))):
        part = out / f"{name}.tmp"
        part.write_text(text, encoding="utf-8")
        part.replace(out / name)


def as_json(outcomes: Sequence[Outcome], about: Mapping[str, str]) -> str:
    """Content of ``summary.json``."""

    def one(outcome: Outcome) -> dict[str, Any]:
        part = outcome.part
        row: dict[str, Any] = {"name": part.name, "what": part.what, "command": part.command, "status": outcome.status}
        row |= {"seconds": round(outcome.seconds, 1), "limit_s": round(outcome.limit_s, 1), "reason": outcome.reason}
        found = None if outcome.figures is None else asdict(outcome.figures)
        return row | {"figures": found, "last_lines": outcome.last_lines}

    return json.dumps({"about": dict(about), "parts": [one(outcome) for outcome in outcomes]}, indent=1) + "\n"


def markdown(outcomes: Sequence[Outcome], about: Mapping[str, str]) -> str:
    """Content of ``summary.md``: the verdict, all parts, logs of those that did not pass, then every part's table."""
    blocks = [f"# {headline(outcomes)}", "\n".join(f"- **{name}**: {value}" for name, value in about.items())]
    if any(outcome.status in (RUNNING, WAITING) for outcome in outcomes):
        blocks.append(_CUT)
    blocks.append(_table([_line(outcome) for outcome in outcomes], right=("s", "of")))
    for outcome in outcomes:
        if outcome.last_lines:
            blocks += [f"## {outcome.part.name}: {outcome.status}, {outcome.reason}", _log(outcome)]
    for outcome in outcomes:
        if outcome.figures is not None and outcome.figures.rows:
            rows = outcome.figures.rows
            numbers = [column for column in rows[0] if all(_is_number(row[column]) for row in rows)]
            what = outcome.part.what
            blocks += [f"## {outcome.part.name}", f"{what[0].upper()}{what[1:]}.", _table(rows, right=numbers)]
    return "\n\n".join(blocks) + "\n"


def headline(outcomes: Sequence[Outcome]) -> str:
    """The verdict in a line."""
    passed = sum(outcome.status == PASSED for outcome in outcomes)
    missing = sum(outcome.status in (NOT_REACHED, WAITING, RUNNING) for outcome in outcomes)
    wrong = len(outcomes) - passed - missing
    counts = [f"{passed} of {len(outcomes)} parts passed"]
    counts += [f"{wrong} did not"] * bool(wrong) + [f"{missing} not finished"] * bool(missing)
    return "GPU check: " + ", ".join(counts)


def _line(outcome: Outcome) -> dict[str, str]:
    """A part's row in the overview."""
    key = "" if outcome.figures is None else outcome.figures.key
    ran = outcome.limit_s > 0
    return {
        "part": outcome.part.name,
        "status": outcome.status if outcome.status in (PASSED, RUNNING, WAITING) else f"**{outcome.status}**",
        "s": f"{outcome.seconds:.0f}" if ran and outcome.status != RUNNING else "",
        "of": f"{outcome.limit_s:.0f}" if ran else "",
        "key figures": "; ".join(text for text in (outcome.reason, key) if text),
    }


def _log(outcome: Outcome) -> str:
    last = "\n".join(outcome.last_lines).replace("```", "'''")
    return f"The last lines of `{log_file(Path(), outcome.part.name)}`:\n\n```\n{last}\n```"


def _table(rows: Sequence[Mapping[str, Any]], right: Iterable[str] = ()) -> str:
    """A Markdown table that also lines up as plain text; the columns ``right`` are right-aligned."""
    columns = list(rows[0])
    cells = [[_cell(text) for text in columns], *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(3, *(len(line[number]) for line in cells)) for number in range(len(columns))]
    to_right = [column in set(right) for column in columns]
    rule = [f"{'-' * (width - 1)}:" if r else "-" * width for width, r in zip(widths, to_right, strict=True)]
    lines = []
    for line in (cells[0], rule, *cells[1:]):
        padded = [f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(line, widths, to_right, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _is_number(value: Any) -> bool:
    text = str(value).strip().rstrip("%").replace(",", "")
    if not text:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
