"""Which code a run was trained with: the commit, and what was changed since.

Both are read once a process, so they are those of the code that the process started with, or soon after. A copy of the
code that ``launch.slurm`` has made brings its own, as it is no working tree: ``commit.txt`` and ``changes.diff``.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

from settings.project import ROOT

COMMIT, CHANGES = "commit.txt", "changes.diff"
"""Files at the root of a copy."""


def packages() -> list[Path]:
    """The folders of our packages, tests left out."""
    return [init.parent for init in ROOT.glob("*/__init__.py") if init.parent.name != "tests"]


@cache
def commit() -> str | None:
    """The commit that is checked out, with ``-dirty`` after it where tracked files differ from it.

    None outside a repository, and without git.
    """
    if (ROOT / COMMIT).is_file():
        return (ROOT / COMMIT).read_text(encoding="utf-8").strip() or None
    head = _git("rev-parse", "--verify", "HEAD")
    return None if head is None else head.strip() + ("-dirty" if diff() else "")


@cache
def diff() -> str:
    """What ``git apply`` needs on top of the commit, of tracked files; nothing where :func:`commit` is None."""
    if (ROOT / COMMIT).is_file():
        return (ROOT / CHANGES).read_text(encoding="utf-8")
    # Whatever the user's own settings make of a diff for reading.
    return _git("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--relative") or ""


def _git(*arguments: str) -> str | None:
    """What git says in this project's folder; None where it refuses, or is not there."""
    # A refreshed index would be a write, which other commands there might trip over.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, env=environment, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
