"""Which code runs: the commit, and what was changed since.

A job's copy of the code (``launch/slurm/submit.py``) carries both beside its packages, because the repository around it
may have moved on.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMIT, CHANGES = "commit.txt", "changes.diff"


def commit() -> str | None:
    """The commit that is checked out; None outside a repository."""
    if (ROOT / COMMIT).is_file():
        return (ROOT / COMMIT).read_text().strip() or None
    return _git("rev-parse", "HEAD").strip() or None


def diff() -> str:
    """What differs from the commit in tracked files; nothing outside a repository."""
    if (ROOT / CHANGES).is_file():
        return (ROOT / CHANGES).read_text()
    return _git("diff", "HEAD")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return done.stdout
