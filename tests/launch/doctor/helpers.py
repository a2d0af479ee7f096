"""What several files of the doctor's tests need: the one finding of a check, and programs on the PATH."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launch.doctor.findings import Finding


def only(findings: Iterable[Finding]) -> Finding:
    """The one finding."""
    (finding,) = findings
    return finding


def program(folder: Path, name: str, script: str) -> None:
    """An executable on the PATH."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
