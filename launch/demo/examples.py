"""Stage two's examples, from the running Python's own standard library: ``python -m launch.demo.examples FOLDER``.

A line of code, cut where a bracket closes; the response closes all open brackets, the innermost first::

    {"prompt": "self._handlers.append((name, table[key\\n", "response": "]))"}

Validation examples come from packages that neither stage trains on.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.files import write_atomically
from settings import command_parser, path_argument, user_errors

RESPONSES = (")", "]", "))", "])", ")]")
"""The most common ones; others are too rare to validate on."""
SETS = {
    "train": ("*.py", "[c-d]*/**/*.py", "[h-l]*/**/*.py", "[u-z]*/**/*.py"),
    "validation": ("asyncio/**/*.py", "email/**/*.py", "multiprocessing/**/*.py"),
}
MOST = {"train": 2000, "validation": 60}
"""Examples per response in each set: otherwise ")" alone would be nine in ten."""
SHORTEST, LONGEST = 8, 90
"""Characters of a line."""
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_NO_CODE = "#'\"\\"
"""Marks of strings and comments, whose brackets do not count: a line with one of these is left out."""


def main() -> int:
    """Write both sets; they are small, so they are rewritten each time."""
    parser = command_parser("launch.demo.examples", __doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=path_argument, help="where brackets-train.jsonl and brackets-validation.jsonl go"
    )
    folder = parser.parse_args().folder
    library = Path(sysconfig.get_paths()["stdlib"])
    with user_errors():
        folder.mkdir(parents=True, exist_ok=True)
        for name, patterns in SETS.items():
            files = sorted({path for pattern in patterns for path in library.glob(pattern)})
            lines = (line for path in files for line in path.read_text("utf-8", "replace").splitlines())
            examples = balanced(cut_lines(lines), MOST[name])
            path = folder / f"brackets-{name}.jsonl"
            write_atomically(path, "".join(f"{json.dumps(example)}\n" for example in examples).encode())
            print(f"{path}: {len(examples):,} lines of code from {len(files)} files")
    return 0


def cut_lines(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every line up to each of its closing brackets, and what closes all that is open there; each line once."""
    seen = set()
    for line in map(str.strip, lines):
        if SHORTEST <= len(line) <= LONGEST and line.isascii() and not set(_NO_CODE) & set(line) and line not in seen:
            seen.add(line)
            yield from _cuts(line)


def _cuts(line: str) -> list[tuple[str, str]]:
    """The cuts of one line; empty if its brackets do not match."""
    cuts, closers = [], ""
    for place, character in enumerate(line):
        if character in _CLOSERS:
            closers = _CLOSERS[character] + closers
        elif character in _CLOSERS.values():
            if not closers.startswith(character):
                return []
            cuts.append((line[:place], closers))
            closers = closers[1:]
    return [] if closers else cuts


def balanced(cuts: Iterable[tuple[str, str]], most: int) -> list[dict[str, str]]:
    """Up to ``most`` examples of each response, picked and shuffled, the same each time."""
    by_response: dict[str, list[str]] = {response: [] for response in RESPONSES}
    for code, response in cuts:
        if response in by_response:
            by_response[response].append(code)
    order = random.Random(0)
    examples = [
        {"prompt": f"{code}\n", "response": response}
        for response, codes in by_response.items()
        for code in order.sample(codes, min(most, len(codes)))
    ]
    order.shuffle(examples)
    return examples


if __name__ == "__main__":
    raise SystemExit(main())
