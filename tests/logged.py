"""What runs have logged, by step, and what of it is the same whenever a run is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OF_TIME = ("speed/", "memory/")
"""Groups of metrics that differ between runs of one config."""


def lines_of(run_dir: str | Path) -> list[dict[str, Any]]:
    """All lines of ``metrics.jsonl``, every one of them whole."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def steps_of(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """Training lines by step."""
    return {line["step"]: line for line in lines_of(run_dir) if "train/loss" in line}


def losses_of(run_dir: str | Path) -> dict[int, float]:
    """Training losses by step."""
    return {step: line["train/loss"] for step, line in steps_of(run_dir).items()}


def figures_of(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """What must be the same bit by bit, by step: all but the clock's and the memory's figures."""
    steps: dict[int, dict[str, Any]] = {}
    for line in lines_of(run_dir):
        kept = {name: value for name, value in line.items() if not name.startswith(OF_TIME)}
        steps.setdefault(line["step"], {}).update(kept)
    return steps
