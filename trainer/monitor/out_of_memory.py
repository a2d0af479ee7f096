"""What a run reports when memory has run out: what holds most of it, and which config fields change that.

Parameters, gradients and optimiser states are counted on the live engine; the rest of the peak is activations and a
step's working memory, such as buckets and other buffers. ``launch.plan`` computes the same in advance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import StageConfig
from trainer.deepspeed_internals import local_part, optimizer_tensors
from trainer.distributed import World
from trainer.monitor.metrics import peak_bytes
from trainer.monitor.profiler import write_snapshot

_GB = 1e9


@dataclass(frozen=True)
class Parts:
    """Bytes on one rank's device."""

    parameters: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        parts = asdict(self)
        return max(parts, key=lambda name: parts[name])

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return float(sum(asdict(self).values()))


_CALLED = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimiser": "optimiser states and master weights",
    "activations": "activations and what a step works with",
}


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for what torch raises when an allocation fails, on either kind of device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(error: BaseException, engine: Any, config: StageConfig, world: World, where: str, run: Path) -> str:
    """The error for the user; on a GPU also writes a snapshot of the allocator.

    Args:
        error: what torch raised.
        engine: the run's; None if it was being built.
        config: the run's.
        world: this process.
        where: the step and what was done in it.
        run: its folder.
    """
    wanted = str(error).split("Tried to allocate ")[-1].split(". ")[0] if "Tried to allocate" in str(error) else ""
    text = f"rank {world.rank} ran out of memory {where}" + (f", asking for {wanted}" if wanted else "")
    plan = f"what fits: python -m launch.plan {run / 'config.yaml'} --gpus {world.size} --gpu KIND"
    if engine is None:
        return (
            f"{text}: parameters and optimiser states alone do not fit; {_advice('optimiser', config, world)}; {plan}"
        )
    parts = measured(engine, world.device)
    listed = asdict(parts)
    first = parts.largest
    rest = ", ".join(f"{_gb(listed[name])} {_CALLED[name]}" for name in listed if name != first)
    snapshot = _snapshot(run, world)
    return (
        f"{text}: of {_gb(parts.total)} at most, the largest part is {_CALLED[first]} ({_gb(listed[first])}; {rest}); "
        f"{_advice(first, config, world)}; {plan}{snapshot}"
    )


def measured(engine: Any, device: torch.device) -> Parts:
    """What a rank holds now, with the rest of its peak memory as activations."""
    module = engine.module
    kept = optimizer_tensors(engine)
    parameters = [local_part(p) for p in module.parameters()]
    gradients = [t.grad for t in (*module.parameters(), *kept) if t.is_leaf and t.grad is not None]
    counted: set[int] = set()
    held = _bytes(parameters, device, counted)
    summed = _bytes(gradients, device, counted)
    states = _bytes(kept, device, counted)
    return Parts(held, summed, states, activations=max(peak_bytes(device) - held - summed - states, 0.0))


def _bytes(tensors: Iterable[Tensor], device: torch.device, counted: set[int]) -> float:
    """Size of the storages on ``device`` that are not yet in ``counted``; adds them to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return float(total)


def _advice(part: str, config: StageConfig, world: World) -> str:
    """Settings that make ``part`` smaller, cheapest first; none that the config would refuse."""
    ways = _smaller_steps(config, world) if part == "activations" else _divided_or_moved(part, config, world)
    return f"take {' or '.join(ways or ['a device with more memory, or a smaller model'])}"


def _smaller_steps(config: StageConfig, world: World) -> list[str]:
    """What makes activations smaller."""
    train, ways = config.train, []
    if train.micro_batch_samples > 1:
        smaller = next(n for n in range(train.micro_batch_samples // 2, 0, -1) if not train.micro_batch_samples % n)
        ways.append(f"train.micro_batch_samples={smaller}, which accumulates more")
    recomputing = train.model_copy(update={"activation_checkpointing": True})
    if recomputing != train and config.model_copy(update={"train": recomputing}).could_have():
        ways.append("train.activation_checkpointing=true")
    ranks = 2 * config.deepspeed.sequence_parallel
    if world.size % ranks == 0 and config.could_have(sequence_parallel=ranks):
        ways.append(f"deepspeed.sequence_parallel={ranks}, ranks that share a window")
    return [*ways, "shorter windows (data.sequence_tokens)"]


def _divided_or_moved(part: str, config: StageConfig, world: World) -> list[str]:
    """What divides ``part`` over the ranks, or moves it to CPU memory."""
    zero, ways = config.deepspeed, []
    stage = max(zero.zero_stage, {"optimiser": 1, "gradients": 2, "parameters": 3}[part])
    field = "" if stage == zero.zero_stage else f"deepspeed.zero_stage={stage}"
    if config.could_have(zero_stage=stage):
        ways.append(field if field and world.size > 1 else f"more GPUs, over which {field or 'ZeRO'} divides it")
    offload = {"optimiser": "optimizer", "parameters": "all"}.get(part, zero.offload)
    if zero.offload not in (offload, "all") and config.could_have(zero_stage=stage, offload=offload):
        ways.append(f"{field} deepspeed.offload={offload}".strip())
    return ways


def _snapshot(run: Path, world: World) -> str:
    if world.device.type != "cuda":
        return ""
    with contextlib.suppress(OSError, RuntimeError):
        return f"; who holds what: {write_snapshot(run / 'profile', world.rank)}, for pytorch.org/memory_viz"
    return ""


def _gb(size: float) -> str:
    return f"{size / _GB:.3g} GB"
