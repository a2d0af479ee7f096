"""Tasks that are done, beside the file of ``--json``: a line each, with all that their scores depend on.

``scores.json`` has ``scores.tasks.jsonl``. A run that was stopped goes on with the tasks that are not there, or are
there of another model, tokenizer, file, field, number of shots, limit or precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.append_only import Lines
from data.discovery import fingerprint
from trainer.tasks.harness import TaskScores

Key = dict[str, Any]
_FIELDS = {"task", "key", "ours", "export", "flops", "seconds"}


class Done(NamedTuple):
    """A task of ``--tasks`` that was run; a group of the harness has several."""

    ours: TaskScores
    export: TaskScores | None
    flops: tuple[float, float]
    """Executed, and those of the same windows without routers."""
    seconds: tuple[float, float]
    """Ours, and the export's."""


class Finished:
    """The file.

    Args:
        out: of ``--json``; nothing is kept without.
        tell: says on one rank what was found.

    Raises:
        ValueError: it is there, and something else.
    """

    def __init__(self, out: Path | None, tell: Any) -> None:
        self.path = None if out is None else out.with_suffix(".tasks.jsonl")
        self._tell = tell
        self._found: dict[str, dict[str, Any]] = {}
        self._torn = False
        if self.path is not None and self.path.exists():
            whole = self.path.read_text(encoding="utf-8")
            self._torn = bool(whole) and not whole.endswith("\n")
            for number, text in enumerate(whole.splitlines(), start=1):
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # cut short by a kill
                if not isinstance(line, dict) or not line.keys() >= _FIELDS:
                    raise ValueError(
                        f"{self.path}, line {number} is not a finished task of this command; move the file away, or "
                        "give --json another name"
                    )
                self._found[line["task"]] = line

    def get(self, task: str, key: Key) -> Done | None:
        """The scores of ``task`` with that very ``key``, if they are there."""
        line = self._found.get(task)
        if line is None:
            return None
        other = [name for name in key if line["key"].get(name) != key[name]]
        if other:
            self._tell(f"{task}: {self.path} has it with another {_listed(other)}; it is computed again")
            return None
        self._tell(f"{task}: taken from {self.path}, where it is finished")
        both = [None if line[side] is None else TaskScores(**line[side]) for side in ("ours", "export")]
        assert both[0] is not None
        return Done(both[0], both[1], tuple(line["flops"]), tuple(line["seconds"]))

    def add(self, task: str, key: Key, done: Done) -> None:
        """Keep what was found."""
        if self.path is None:
            return
        export = None if done.export is None else done.export._asdict()
        line = {"task": task, "key": key, "ours": done.ours._asdict(), "export": export}
        lines = Lines(self.path, self._tell)
        start = "\n" if self._torn else ""  # or it would go on where a kill has cut one
        lines.add(start + json.dumps({**line, "flops": done.flops, "seconds": done.seconds}))
        self._torn = False
        lines.close()


def weights_of(source: Path) -> str:
    """Changes when a file in ``source`` does."""
    digest = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        found = path.stat()
        line = f"{path.relative_to(source)} {found.st_size} {found.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def files_of(task: dict[str, Any] | str, include: Path | None) -> list[dict[str, Any]]:
    """Fingerprints of the files that decide what ``task`` asks."""
    if isinstance(task, dict):
        paths: Sequence[Path] = [Path(name) for name in task["metadata"]["files"]]
    else:
        paths = [] if include is None else sorted(path for path in include.rglob("*") if path.is_file())
    return [fingerprint(path) for path in paths]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
