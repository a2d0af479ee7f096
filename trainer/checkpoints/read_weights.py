"""Reading a checkpoint's weights into a module, in one process: no ranks, no engine, and no pickled code is run.

The weights are the fp32 masters wherever there are any; ``zero_files.py`` knows where to find them. Memory holds the
fp32 model, and what the system caches of the memory-mapped files. Decoders are read by :mod:`tune.load`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.checkpoints import manifest
from trainer.checkpoints.layout import ENGINE, STATE, checkpoints_of, is_run, what_is_there
from trainer.checkpoints.weights_folder import mismatch
from trainer.checkpoints.zero_files import MASTER, StoredParameter, only_tensors, stored
from trainer.deepspeed_internals import import_deepspeed
from trainer.distributed import ALONE, World
from trainer.engine import optimizer_order

_WHAT = "give a run folder (train.run_dir) or one of the step-N folders in its checkpoints/"


def fill(module: nn.Module, folder: Path, zero_stage: int) -> int:
    """Copy a checkpoint's weights into a module, fp32 masters wherever there are any.

    Args:
        module: as in the engine that wrote the checkpoint: the same names and shapes, and the same ``requires_grad``;
            fp32 on the CPU.
        folder: the checkpoint's, as :func:`checkpoint_of` returns it.
        zero_stage: the stage it was written at.

    Returns:
        The number of optimiser steps that the weights have had.

    Raises:
        ValueError: if the files hold another model, or anything but tensors and numbers.
    """
    wanted = dict(module.named_parameters())
    with torch.no_grad():
        for name, entry in matched(module, folder, zero_stage).items():
            _copy(wanted[name], entry, folder)
    return manifest.read(folder, ALONE)["step"]


def weights_of(module: nn.Module, folder: Path, zero_stage: int) -> Iterator[StoredParameter]:
    """A checkpoint's values of a module's parameters, memory-mapped and not yet read.

    Args:
        module, folder, zero_stage: as for :func:`fill`; the module may be without memory.

    Raises:
        ValueError: if the files hold anything but tensors and numbers.
    """
    written = manifest.read(folder, ALONE)
    trained = optimizer_order(module)
    import_deepspeed()  # quietly: the allowed types are its own
    return stored(folder / ENGINE, zero_stage, written["world_size"], trained, state=False)


def matched(module: nn.Module, folder: Path, zero_stage: int) -> dict[str, StoredParameter]:
    """The same by name; the checkpoint must hold every parameter of the module once, in its shape.

    Raises:
        ValueError: if it does not, or the files hold anything but tensors and numbers.
    """
    found = {entry.name: entry for entry in without_second_names(module, weights_of(module, folder, zero_stage))}
    if problem := mismatch(dict(module.named_parameters()), {name: entry.shape for name, entry in found.items()}):
        raise ValueError(
            f"the weights in {folder} do not match its config.yaml ({problem}); one of them was changed after it was "
            "written, so take another checkpoint"
        )
    return found


def without_second_names(module: nn.Module, entries: Iterable[StoredParameter]) -> Iterator[StoredParameter]:
    """``entries`` without those under a parameter's second name (a tied head's), which some files also have."""
    names = {name for name, _ in module.named_parameters()}
    again = {name for name, _ in module.named_parameters(remove_duplicate=False)} - names
    return (entry for entry in entries if entry.name not in again)


def thresholds_in(checkpoint: Path) -> Tensor | None:
    """The thresholds on the routers' margins, fp32 [S]; None for 0."""
    with only_tensors(checkpoint):
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    return state.get("thresholds")


def checkpoint_of(path: Path, world: World = ALONE, what: str = _WHAT) -> Path:
    """The checkpoint that ``path`` names, with every file verified against its manifest; collective.

    Args:
        path: a run folder, for its newest whole checkpoint, or one checkpoint's folder.
        world: the calling ranks; each verifies a share of the files.
        what: for the error, what to give if the folder is neither.

    Raises:
        ValueError: if there is none, or it is torn. On every rank.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; {what}{what_is_there(path)}")
    if not is_run(path):
        problem = manifest.problem_of(path, world)
        if problem is not None:
            there = what_is_there(path)
            raise ValueError(f"{path} is neither a run folder nor a whole checkpoint: {problem}; {what}{there}")
        return path
    folder = checkpoints_of(path)
    found, torn = manifest.newest_whole(folder, world)
    manifest.report_torn(torn, world)
    if found is None:
        raise ValueError(f"{folder} holds no whole checkpoint; train until one is saved, or give another run folder")
    return found


def _copy(parameter: Tensor, entry: StoredParameter, folder: Path) -> None:
    flat, done = parameter.view(-1), 0
    for piece in entry.values[MASTER](0, flat.numel()):
        flat[done : done + piece.numel()] = piece
        done += piece.numel()
    entry.check(folder, flat[:done])
