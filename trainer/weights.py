"""A trained decoder out of a checkpoint, in one process: no ranks, no engine, and no code from pickles is run.

The weights are the fp32 masters wherever there are any; ``stored.py`` knows where they lie. In memory is the fp32
model, and of the files, which are mapped, what the system likes to keep; with ``disk`` the model is in a file, too
(:mod:`trainer.allocate`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from model.decoder import Decoder
from settings import load
from trainer import checkpoint, manifest
from trainer.allocate import allocate, without_memory
from trainer.config import RunConfig, is_stage_two
from trainer.distributed import ALONE, import_deepspeed
from trainer.engine import optimizer_order
from trainer.stored import MASTER, Stored, stored


def load_decoder(run_or_checkpoint: Path, disk: Path | None = None) -> tuple[Decoder, RunConfig, int]:
    """The decoder in evaluation mode, fp32 on the CPU; the config of its run; and the optimiser steps it has had.

    Args:
        run_or_checkpoint: a run folder, of which the newest whole checkpoint is taken (torn ones are reported on stderr
            and passed over), or one checkpoint's folder.
        disk: keep the weights in a file without a name in this folder; in memory unless given.

    Raises:
        ValueError: if there is no whole checkpoint, or it is of a tuning run, or it holds another model than its config
            says, or anything but tensors and numbers.
    """
    folder = checkpoint_of(run_or_checkpoint)
    if is_stage_two(folder / "config.yaml"):
        raise ValueError(
            f"{folder} is of a tuning run, and only stage one can be read here; give the run that it was tuned from, "
            "or read this one in Python with tune.weights.load_tuned"
        )
    config = load(folder / "config.yaml", [], RunConfig)
    decoder = without_memory(config.model, config.train.seed)
    allocate(decoder, disk)
    step = fill(decoder, folder, config.deepspeed.zero_stage)
    return decoder, config, step


def fill(module: nn.Module, folder: Path, zero_stage: int) -> int:
    """Copy a checkpoint's weights into a module, fp32 masters wherever there are any.

    Args:
        module: as in the engine that wrote the checkpoint: the same names and shapes, and the same ``requires_grad``;
            fp32 on the CPU.
        folder: the checkpoint's, as :func:`checkpoint_of` returns it.
        zero_stage: that it was written at.

    Returns:
        The optimiser steps that the weights have had.

    Raises:
        ValueError: if the files hold another model, or anything but tensors and numbers.
    """
    written = manifest.read(folder, ALONE)
    trained = optimizer_order(module)
    import_deepspeed()  # quietly: the allowed types are its own
    with checkpoint.only_tensors(folder), torch.no_grad():
        _fill(module, stored(folder / "deepspeed", zero_stage, written["world_size"], trained, state=False), folder)
    return written["step"]


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that ``path`` names, every file of it as its manifest says.

    Args:
        path: a run folder, of which the newest whole checkpoint is taken, or one checkpoint's folder.

    Raises:
        ValueError: if there is none, or it is torn.
    """
    what = "give a run folder (train.run_dir) or one of the step-N folders in its checkpoints/"
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; {what}")
    folder = path / "checkpoints"
    if not folder.is_dir():
        problem = manifest.problem_of(path, ALONE)
        if problem is not None:
            raise ValueError(f"{path} is neither a run folder nor a whole checkpoint: {problem}; {what}")
        return path
    found, torn = checkpoint.find(folder, ALONE)
    for sentence in torn:
        print(f"passed over: {sentence}", file=sys.stderr, flush=True)
    if found is None:
        raise ValueError(f"{folder} holds no whole checkpoint; train until one is saved, or give another run folder")
    return found


def _fill(module: nn.Module, stored: Iterable[Stored], folder: Path) -> None:
    """Copy what the files hold into the module; every parameter once, in its shape."""
    wanted = dict(module.named_parameters())
    # Second names of the same weight, as a tied head's: some files have them, too.
    again = {name for name, _ in module.named_parameters(remove_duplicate=False)} - wanted.keys()
    problems = []
    for entry in stored:
        parameter = wanted.pop(entry.name, None)
        if parameter is None:
            if entry.name not in again:
                problems.append(f"{entry.name} is there, but not in the config's model")
        elif parameter.shape != entry.shape:
            problems.append(f"{entry.name} is {list(entry.shape)} there and {list(parameter.shape)} by the config")
        else:
            _copy(parameter, entry, folder)
    problems += [f"{name} is missing" for name in wanted]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the weights in {folder} do not match its config.yaml ({'; '.join(problems[:3])}{more}); one of them was "
            "changed since, so take another checkpoint"
        )


def _copy(parameter: Tensor, entry: Stored, folder: Path) -> None:
    flat, done = parameter.view(-1), 0
    for piece in entry.values[MASTER]:
        flat[done : done + piece.numel()] = piece
        done += piece.numel()
    entry.check(flat[:done], folder)
