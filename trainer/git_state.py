"""Which code a run was trained with: the commit, and uncommitted changes.

Both are read once per process, so they describe the code at its start, or soon after. A copy of the code made by
``launch.slurm`` is not a working tree, so it carries its own: ``commit.txt`` and ``changes.diff``.
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
    """The commit that is checked out, with ``-dirty`` appended if tracked files differ from it.

    None outside a repository, and without git.
    """
    if (ROOT / COMMIT).is_file():
        return (ROOT / COMMIT).read_text(encoding="utf-8").strip() or None
    head = _git("rev-parse", "--verify", "HEAD")
    return None if head is None else head.strip() + ("-dirty" if diff() else "")


@cache
def diff() -> str:
    """Uncommitted changes to tracked files, for ``git apply`` on the commit; empty where :func:`commit` is None."""
    if (ROOT / COMMIT).is_file():
        return (ROOT / CHANGES).read_text(encoding="utf-8")
    # These options override the user's settings for displaying diffs.
    return _git("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--relative") or ""


def _git(*arguments: str) -> str | None:
    """Output of git in this project's folder; None if it fails or is not installed."""
    # Refreshing the index would write to it, which could disturb other commands there.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, env=environment, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
