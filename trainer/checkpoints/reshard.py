"""Resuming from a checkpoint written with another number of ranks, ZeRO stage or precision.

Any entries of every parameter's fp32 master and optimiser state can be read from the files (``zero_files.py``); each
rank reads what its own engine holds, one parameter at a time (``trainer/deepspeed_internals.py``). What a forward pass
needs whole is then assembled from all ranks' parts, so nothing is read twice.

DeepSpeed's own universal checkpoints support neither stage 0 nor a change between stage 3 and the others, and under
stage 3 give every parameter group the first one's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints.read_weights import without_second_names
from trainer.checkpoints.zero_files import MASTER, StoredParameter, stored
from trainer.deepspeed_internals import (
    Place,
    master_places,
    set_weight,
    share_weights,
    torch_optimizer,
    whole_shape,
)
from trainer.distributed import World
from trainer.engine import optimizer_order


def reshard(engine: Any, folder: Path, written: dict[str, Any], world: World) -> None:
    """Load the weights and the optimiser's state of a checkpoint into a fresh engine; collective.

    Args:
        engine: the DeepSpeed engine, of the same model.
        folder: DeepSpeed's files.
        written: the checkpoint's manifest.
        world: this process among all ranks.

    Raises:
        ValueError: if the files hold another model.
    """
    trained = optimizer_order(engine.module)
    entries = stored(folder, written["zero_stage"], written["world_size"], trained, state=True)
    if missing := put(engine, entries, folder, world):
        raise ValueError(f"{folder} has no {missing[0]}; resume with the run's own config")


def put(engine: Any, entries: Iterable[StoredParameter], folder: Path, world: World) -> list[str]:
    """Load weights, and optimiser state if ``entries`` hold it, into an engine that has not trained yet; collective.

    Args:
        engine: the DeepSpeed engine.
        entries: one per parameter, in any order.
        folder: where they come from, for messages.
        world: this process among all ranks.

    Returns:
        Names of the parameters that were not among them, which are left unchanged.

    Raises:
        ValueError: for a parameter that the model does not have, or has in another shape, or whose files were changed;
            on every rank, even if only one has read it.
    """
    left: list[str] = []
    error = None
    try:
        left = _put_own(engine, entries, folder, world.rank, world.size)
    except Exception as raised:
        error = raised
    problems = [
        problem for problem in world.all_gather_objects(None if error is None else str(error)) if problem is not None
    ]
    if error is not None:
        raise error
    if problems:
        raise ValueError(problems[0])
    with torch.no_grad():
        share_weights(engine, world.all_gather)
    return left


def _put_own(engine: Any, entries: Iterable[StoredParameter], folder: Path, rank: int, size: int) -> list[str]:
    """Load what this rank holds, one parameter at a time; not collective."""
    parameters = dict(engine.module.named_parameters())
    places = dict(master_places(engine, rank, size))
    optimizer = torch_optimizer(engine)
    with torch.no_grad():
        for entry in without_second_names(engine.module, entries):
            parameter = parameters.pop(entry.name, None)
            if parameter is None or whole_shape(parameter) != entry.shape:
                raise ValueError(f"{entry.name} in {folder} is not of this model; take the config that goes with it")
            read = cache(partial(entry.master, folder))  # weight and master may be the same entries
            set_weight(engine, parameter, read, rank, size)
            if entry.name in places:
                _set_state(optimizer, places[entry.name], entry, read)
    return list(parameters)


def _set_state(
    optimizer: torch.optim.Optimizer, place: Place, entry: StoredParameter, read: Callable[[int, int], Tensor]
) -> None:
    """Set the master and, if stored, the optimiser's state, for the part that this rank holds."""
    flat = place.flat
    state = optimizer.state[flat] if entry.updates is not None or len(entry.values) > 1 else {}
    if entry.updates is not None:
        state.setdefault("step", torch.tensor(entry.updates, device=flat.device))
    for name in entry.values:
        target = flat if name == MASTER else state.setdefault(name, torch.zeros_like(flat))
        value = read(place.offset, place.size) if name == MASTER else entry.part(name, place.offset, place.size)
        target.view(-1)[place.start : place.start + place.size].copy_(value)
