"""A home folder without settings, and a stage-two config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a site file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tuning(tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path) -> str:
    """Path of a stage-two config."""
    (tmp_path / "examples.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    source = {"name": "few", "files": [str(tmp_path / "examples.jsonl")]}
    train = {**tiny["train"], "run_dir": str(tmp_path / "tuned")}
    config = {"base": {"path": "nowhere"}, "data": {"sequence_tokens": 32, "sources": [source]}, "train": train}
    return write_config(config, "tune.yaml")
