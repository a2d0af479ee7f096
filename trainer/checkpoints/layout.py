"""The layout of a run and of its checkpoints; no other module has these names.

RUN/                        a run: a folder with checkpoints/ in it; the rest of it is in trainer/run_folder.py
  checkpoints/
    step-00001000/          a finished checkpoint; manifest.py checks whether it is still whole
      deepspeed/            the engine's own files: weights, optimiser state, per rank under ZeRO
      trainer.pt            step, samples consumed, budget prices, and the rest of the trainer's state
      rng-00000.pt          random-number generators of rank 0, and so on
      config.yaml           the run's config
      manifest.json         written last
    step-00002000.partial/  being written, or never finished
    step-00000500.removed/  no longer kept
    abandoned-1/            what launch.rewind has moved out of the way
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

CONFIG = "config.yaml"
"""The config's file name in a run, a checkpoint and a folder of weights."""
TOKENIZER = "tokenizer"
"""In a run folder: its copy of the tokenizer's files."""
STARTS = "starts.txt"
"""In a run folder and its mirror: which run and start own the mirror."""
ENGINE, STATE = "deepspeed", "trainer.pt"
_CHECKPOINTS, _STEP, _PARTIAL, _REMOVED, _ABANDONED = "checkpoints", "step-", ".partial", ".removed", "abandoned-"


def checkpoints_of(run: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run) / _CHECKPOINTS


def is_run(path: Path) -> bool:
    """True for a run folder that was started at least once."""
    return checkpoints_of(path).is_dir()


def run_of(path: Path) -> Path | None:
    """The run that ``path`` is, or is a checkpoint of; None for anything else, such as a checkpoint that was copied."""
    if is_run(path):
        return path
    parent, given = path.resolve().parent, path.parent.parent
    if parent.name != _CHECKPOINTS:
        return None
    return given if given.resolve() == parent.parent else parent.parent  # relative where it was given so


def checkpoint_at(folder: Path, step: int) -> Path:
    """Path of the checkpoint after ``step`` steps, existing or not; ``folder`` as :func:`checkpoints_of` gives it."""
    return folder / f"{_STEP}{step:08d}"


def newest_first(folder: Path) -> list[Path]:
    """All folders with a finished checkpoint's name."""
    names = finished_names(found.name for found in folder.glob(f"{_STEP}*") if found.is_dir())
    return [folder / name for name in names]


def finished_names(names: Iterable[str]) -> list[str]:
    """Of ``names``, those of finished checkpoints, newest first."""
    found = [name for name in names if name.startswith(_STEP) and name.removeprefix(_STEP).isdigit()]
    return sorted(found, key=lambda name: step_of(Path(name)), reverse=True)


def names_after(checkpoint: Path | None) -> set[str]:
    """Names of the finished checkpoints beside ``checkpoint`` with a higher step; empty without one.

    A start that resumes from ``checkpoint`` has found those torn.
    """
    if checkpoint is None:
        return set()
    return {found.name for found in newest_first(checkpoint.parent) if step_of(found) > step_of(checkpoint)}


def newest_name(folder: Path) -> str:
    """Which checkpoint a run could resume from, as half a sentence."""
    names = [p.name for p in newest_first(folder)]
    return f"the newest checkpoint is {names[0]}" if names else "no earlier checkpoint was written"


def what_is_there(path: Path) -> str:
    """For the end of an error: the runs or checkpoints in ``path`` or, if it does not exist, beside it, at most three.

    Such as ``; runs/my/checkpoints holds step-00000064, step-00000040``; empty if there are none.
    """
    folder = path if path.is_dir() else path.parent
    names = [p.name for p in newest_first(folder) or sorted(filter(is_run, folder.glob("*")))]
    return f"; {folder} holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done, according to its name."""
    return int(checkpoint.name.removeprefix(_STEP))


def rng_name(rank: int) -> str:
    """File of a rank's random-number generators."""
    return f"rng-{rank:05d}.pt"


def partial_of(checkpoint: Path) -> Path:
    """Where ``checkpoint`` is written until it is whole."""
    return checkpoint.with_name(checkpoint.name + _PARTIAL)


def removed_of(checkpoint: Path) -> Path:
    """What ``checkpoint`` is called while it is deleted."""
    return checkpoint.with_name(checkpoint.name + _REMOVED)


def unfinished(folder: Path) -> list[Path]:
    """Checkpoints that are being written, or were never finished."""
    return sorted(folder.glob(f"*{_PARTIAL}"))


def leftovers(folder: Path) -> list[Path]:
    """What the next save removes: see :func:`partial_of` and :func:`removed_of`."""
    return [*unfinished(folder), *folder.glob(f"*{_REMOVED}")]


def next_abandoned(folder: Path) -> Path:
    """A new folder for a run's abandoned checkpoints, with the next free number."""
    names = [path.name.removeprefix(_ABANDONED) for path in folder.glob(f"{_ABANDONED}*")]
    return folder / f"{_ABANDONED}{max((int(name) for name in names if name.isdigit()), default=0) + 1}"
