"""Build backend for ``pip install`` and ``uv pip install``: editable installs (``--editable``), and nothing else.

A wheel would put top-level packages named ``data``, ``model`` and ``evals`` into an environment's site-packages, where
they would shadow others of these names or be shadowed by them, and would leave the shipped configs behind.
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


# The first hook is called before any dependency is fetched.
get_requires_for_build_wheel = get_requires_for_build_sdist = build_wheel = build_sdist = _refuse
