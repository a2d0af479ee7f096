"""What this project relies on in DeepSpeed 0.19 beyond its documented interface: the file to check on an upgrade.

Attributes of engines, optimisers and parameters that begin with an underscore or are undocumented are used here and
nowhere else (enforced by a test). The layout of its checkpoint files is in ``checkpoints/zero_files.py``.

What a rank holds of a parameter:

    stage 0      all of it and, in bf16 and fp16, of its master, one tensor each
    stage 1, 2   all of it, and the part of its group's flat master that lies in this rank's partition
    stage 3      an equal part of it and of its master
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a rank holds a part of a parameter's master.

    Attributes:
        flat: the tensor that the optimiser updates.
        start: the part's first entry in it.
        offset: the same entry in the whole, flat parameter.
        size: number of entries in the part.
    """

    flat: Tensor
    start: int
    offset: int
    size: int


def uses_cuda() -> bool:
    """True on a CUDA machine, unless DeepSpeed was told to use the CPU (``DS_ACCELERATOR=cpu``)."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, without an op that it would compile needlessly on a CPU.

    On a CPU ``init_distributed`` would spend over a minute compiling a shared-memory op that only inference uses.
    """
    on_cpu = not uses_cuda()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it would find out by itself, with a warning
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, once per step.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning)
    with _no_mlflow():
        import deepspeed
        import deepspeed.ops

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """ZeRO 3 looks for tensors in what a module returns, to place its hooks, and does not look into our dataclasses.

    It does not have to: losses and weights agree with the other stages (tests/trainer/test_ranks.py).
    """
    return "unknown inputs or outputs type" not in record.getMessage()


@contextmanager
def _no_mlflow() -> Iterator[None]:
    """Block the import of MLflow unless already imported: DeepSpeed's autotuner would import it, a second per start."""
    if {"mlflow", "deepspeed"} & sys.modules.keys():
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def types_in_files() -> list[Any]:
    """The types other than tensors and containers in DeepSpeed's checkpoint files."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, fragment_address]


def is_partitioned(parameter: Tensor) -> bool:
    """True under stage 3, where a rank holds a part."""
    return hasattr(parameter, "ds_id")


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its partition if it is partitioned, else all of it."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter  # type: ignore[attr-defined]


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the full parameter, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_size(parameter: Tensor) -> int:
    """Number of entries of the full parameter, partitioned or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def gathered(parameter: Tensor, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Context in which a partitioned parameter is whole; changes made by ``modifier_rank`` then reach all ranks."""
    if not is_partitioned(parameter):
        return nullcontext()
    return import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=modifier_rank)


def whole_weight(parameter: Tensor) -> Tensor:
    """The full parameter, from its fp32 master where that is accessible (ZeRO 1 to 3); collective inside an engine."""
    if not is_partitioned(parameter) and not hasattr(parameter, "_hp_mapping"):
        return parameter.detach()
    with gathered(parameter):
        weight = parameter.detach().clone()
    master = import_deepspeed().utils.safe_get_full_fp32_param(parameter)
    if master is not None:
        master = master.reshape(weight.shape)
        # With round_robin_gradients DeepSpeed gives another parameter's.
        if torch.equal(master.to(weight.dtype), weight):
            return master
    return weight


def set_weight(engine: Any, parameter: Tensor, read: Callable[[int, int], Tensor], rank: int, size: int) -> None:
    """Write this rank's part of a weight into the tensor of the forward pass, in that tensor's precision.

    Of a trained weight at stages 1 and 2 nothing is read, and at stage 3 only this rank's partition of any weight:
    :func:`share_weights` fills in the rest from all ranks.

    Args:
        engine: the DeepSpeed engine.
        parameter: one of its module's.
        read: returns entries of the full, flattened weight, given the first index and the count.
        rank, size: this process's rank and the number of ranks.
    """
    entries = whole_size(parameter)
    if hasattr(parameter, "ds_tensor"):
        part = math.ceil(entries / size)
        own = read(rank * part, max(min(part, entries - rank * part), 0))
        parameter.ds_tensor.view(-1)[: own.numel()].copy_(own)
        if hasattr(parameter, "ds_secondary_tensor"):
            parameter.ds_secondary_tensor = None  # hpZ's copy within a node, which forward passes read: made again
    elif not (engine.zero_optimization_stage() in (1, 2) and parameter.requires_grad):
        parameter.copy_(read(0, entries).view(parameter.shape))


def share_weights(engine: Any, gather: Callable[[Tensor], Tensor]) -> None:
    """Assemble what the forward pass needs whole, once every rank has its masters and partitions; collective.

    ``gather`` concatenates the flat values of all ranks.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor") and parameter.numel():  # small, so whole on every rank, too
            whole = gather(parameter.ds_tensor.view(-1).to(parameter.device))
            parameter.copy_(whole[: parameter.numel()].view(parameter.shape))


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimiser that DeepSpeed's wraps, or the engine's optimiser itself if it wraps none."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def optimizer_tensors(engine: Any) -> list[Tensor]:
    """Tensors that the optimiser holds: those it steps, master weights where there are some, and its states.

    At stage 0 in fp32 those it steps are the weights themselves.
    """
    optimizer = torch_optimizer(engine)
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    masters = list(getattr(engine.optimizer, "fp32_partitioned_groups_flat", ()))
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*stepped, *masters, *states]


def master_places(engine: Any, rank: int, size: int) -> Iterator[tuple[str, Place]]:
    """Name and place of the master of every trained parameter of which this rank holds a part."""
    return _PLACES[engine.zero_optimization_stage()](engine, rank, size)


def starts(group: dict[str, torch.Size], gaps: Sequence[int]) -> Iterator[int]:
    """Stages 1 and 2: offset of each parameter in its group."""
    start = 0
    for shape, gap in zip(group.values(), gaps, strict=True):
        yield start
        start += shape.numel() + gap


def undo_first_step(engine: Any, before: Sequence[Tensor]) -> None:
    """Undo the step on zero gradients that DeepSpeed takes at construction at stage 0 in bf16 and fp16.

    That step applies weight decay and advances the optimiser's step count.

    Args:
        engine: just built.
        before: the weights of its model before that step.
    """
    shadow = dict(zip(engine.module.parameters(), before, strict=True))
    for parameter, master in _pairs(engine.optimizer):
        parameter.data.copy_(shadow[parameter].to(parameter.device))
        master.data.copy_(parameter.data)
    engine.optimizer.optimizer.state.clear()


def skip_step(engine: Any) -> None:
    """Skip an update: called instead of ``engine.step()``, clears the gradients and advances the micro-step count."""
    engine.zero_grad()
    engine.micro_steps += 1


@contextmanager
def writing_through(engine: Any, save: Callable[[Any, str], None]) -> Iterator[None]:
    """Make ``engine.save_checkpoint`` pass what it would write, and the path, to ``save``."""

    def called_by_name(state_dict: Any, path: str) -> None:
        save(state_dict, path)

    writer = engine.checkpoint_engine
    writer.save = called_by_name
    # Its converters unpickle whatever a file holds, and do not know every stage: no code goes into a checkpoint.
    engine._copy_recovery_script = lambda folder: None
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script  # the classes' own are back


def _pairs(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Stage 0 in bf16 and fp16: parameters and their masters."""
    for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(lows, masters, strict=True)


def _whole(engine: Any, rank: int, size: int) -> Iterator[tuple[str, Place]]:
    """Stage 0."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if hasattr(engine.optimizer, "fp32_groups"):
        pairs = list(_pairs(engine.optimizer))
    else:
        pairs = [(p, p) for group in engine.optimizer.param_groups for p in group["params"]]
    for parameter, master in pairs:
        yield names[parameter], Place(master, 0, 0, master.numel())


def _partitions(engine: Any, rank: int, size: int) -> Iterator[tuple[str, Place]]:
    """Stages 1 and 2."""
    optimizer = engine.optimizer
    shapes, gaps = engine._get_zero_param_shapes(), optimizer.round_robin_bit16_padding
    for flat, group, gap in zip(optimizer.single_partition_of_fp32_groups, shapes, gaps, strict=True):
        first = rank * flat.numel()
        for (name, shape), start in zip(group.items(), starts(group, gap), strict=True):
            begin, end = max(start, first), min(start + shape.numel(), first + flat.numel())
            if begin < end:
                yield name, Place(flat, begin - first, begin - start, end - begin)


def _equal_parts(engine: Any, rank: int, size: int) -> Iterator[tuple[str, Place]]:
    """Stage 3."""
    optimizer = engine.optimizer
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, engine._get_zero_param_shapes(), strict=True):
        start = 0
        for name, shape in group.items():
            part = math.ceil(shape.numel() / size)
            count = max(min(part, shape.numel() - rank * part), 0)
            yield name, Place(flat, start, rank * part, count)
            start += part


_PLACES = {0: _whole, 1: _partitions, 2: _partitions, 3: _equal_parts}
