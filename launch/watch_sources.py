"""What a run folder says of its run: total steps, newest figures, newest checkpoint. Reads, never writes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_TAIL_BYTES = 1 << 18


@dataclass(frozen=True)
class Figures:
    """The newest of ``metrics.jsonl``.

    Attributes:
        training: the newest training line, by the names of docs/training.md; empty before the first.
        validation: newest loss of each validation set, nats per token.
        step_s: seconds a step took, of the last lines.
    """

    training: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)


def read_steps(folder: Path) -> int:
    """``train.steps`` of the run in ``folder``, of either stage.

    Raises:
        ValueError: if there is no run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        there = "it has no config.yaml" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder} is no run ({there}); give the folder that train.run_dir names, such as runs/demo")
    try:
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["steps"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} names no train.steps, so it is not the config of a run; give the folder that train.run_dir names"
        ) from None


def read_figures(path: Path, last: int) -> Figures:
    """The newest figures, and the step times of the ``last`` training lines; empty where nothing is logged yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
            texts = file.read().splitlines()
    except OSError:
        return Figures()
    training: list[dict[str, Any]] = []
    validation: dict[str, float] = {}
    for text in texts:
        try:
            told = json.loads(text)
        except ValueError:
            continue  # the first, cut by the seek, or the last, still being written
        if "train/loss" in told:
            training.append(told)
        for name, value in told.items():
            if name.startswith("validation/") and name.endswith("/loss") and value is not None:
                validation[name.split("/")[1]] = value
    step_s = [told["speed/step_s"] for told in training[-last:] if told.get("speed/step_s")]
    return Figures(training[-1] if training else {}, validation, step_s)


def read_checkpoint(folder: Path, alive: bool) -> tuple[str, float] | None:
    """Name and age in seconds of the newest checkpoint; None before the first.

    The age is against the newest heartbeat's file while the run is ``alive``, because the clock of the machine that
    writes both may not be ours.
    """
    try:
        manifests = sorted((folder / "checkpoints").glob("step-*/manifest.json"), key=lambda path: path.parent.name)
        manifests = [path for path in manifests if path.parent.name[5:].isdigit()]
        if not manifests:
            return None
        beats = [path.stat().st_mtime for path in (folder / "heartbeat").glob("rank-*.json")]
        now = max(beats) if alive and beats else time.time()
        return manifests[-1].parent.name, max(now - manifests[-1].stat().st_mtime, 0.0)
    except OSError:  # pruned, or rewritten, between two looks
        return None
