"""What ``pip install`` and ``uv pip install`` ask for: the project as it lies here (``--editable``), and nothing else.

A wheel would spread top-level packages named ``data``, ``model`` and ``evals`` over an environment's site-packages,
where they hide others' and are hidden by them, and would leave the shipped configs behind.
"""

from __future__ import annotations

from typing import Any, NoReturn

from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
]


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise SystemExit(
        "error: Hopscotch is installed from its checkout only, because its packages are named data, model and the like "
        "and would mix with others in site-packages; run: pip install --editable ."
    )


# The first is asked before any dependency is fetched.
get_requires_for_build_wheel = get_requires_for_build_sdist = build_wheel = build_sdist = _refuse
