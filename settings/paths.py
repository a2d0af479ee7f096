"""Paths as users write them: ``~`` and environment variables mean the same in every config and every command."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expand(path: str) -> str:
    """``path`` with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced; whatever else it holds stays as it is.

    Raises:
        ValueError: a variable is not set, or there is no such user.
    """
    expanded = os.path.expandvars(path)
    if left := re.search(r"\$(\w+|\{[^}]*\}?)", expanded):
        raise ValueError(f"{path}: the environment variable {left[0]} is not set; set it, or write the path out")
    expanded = os.path.expanduser(expanded)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise ValueError(f"{path}: the home folder of {expanded.split('/')[0]} is not known; write the path out")
    return expanded


PathText = Annotated[str, AfterValidator(expand)]
"""A field of a config that holds a path, or a pattern of paths."""


def path_argument(text: str) -> Path:
    """``type`` of an argument that is a path."""
    try:
        return Path(expand(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def require_writable(path: Path, option: str) -> None:
    """Check, before hours of work, that ``path``, given as ``option``, can be written as a file.

    Raises:
        ValueError: its folder does not exist or is read-only, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"there is no folder {path.parent} to write {path.name} in; create it, or give another {option}"
        )
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"you may not write to the folder {path.parent}; give another {option}")


def shown(path: str | Path) -> str:
    """``path`` as valid Unicode: bytes of its name that are not UTF-8 are written ``\\xff``."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
