"""Files of questions of every shape, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "choose": [
        {"query": "Question: x = 1", "choices": ["return a", "import os"], "gold": 1},
        {"query": "y =", "choices": ["2", "import", "b"], "gold": 0},
    ],
    "fill": [{"context_options": [first, "import"], "continuation": "os", "gold": 1} for first in ("return a ", "b")],
    "go_on": [{"context": "import ", "continuation": "os"}, {"context": "return", "continuation": "a"}],
    "say": [{"context": "import", "answer": "os", "aliases": ["OS.", "sys"]}, {"context": "return", "answer": "zz"}],
}


def write_questions(folder: Path) -> dict[str, Path]:
    """Each in a file of its own in ``folder``, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in QUESTIONS}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS[name]))
    return paths
