"""Going on from a checkpoint that other ranks, another ZeRO stage or another precision wrote.

The files give every parameter's fp32 master and optimiser state whole (``zero_files.py``); each rank takes of them what
its own engine holds, one parameter at a time:

    stage 0      the parameter, and in bf16 and fp16 its master
    stage 1, 2   the parameter, and of its group's flat master the part that lies in this rank's partition
    stage 3      this rank's equal part of the parameter and of its master

DeepSpeed's own universal checkpoints do not know stage 0 nor a change between 3 and the others, and give every group
the first one's settings under stage 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.checkpoints.zero_files import MASTER, Stored, starts, stored
from trainer.engine import optimizer_order


class _Place(NamedTuple):
    """Where this rank holds a part of a parameter's master.

    Attributes:
        flat: the tensor that the optimiser updates.
        start: the part's first entry in it.
        offset: the same entry in the whole, flat parameter.
        size: entries of the part.
    """

    flat: Tensor
    start: int
    offset: int
    size: int


def reshard(engine: Any, folder: Path, written: dict[str, Any], rank: int, size: int) -> None:
    """Put the weights and the optimiser's state of a checkpoint into a fresh engine; collective.

    Args:
        engine: the DeepSpeed engine, of the same model.
        folder: DeepSpeed's files.
        written: the checkpoint's manifest.
        rank, size: of this process, and how many there are.

    Raises:
        ValueError: if the files hold another model.
    """
    stage = engine.zero_optimization_stage()
    parameters = dict(engine.module.named_parameters())
    again = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)} - parameters.keys()
    places = dict(_PLACES[stage](engine, rank, size))
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    entries = stored(folder, written["zero_stage"], written["world_size"], optimizer_order(engine.module), state=True)
    with torch.no_grad():
        for entry in entries:
            if entry.name in again:  # a tied head's second name
                continue
            parameter = parameters.pop(entry.name, None)
            if parameter is None or getattr(parameter, "ds_shape", parameter.shape) != entry.shape:
                raise ValueError(f"{entry.name} in {folder} is not of this model; resume with the run's own config")
            master = entry.part(MASTER)
            entry.check(master, folder)
            _set_weight(parameter, master, rank, size)
            if entry.name in places:
                _set_state(optimizer, places[entry.name], entry)
    if parameters:
        raise ValueError(f"{folder} has no {next(iter(parameters))}; resume with the run's own config")


def _set_weight(parameter: Tensor, whole: Tensor, rank: int, size: int) -> None:
    """The weight that the forward pass uses, in its own precision."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.copy_(whole.view(parameter.shape))
        return
    part = math.ceil(whole.numel() / size)
    own = whole[rank * part : (rank + 1) * part]
    parameter.ds_tensor.view(-1)[: own.numel()].copy_(own)
    if parameter.numel():  # a small one, which every rank keeps whole
        parameter.copy_(whole.view(parameter.shape))


def _set_state(optimizer: torch.optim.Optimizer, place: _Place, entry: Stored) -> None:
    """The master and the optimiser's state, as far as this rank has them."""
    flat = place.flat
    state = optimizer.state[flat]
    if entry.updates is not None:
        state.setdefault("step", torch.tensor(entry.updates, device=flat.device))
    for name in entry.values:
        target = flat if name == MASTER else state.setdefault(name, torch.zeros_like(flat))
        target.view(-1)[place.start : place.start + place.size].copy_(entry.part(name, place.offset, place.size))


def _whole(engine: Any, rank: int, size: int) -> Iterator[tuple[str, _Place]]:
    """Stage 0."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if hasattr(engine.optimizer, "fp32_groups"):
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        pairs = [(low, master) for lows, masters in groups for low, master in zip(lows, masters, strict=True)]
    else:
        pairs = [(p, p) for group in engine.optimizer.param_groups for p in group["params"]]
    for parameter, master in pairs:
        yield names[parameter], _Place(master, 0, 0, master.numel())


def _partitions(engine: Any, rank: int, size: int) -> Iterator[tuple[str, _Place]]:
    """Stages 1 and 2."""
    optimizer = engine.optimizer
    shapes, gaps = engine._get_zero_param_shapes(), optimizer.round_robin_bit16_padding
    for flat, group, gap in zip(optimizer.single_partition_of_fp32_groups, shapes, gaps, strict=True):
        first = rank * flat.numel()
        for (name, shape), start in zip(group.items(), starts(group, gap), strict=True):
            begin, end = max(start, first), min(start + shape.numel(), first + flat.numel())
            if begin < end:
                yield name, _Place(flat, begin - first, begin - start, end - begin)


def _equal_parts(engine: Any, rank: int, size: int) -> Iterator[tuple[str, _Place]]:
    """Stage 3."""
    optimizer = engine.optimizer
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, engine._get_zero_param_shapes(), strict=True):
        start = 0
        for name, shape in group.items():
            part = math.ceil(shape.numel() / size)
            count = max(min(part, shape.numel() - rank * part), 0)
            yield name, _Place(flat, start, rank * part, count)
            start += part


_PLACES = {0: _whole, 1: _partitions, 2: _partitions, 3: _equal_parts}
