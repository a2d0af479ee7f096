"""Reads a run folder, without writing: total steps, newest metrics, newest checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from settings import peek
from trainer.checkpoints import manifest
from trainer.checkpoints.layout import CONFIG, checkpoints_of, newest_first, what_is_there
from trainer.monitor import metrics_file

_TAIL_BYTES = 1 << 18


@dataclass(frozen=True)
class Figures:
    """The newest figures in ``metrics.jsonl``.

    Attributes:
        training: the newest training line, names as in docs/training.md; empty before the first.
        validation: newest loss of each validation set, nats per token.
        step_s: seconds per step, in the last lines.
    """

    training: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)


def read_steps(folder: Path) -> int:
    """The last step of the run in ``folder``, of either stage.

    Raises:
        ValueError: if there is no run.
    """
    path = folder / CONFIG
    if not path.is_file():
        there = f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder"
        what = "give the folder that train.run_dir names, such as runs/demo"
        raise ValueError(f"{folder} is not a run ({there}); {what}{what_is_there(folder)}")
    try:
        train = peek(path)["train"]
        return min(int(train["steps"]), int(train.get("stop_at_step") or train["steps"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} names no train.steps, so it is not the config of a run; give the folder that train.run_dir names"
        ) from None


def read_figures(path: Path, last: int) -> Figures:
    """The newest figures, and the step times of the ``last`` training lines; empty where nothing is logged yet."""
    try:
        lines = metrics_file.read(path, _TAIL_BYTES)
    except OSError:  # a passing one, of a network file system
        return Figures()
    training: list[dict[str, Any]] = []
    validation: dict[str, float] = {}
    for line in lines:
        if "train/loss" in line:
            training.append(line)
        validation |= {name: loss for name, loss in metrics_file.losses_of(line).items() if loss is not None}
    step_s = [line["speed/step_s"] for line in training[-last:] if line.get("speed/step_s")]
    return Figures(training[-1] if training else {}, validation, step_s)


def read_checkpoint(folder: Path, alive: bool) -> tuple[str, float] | None:
    """Name and age in seconds of the newest checkpoint; None before the first.

    While the run is ``alive``, the age is relative to the newest heartbeat's file, because the clock of the machine
    that writes both may differ from ours.
    """
    try:
        manifests = [path / manifest.NAME for path in newest_first(checkpoints_of(folder))]
        newest = next((path for path in manifests if path.is_file()), None)
        if newest is None:
            return None
        beats = [path.stat().st_mtime for path in (folder / "heartbeat").glob("rank-*.json")]
        now = max(beats) if alive and beats else time.time()
        return newest.parent.name, max(now - newest.stat().st_mtime, 0.0)
    except OSError:  # pruned or rewritten meanwhile
        return None
