"""The folders that ``{stdlib}`` and ``{texts}`` stand for in names of files."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from settings import paths

TEXTS_VARIABLE = "HOPSCOTCH_TEXTS"
_TEXTS = "../shared/data"


def texts() -> str:
    """Folder of the texts that the shipped experiments read; docs/data.md says what is in it."""
    return os.environ.get(TEXTS_VARIABLE) or _TEXTS


def fill_in_texts(name: str) -> str:
    """``name`` with ``{texts}`` filled in: when a config is loaded, so that a run records where they were."""
    return name.replace("{texts}", texts())


def expand(name: str) -> str:
    """``name`` with ``{stdlib}``, which a run does not record, ``~`` and variables filled in.

    Raises:
        ValueError: a variable is not set.
    """
    return paths.expand(name.replace("{stdlib}", sysconfig.get_paths()["stdlib"]))


def hint(name: str) -> str:
    """A clause for an error that says where ``name``, which was not found, was looked for."""
    if Path(name).is_relative_to(texts()):
        return (
            f", where {{texts}} is {texts()}; set {TEXTS_VARIABLE} to the folder of these texts (docs/data.md "
            "says where they come from)"
        )
    return "" if Path(expand(name)).is_absolute() else f" in {Path.cwd()}, which relative paths start from"
