"""Where the project is: its code, its shipped configs, its requirements; commands work from any folder."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Folder of the checkout, or of a copy of its Python files that ``launch.slurm`` has made."""


def resolve_shipped(path: str) -> str:
    """``path`` relative to the working directory, or, if only the project has it, the project's."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).is_file() else path


def program_path(name: str) -> str:
    """What to type in the working directory for a program of this environment: ``.venv/bin/tensorboard``."""
    return shlex.quote(os.path.relpath(Path(sys.executable).with_name(name)))


def install_command(requirements: str) -> str:
    """The command that installs one of the project's requirements files into this environment."""
    return f"{program_path('python')} -m pip install -r {shlex.quote(os.path.relpath(ROOT / requirements))}"
