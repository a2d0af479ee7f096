"""Checks of the folders named in stage two's config, before torch is imported."""

from __future__ import annotations

from pathlib import Path

from settings import peek
from trainer.checkpoints.layout import CONFIG, what_is_there


def require_base(folder: Path) -> None:
    """Refuse a folder that stage two cannot start from, by its config alone.

    Raises:
        ValueError: if it is no folder, or a stage-two run.
    """
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; give base.path a stage-one run, one of its checkpoints, or what "
            f"convert.from_hf wrote{what_is_there(folder)}"
        )
    blocks = peek(folder / CONFIG)
    if "base" in blocks:
        fix = f"merge them first with: python -m tune.merge {folder} OUT, and give base.path that folder"
        if blocks.get("ensemble") is not None:
            fix = "a second ensemble cannot be added to its own, so give base.path the model that it was tuned from"
        raise ValueError(f"{folder} is a stage-two run, whose weights apply on top of its own base; {fix}")


def require_apart(run_dir: Path, base: Path) -> None:
    """Refuse a run whose folder is the base's, lies inside it, or contains it.

    Raises:
        ValueError: if it is.
    """
    run, folder = run_dir.resolve(), base.resolve()
    if run == folder or folder in run.parents or run in folder.parents:
        raise ValueError(
            f"train.run_dir {run_dir} and the base's folder {base} are the same, or one contains the other; give the "
            "tuned run a folder of its own"
        )
