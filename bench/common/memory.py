"""Peak memory of a call, in bytes requested by tensors, measured apart from any timing.

    bytes alive    before | call: + + - + + + - - ... |      peak = the highest point above "before"

On CUDA the allocator tracks the peak itself. On the CPU it does not, but the profiler records every allocation and
release of torch's CPU allocator, including temporaries inside an operator; adding them up address by address gives the
peak, exact to the byte. What other libraries allocate on their own (a matrix product's scratch, the interpreter) is
counted on neither device.
"""

from __future__ import annotations

import os
import resource
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile

# Otherwise the profiler's library prints a line at every start and stop. It reads this once, at the first of them.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
_GROUP = Path("/sys/fs/cgroup")
"""The container's own accounting (cgroup v2)."""


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that ``tensors`` hold; shared storage counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes alive on ``device`` during ``call``, beyond those alive when it began.

    On the CPU, releases of earlier allocations are not seen: drop such tensors (old gradients) first.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as profiled:
        call()
    assert profiled.kineto_results is not None
    return _highest(_allocations(profiled.kineto_results.experimental_event_tree()))


@dataclass(eq=False)
class _Saved:
    """A tensor that autograd keeps."""

    tensor: Tensor


def kept_tensors(call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What the forward pass ``call`` returns, and what autograd then keeps for the backward pass, weights included."""
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()  # tensors dropped during the call leave it

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # an output that holds its own node would never be freed
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = call()
    return output, [saved.tensor for saved in alive]


def _allocations(tree: list[Any]) -> list[tuple[int, int, int]]:
    """Time in ns, address and bytes (negative: released) of every allocation in the profiler's tree, oldest first."""
    found, waiting = [], list(tree)
    for event in waiting:  # grows during the loop
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return sorted(found, key=lambda change: change[0])


def _highest(changes: Iterable[tuple[int, int, int]]) -> int:
    """Peak bytes alive, counting only what was allocated within ``changes``.

    Releases of other addresses are ignored: the profiler remembers blocks of an earlier profile whose release it did
    not see, and takes any later release at their address for theirs.
    """
    alive: dict[int, int] = {}
    total = highest = 0
    for _, address, size in changes:
        if size > 0:
            alive[address] = size
            total += size
            highest = max(highest, total)
        else:
            total -= alive.pop(address, 0)
    return highest


@contextmanager
def held_to_free_memory(device: torch.device) -> Iterator[None]:
    """Make a CPU allocation that does not fit into free memory fail, instead of the whole process being killed.

    Does nothing on CUDA, where it fails by itself, or where the system does not report free memory.
    """
    free, data = free_bytes(), _status_bytes(Path("/proc/self/status"), "VmData")
    if device.type == "cuda" or free is None or data is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(data + 0.9 * free)
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def free_bytes() -> int | None:
    """Main memory still available according to the system and the container; None if neither reports it."""
    known = []
    available = _status_bytes(Path("/proc/meminfo"), "MemAvailable")
    if available is not None:
        known.append(available)
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        used = int((_GROUP / "memory.current").read_text()) - _cached_files_bytes(_GROUP / "memory.stat")
        known.append(int((_GROUP / "memory.max").read_text()) - used)
    return min(known) if known else None


def _cached_files_bytes(path: Path) -> int:
    """File cache in a container's ``memory.stat``: counted as used, but reclaimed by the kernel on demand."""
    figures = dict(line.split() for line in path.read_text().splitlines())
    return int(figures["active_file"]) + int(figures["inactive_file"])


def _status_bytes(path: Path, name: str) -> int | None:
    """A figure of a ``/proc`` file with lines like ``VmData:  1234 kB``."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
