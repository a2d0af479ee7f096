"""Prompts and responses for the demo's stage two, out of the running Python's own standard library.

    python -m launch.demo_examples runs/demo-data

The prompt is a function's head with its docstring, the response its body: JSON lines ``{"prompt", "response"}``. What
validates comes from packages of which stage one saw nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data.files import write_atomically
from settings import user_errors

SETS = {"train": ("*.py", "json/*.py", "http/*.py", "unittest/*.py"), "validation": ("asyncio/*.py", "email/*.py")}


def main() -> int:
    """Write both sets; they are small, so they are written anew each time."""
    parser = argparse.ArgumentParser(prog="launch.demo_examples", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where functions-train.jsonl and functions-validation.jsonl go")
    folder = parser.parse_args().folder
    library = Path(sysconfig.get_paths()["stdlib"])
    with user_errors():
        folder.mkdir(parents=True, exist_ok=True)
        for name, patterns in SETS.items():
            files = sorted(path for pattern in patterns for path in library.glob(pattern))
            lines = [json.dumps(example) for path in files for example in functions(path.read_text("utf-8", "replace"))]
            write_atomically(folder / f"functions-{name}.jsonl", "".join(f"{line}\n" for line in lines).encode())
            print(f"{folder / f'functions-{name}.jsonl'}: {len(lines):,} functions from {len(files)} files")
    return 0


def functions(source: str) -> Iterator[dict[str, str]]:
    """Head with docstring, and body, of every function in ``source`` that has both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's tests hold odd escapes
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        first, last = node.body[1], node.end_lineno
        # From the line's start, so that the indentation is part of what is learned.
        prompt, response = lines[node.lineno - 1 : first.lineno - 1], lines[first.lineno - 1 : last]
        yield {"prompt": "".join(prompt), "response": "".join(response)}


if __name__ == "__main__":
    raise SystemExit(main())
