"""Imports run one way, and the model knows nothing of training."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "model": set(),
    "settings": set(),
    "data": {"settings"},
    "trainer": {"settings", "data", "model"},
    "pretrain": {"settings", "data", "model", "trainer"},
    "convert": {"settings", "data", "model", "trainer", "tune"},
    "tune": {"settings", "data", "model", "trainer"},
    "launch": {"settings", "data", "model", "trainer", "tune"},
    "bench": {"settings", "data", "model", "trainer", "tune"},
    "evals": {"settings", "data", "model", "trainer", "tune", "convert"},
}


def _imports(path: Path) -> set[str]:
    """First parts of all names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = _imports(path) & (MAY_IMPORT.keys() - {package})
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {sorted(ours - MAY_IMPORT[package])}"


def test_every_package_is_listed() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(MAY_IMPORT)


def test_the_model_does_not_know_deepspeed() -> None:
    assert not any("deepspeed" in _imports(path) for path in (ROOT / "model").rglob("*.py"))
