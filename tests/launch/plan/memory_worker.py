"""Run by test_memory_model.py in forked ranks: bytes that a real engine holds, part by part, as JSON.

    torchrun --nproc-per-node 2 -m tests.launch.plan.memory_worker CONFIG CASES OUT

CASES is a list of overrides; one start of the ranks measures all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import profile

from bench.common.memory import kept_tensors, peak_bytes
from launch.plan.workload import read_workload
from trainer.distributed import World, join, leave
from trainer.engine import build_engine

Storages = dict[int, int]
"""Bytes by address."""
COLLECTIVES = {
    "gloo:all_reduce": "all_reduce",  # c10d's own event does not report the shapes of a list
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::alltoall_base_": "exchange",
}


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # gc's walk touches deprecated objects of torch
    world = join(60.0)
    results = [measure(arguments.config, overrides, world) for overrides in json.loads(arguments.cases.read_text())]
    if world.is_main:
        arguments.out.write_text(json.dumps(results))
    world.barrier()
    leave()


def measure(path: str, overrides: list[str], world: World) -> dict[str, float]:
    """Bytes of weights, gradients (most at once between micro-batches), optimiser and activations; the peak of a step.

    And elements that the step's collectives moved, by kind.
    """
    config = read_workload(path, overrides).config
    gc.collect()
    gc.freeze()  # what there is already, all modules with it, is not looked through again
    engine = build_engine(config, world)
    world = world.sharing_windows(config.deepspeed, 60.0)
    samples, tokens = config.train.micro_batch_samples, config.data.sequence_tokens
    accumulation = config.accumulation(world.size)
    batch = torch.randint(config.model.vocab_size, (samples, tokens), generator=torch.Generator().manual_seed(0))
    if world.sequence is not None:
        batch = world.sequence.local_part(batch)
    others: list[float] = []
    kept: list[dict[str, float]] = []

    def others_alive() -> int:
        time.sleep(0.1)  # a thread of gloo's may hold what it has sent a moment longer
        gc.collect()
        everything = _alive() | _of(p.grad for p in engine.module.parameters() if p.grad is not None)
        known = {**weights, **_optimizer(engine)}
        return sum(size for at, size in everything.items() if at not in known)

    def step(watch: bool) -> None:
        for number in range(accumulation):
            forward: Callable[[], Any] = lambda: engine(  # noqa: E731
                batch, batch, sample_ids=torch.arange(samples), sequence=world.sequence
            )
            output = forward() if not watch else _kept(engine, forward, config.model.width, kept)
            engine.backward(output.loss.loss / batch.numel(), scale_wrt_gas=False)
            del output
            if watch:
                others.append(min(others_alive() for _ in range(5)))
            if number + 1 < accumulation:
                engine.step()
        engine.step()

    weights = _weights(engine)
    step(watch=False)  # moments are there from now on
    weights = _weights(engine)
    step(watch=True)
    optimizer = sum(size for at, size in _optimizer(engine).items() if at not in weights)
    gc.collect()
    held = sum(_alive().values())
    result = {
        "weights": sum(weights.values()),
        "optimizer": optimizer,
        "others": max(others),
        "held": held,
        "checkpoint": _saved_bytes(engine),
        "peak": held + peak_bytes(lambda: step(watch=False), world.device),
        **kept[0],
        **_moved(lambda: step(watch=False)),
    }
    engine.destroy()
    return result


def _kept(engine: Any, forward: Callable[[], Any], width: int, found: list[dict[str, float]]) -> Any:
    """Run ``forward``; note the bytes that autograd keeps besides weights, and how dense the routing was."""
    output, tensors = kept_tensors(forward)
    low = next(engine.module.parameters()).dtype != torch.float32
    weights = _of(engine.module.parameters())  # which stage 3 gathers on the way
    kept: Storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # Torch has no bf16 RMSNorm on the CPU and keeps two fp32 copies of what goes in; the CUDA kernel that.
        copies = tensor.dtype == torch.float32 and tensor.shape[-1:] == (width,) and tensor.dim() < 4
        is_head = tensor.dim() == 2 and tensor.shape[0] == engine.module.config.vocab_size
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // (4 if copies and low and not is_head else 1)
    executed = output.routing.executed_tokens.float().mean().item() if engine.module.config.sites else 0.0
    gathered = sum(_of(engine.module.parameters()).values())
    tokens = output.routing._keys.numel()
    found.append({"activations": sum(kept.values()), "density": executed / tokens, "gathered": gathered})
    return output


def _saved_bytes(engine: Any) -> int:
    """Size of the engine's checkpoint; collective."""
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    engine.save_checkpoint(str(folder), tag="saved", save_latest=False)
    dist.barrier()
    size = sum(path.stat().st_size for path in (folder / "saved").iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return size


def _weights(engine: Any) -> Storages:
    return _of(getattr(p, "ds_tensor", p) for p in engine.module.parameters())


def _optimizer(engine: Any) -> Storages:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    masters += getattr(engine.optimizer, "single_partition_of_fp32_groups", [])
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    return _of([*masters, *states])


def _of(tensors: Iterable[Tensor]) -> Storages:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _alive() -> Storages:
    """Every tensor that Python can reach, but for those that were frozen."""
    return _of(o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter) and o.device.type == "cpu")


def _moved(step: Callable[[], None]) -> dict[str, int]:
    """Elements of the whole tensors that ``step``'s collectives reduce, gather and scatter."""
    with profile(record_shapes=True) as profiled:
        step()
    moved = dict.fromkeys(COLLECTIVES.values(), 0)
    for event in profiled.events():
        if event.name in COLLECTIVES:
            moved[COLLECTIVES[event.name]] += max(_elements(event.input_shapes))
    return moved


def _elements(shapes: list[Any]) -> Iterable[int]:
    """Elements of every tensor, lists of tensors as well."""
    for shape in shapes:
        if shape and isinstance(shape[0], list):
            yield from _elements(shape)
        else:
            yield math.prod(shape) if shape else 0


if __name__ == "__main__":
    main()
