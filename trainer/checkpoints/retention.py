"""Which checkpoints are kept, and whether the disk has room for them.

The ``keep`` newest whole ones are kept, and those at multiples of ``keep_every_steps``; one more exists while it is
written. A run warns at its start if the disk has no room for that many, long before the save that would fail; and no
save begins without room for it. ``max_gb`` is for disks whose quota does not show as free space.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoints.layout import leftovers, newest_first, newest_name, removed_of, step_of
from trainer.config import StageConfig
from trainer.config_blocks import CheckpointConfig, TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from trainer.distributed import World


def prune(
    folder: Path, newest: Path, config: CheckpointConfig, held: str | None = None, torn: Collection[str] = ()
) -> None:
    """Remove checkpoints older than ``newest`` (just written, so whole) beyond the ``keep`` newest whole ones.

    Those at multiples of ``keep_every_steps`` stay. Those named in ``torn`` do not count, nor do others with a higher
    step: a run that was rewound past them must not lose what it was rewound to. The one named ``held``, which is being
    read, stays.
    """
    mine = [found.name for found in newest_first(folder) if step_of(found) <= step_of(newest)]
    for name in no_longer_kept(mine, config.keep, config.keep_every_steps, torn):
        if name != held:
            remove(folder / name)


def no_longer_kept(names: Sequence[str], keep: int, keep_every_steps: int, uncounted: Collection[str]) -> list[str]:
    """Of the checkpoints ``names``, newest first, those older than the ``keep`` newest that count.

    Without those at multiples of ``keep_every_steps``; empty while fewer than ``keep`` count.
    """
    counted = [name for name in names if name not in uncounted]
    older = names[names.index(counted[keep - 1]) + 1 :] if len(counted) >= keep else []
    return [name for name in older if not keep_every_steps or step_of(Path(name)) % keep_every_steps]


def check_plan(size: float, folder: Path, train: TrainConfig, world: World) -> str | None:
    """A warning if the disk of ``folder`` has no room for all that the run will keep at once; collective.

    ``size`` is in bytes: see :func:`checkpoint_bytes`.

    Raises:
        ValueError: if ``max_gb`` is too small for it.
    """
    warning, problem = None, None
    if world.is_main:
        count = most_at_once(train)
        # Those of the run itself, and what the next save will remove.
        own = (*newest_first(folder), *leftovers(folder))
        present = sum(bytes_below(found) for found in own)
        others = bytes_below(folder) - present
        what = (
            f"{count} checkpoints at once (train.checkpoint.keep, keep_every_steps and the one being written), about "
            f"{size / 1e9:.3f} GB each"
        )
        max_gb, room = train.checkpoint.max_gb, shutil.disk_usage(folder).free + present
        if max_gb is not None and others + count * size > max_gb * 1e9:
            beside = f" beside {others / 1e9:.3f} GB of other files" if others else ""
            problem = (
                f"train.checkpoint.max_gb ({max_gb:g}) is too small for {what}{beside} in {folder}; raise it to "
                f"{(others + count * size) / 1e9:.3f}, or keep fewer"
            )
        elif count * size > room:
            warning = (
                f"this run will keep {what}, but {folder} has only {room / 1e9:.3f} GB for them; make room there "
                "before it is full, or keep fewer"
            )
    warning, problem = world.broadcast_object((warning, problem))
    if problem:
        raise ValueError(problem)
    return warning


def check_room(needed: float, folder: Path, name: str, max_gb: float | None) -> None:
    """Refuse, before anything is written, a save of ``needed`` bytes that there is no room for.

    Raises:
        ValueError: with how much is needed and how much is there.
    """
    free = shutil.disk_usage(folder).free
    left = float("inf") if max_gb is None else max_gb * 1e9 - bytes_below(folder)
    shortage = None
    if free < needed:
        shortage = f"where {free / 1e9:.3f} GB are free; make room there"
    elif left < needed:
        shortage = (
            f"where train.checkpoint.max_gb ({max_gb:g}) leaves {max(left, 0) / 1e9:.3f} GB; raise it, or remove files "
            "there that are no longer needed"
        )
    if shortage:
        raise ValueError(
            f"checkpoint {name} needs about {needed / 1e9:.3f} GB in {folder}, {shortage} and resume: "
            f"{newest_name(folder)}"
        )


def unwritable(run: Path, error: OSError) -> str:
    """The error for a run folder whose disk raised ``error``."""
    return (
        f"train.run_dir {run} cannot be written ({error.strerror}); make room there and make it writable, or give "
        "another folder"
    )


def remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it: a kill in between leaves a name that is not taken for a checkpoint.

    What cannot be deleted now, such as files on NFS that are being read, stays under that name until a later save.
    """
    doomed = removed_of(checkpoint)
    if doomed.exists():
        shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(Path(tempfile.mkdtemp(dir=doomed)) / checkpoint.name if doomed.exists() else doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def most_at_once(train: TrainConfig) -> int:
    """The most checkpoints of the run that exist at the same time: while the last one is being written.

    One that is being mirrored may exist for longer than it is kept.
    """
    config = train.checkpoint
    every = config.every_steps if config.every_minutes is None else 1  # by the clock it may be any step
    saves = [*range(every, train.last_step, every), train.last_step]
    older = saves[: -config.keep - 1]
    milestones = [step for step in older if config.keep_every_steps and step % config.keep_every_steps == 0]
    mirrored = config.mirror is not None and len(older) > len(milestones)
    return len(saves) - len(older) + len(milestones) + mirrored


def checkpoint_bytes(module: nn.Module, config: StageConfig) -> float:
    """Approximate size in bytes of a checkpoint of a model inside an engine."""
    from trainer.deepspeed_internals import whole_shape  # torch

    total, trained, moments = 0, 0, 0.0
    for name, parameter in module.named_parameters():
        shape = whole_shape(parameter)
        total += shape.numel()
        if parameter.requires_grad:
            trained += shape.numel()
            moments += config.train.optimizer.moment_bytes(name, shape)
    return config.checkpoint_bytes(total, trained, moments)


def bytes_below(folder: Path) -> int:
    """Total size of all files below ``folder``, without those that are removed meanwhile."""
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(inside, name)).st_size
    return total
