"""Stage two's examples, out of the running Python's own standard library: ``python -m launch.demo.examples FOLDER``.

A line of code without the keyword that it begins with; the response is the keyword::

    {"prompt": "___ name in sorted(self._names):\\n# missing:", "response": " for"}

What validates comes from packages of which neither stage trains on a line, with as many examples of every keyword.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.files import write_atomically
from settings import user_errors

KEYWORDS = ("assert", "class", "def", "for", "if", "raise", "return")
OPENS_A_BLOCK = ("class", "def", "for", "if")
GAP, QUESTION = "___", "# missing:"
SETS = {
    "train": ("*.py", "[c-d]*/**/*.py", "[h-l]*/**/*.py", "m*/**/*.py", "[u-z]*/**/*.py"),
    "validation": ("asyncio/**/*.py", "email/**/*.py"),
}
MOST = {"train": 1700, "validation": 50}
"""Examples of a keyword in each set."""
LONGEST = 60
"""Characters of a line after its keyword."""


def main() -> int:
    """Write both sets; they are small, so they are written anew each time."""
    parser = argparse.ArgumentParser(prog="launch.demo.examples", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where keywords-train.jsonl and keywords-validation.jsonl go")
    folder = parser.parse_args().folder
    library = Path(sysconfig.get_paths()["stdlib"])
    with user_errors():
        folder.mkdir(parents=True, exist_ok=True)
        for name, patterns in SETS.items():
            files = sorted({path for pattern in patterns for path in library.glob(pattern)})
            examples = balanced(keyword_lines(path.read_text("utf-8", "replace") for path in files), MOST[name])
            path = folder / f"keywords-{name}.jsonl"
            write_atomically(path, "".join(f"{json.dumps(example)}\n" for example in examples).encode())
            print(f"{path}: {len(examples):,} lines of code from {len(files)} files")
    return 0


def keyword_lines(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every line that begins with one of ``KEYWORDS`` as it and the rest, each rest once."""
    seen = set()
    for source in sources:
        for line in source.splitlines():
            keyword, _, rest = line.strip().partition(" ")
            if keyword not in KEYWORDS or not 3 < len(rest) <= LONGEST or not rest.isascii() or rest in seen:
                continue
            # Prose begins with these words, too.
            if keyword in OPENS_A_BLOCK and not rest.endswith(":"):
                continue
            seen.add(rest)
            yield keyword, rest


def balanced(lines: Iterable[tuple[str, str]], most: int) -> list[dict[str, str]]:
    """Up to ``most`` examples of each keyword, picked and shuffled, the same each time."""
    by_keyword: dict[str, list[str]] = {keyword: [] for keyword in KEYWORDS}
    for keyword, rest in lines:
        by_keyword[keyword].append(rest)
    order = random.Random(0)
    examples = [
        {"prompt": f"{GAP} {rest}\n{QUESTION}", "response": f" {keyword}"}
        for keyword, rests in by_keyword.items()
        for rest in order.sample(rests, min(most, len(rests)))
    ]
    order.shuffle(examples)
    return examples


if __name__ == "__main__":
    raise SystemExit(main())
