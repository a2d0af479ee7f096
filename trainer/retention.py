"""Which checkpoints stay, and whether there is room for one more; rank 0's business."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainer.config import CheckpointConfig


def newest_first(folder: Path) -> list[Path]:
    """The folders that have a checkpoint's name, whole or not."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest_name(folder: Path) -> str:
    """Which checkpoint a run could go on from, as half a sentence."""
    names = [p.name for p in newest_first(folder)]
    return f"the newest checkpoint is {names[0]}" if names else "no earlier checkpoint was written"


def step_of(checkpoint: Path) -> int:
    """The optimiser steps that a checkpoint's name says."""
    return int(checkpoint.name[5:])


def prune(folder: Path, newest: Path, config: CheckpointConfig) -> None:
    """Remove checkpoints older than ``newest`` (just written, so whole) beyond the ``keep`` newest.

    Those at multiples of ``keep_every_steps`` stay. Torn ones with a higher step do not count: a run that went back
    behind them must not lose what it went back to.
    """
    mine = [found for found in newest_first(folder) if step_of(found) <= step_of(newest)]
    for old in mine[config.keep :]:
        if not config.keep_every_steps or step_of(old) % config.keep_every_steps:
            remove(old)


def remove(checkpoint: Path) -> None:
    """Renamed first: a kill during the removal leaves a name that nobody takes for a checkpoint."""
    doomed = checkpoint.with_name(checkpoint.name + ".removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def check_space(engine: Any, folder: Path, name: str) -> None:
    """Refuse, before anything is written, a save that the disk has no room for.

    Raises:
        ValueError: with how much is needed and how much is free.
    """
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    weight_bytes = next(engine.module.parameters()).element_size()
    needed = parameters * (weight_bytes + 12)  # fp32 master and two moments
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"checkpoint {name} needs about {needed / 1e9:.3f} GB in {folder}, where {free / 1e9:.3f} GB are "
            f"free; make room there and resume: {newest_name(folder)}"
        )
