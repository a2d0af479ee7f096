"""``metrics.jsonl``: one line of JSON per logged step, each step once.

Written by ``metrics.py``; all other code reads it through this module. The last line of a run that is in progress, or
was killed, may be incomplete; it is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"
"""In a run folder."""
Line = dict[str, Any]


def read(path: Path, tail_bytes: int | None = None) -> list[Line]:
    """All complete lines, in order; none if there is no file.

    Args:
        path: the file.
        tail_bytes: read only this much of its end, and the complete lines there.
    """
    lines: list[Line] = []
    try:
        with path.open("rb") as file:
            if tail_bytes is not None:
                file.seek(max(path.stat().st_size - tail_bytes, 0))
            texts = file.read().splitlines()
    except FileNotFoundError:
        return lines
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def latest(path: Path, step: int | None = None) -> Line:
    """The last value of every metric, up to ``step`` if that is given."""
    found: Line = {}
    for line in read(path):
        if step is None or line["step"] <= step:
            found |= line
    return found


def losses_of(line: Line) -> Line:
    """The greedy losses in ``line``, by validation set."""
    return under("validation/", line, "/loss")


def under(prefix: str, line: Line, suffix: str = "") -> Line:
    """The metrics whose names begin with ``prefix`` and end with ``suffix``, by what is between."""
    found = {name: value for name, value in line.items() if name.startswith(prefix) and name.endswith(suffix)}
    return {name.removeprefix(prefix).removesuffix(suffix): value for name, value in found.items()}


def text_of(line: Line) -> str:
    """The line as it is in the file, without the newline."""
    return json.dumps(line)


def content_of(lines: Iterable[Line]) -> bytes:
    """A whole file of ``lines``."""
    return "".join(f"{text_of(line)}\n" for line in lines).encode()
