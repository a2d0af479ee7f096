"""A run small enough to be killed often."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def tiny(tiny: dict[str, Any]) -> dict[str, Any]:
    """Two layers, a checkpoint every other step, an evaluation every tenth, no pictures; goes on where it can."""
    tiny["model"]["layers"] = 2
    tiny["train"] |= {
        "steps": 100_000,
        "evaluation": {"every_steps": 10, "samples": 2},
        "checkpoint": {"every_steps": 2, "resume": "auto"},
        "log": {"every_steps": 1, "peak_tflops": 1.0, "images": False},
    }
    return tiny
