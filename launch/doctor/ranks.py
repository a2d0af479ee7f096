"""Checks across ranks: the same code and packages, one GPU each, clocks, and the speed of all-reduce."""

from __future__ import annotations

import hashlib
import math
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.distributed as dist

from launch.doctor.findings import Finding
from settings import counted
from settings.project import ROOT
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.git_state import packages
from trainer.rendezvous import gpu_of

_SKEW_S = 1.0
_SLOW_GBS = 10.0  # of NCCL; even PCIe 4.0 has more, sockets over Ethernet have less
_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}


@dataclass(frozen=True)
class Facts:
    """Facts about one rank.

    Attributes:
        rank, host, device: which one, and where.
        gpu: identifies its GPU among all others: see :func:`trainer.rendezvous.gpu_of`.
        software: Python and packages.
        code: hash of the project's Python files, without tests.
        clock_s: its clock right after a barrier.
    """

    rank: int
    host: str
    device: str
    gpu: str
    software: str
    code: str
    clock_s: float


def facts(world: World) -> Facts:
    """This rank's facts; collective, because of the clock."""
    code = hashlib.sha256()
    for path in sorted(path for package in packages() for path in package.rglob("*.py")):
        code.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    software = f"Python {platform.python_version()}, torch {torch.__version__}, deepspeed {version('deepspeed')}"
    world.barrier()  # the first connects the ranks
    world.barrier()
    where = (socket.gethostname(), str(world.device), gpu_of(world.device))
    return Facts(world.rank, *where, software, code.hexdigest()[:12], time.time())


def same_everywhere(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Whether code and packages are the same on all ranks."""
    for name, field in (("code", "code"), ("software", "software")):
        groups: dict[str, list[Facts]] = {}
        for one in ranks:
            groups.setdefault(getattr(one, field), []).append(one)
        if len(groups) == 1:
            yield Finding(name, "ok", f"the same on all {len(ranks)} ranks ({next(iter(groups))})")
            continue
        values = "; ".join(
            f"{value} on {', '.join(sorted({f.host for f in there}))} (rank {there[0].rank}"
            f"{f' and {len(there) - 1} more' if len(there) > 1 else ''})"
            for value, there in groups.items()
        )
        remedy = "start from one checkout and one environment on a shared disk, or copy both to every node again"
        yield Finding(name, "error", f"ranks differ: {values}", remedy)


def devices(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Where the ranks compute; that ranks of one host share no GPU was checked at rendezvous."""
    hosts = len({one.host for one in ranks})
    here = f"{counted(len(ranks), 'rank')} on {counted(hosts, 'host')}, {ranks[0].device.split(':')[0]}"
    first: dict[str, Facts] = {}
    for one in ranks:
        other = first.setdefault(one.gpu, one)
        if other is not one and one.device.startswith("cuda"):
            what = f"{here}: rank {other.rank} on {other.host} and rank {one.rank} on {one.host} share GPU {one.gpu}"
            remedy = "give each container GPUs of its own (docker run --gpus device=N)"
            yield Finding("ranks", "warning", what, remedy)
            return
    yield Finding("ranks", "ok", here)


def clocks(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """How far the clocks are apart, including the spread of the barrier itself."""
    first, last = (pick(ranks, key=lambda one: one.clock_s) for pick in (min, max))
    skew = last.clock_s - first.clock_s
    if skew > _SKEW_S:
        what = f"{last.host} is {skew:.1f} s ahead of {first.host}; times in logs and heartbeats would be wrong"
        yield Finding("clocks", "warning", what, "run chronyd or ntpd on every node")
    else:
        yield Finding("clocks", "ok", f"within {skew * 1e3:.0f} ms")


def batch(config: StageConfig, world: World) -> Iterator[Finding]:
    """Whether the global batch can be split over the ranks.

    Raises:
        ValueError: if not, with the config's own message.
    """
    count = config.accumulation(world.size)
    what = f"{config.train.global_batch_samples} samples are {counted(count, 'micro-batch', 'micro-batches')} of"
    shared = config.deepspeed.sequence_parallel
    where = f"each of {counted(world.size, 'rank')}"
    if shared > 1:
        where = f"each of {counted(world.size // shared, 'group')} of {shared} ranks that share their windows"
    yield Finding("batch", "ok", f"{what} {config.train.micro_batch_samples} on {where}")


def all_reduce(world: World) -> Iterator[Finding]:
    """Latency of a small all-reduce and bandwidth of a large one; collective."""
    latency_s = _median_s(torch.zeros(1, device=world.device), 20)
    count = _BYTES[world.device.type]
    seconds = _median_s(torch.zeros(count // 4, device=world.device), 5)
    slowest = torch.tensor([latency_s, seconds], dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    latency_s, seconds = slowest.tolist()
    # What crosses each link in a ring: 2 (N - 1) / N of the tensor, NCCL's "bus bandwidth".
    yield judge_all_reduce(2 * (world.size - 1) / world.size * count / seconds, latency_s, count, world.device.type)


def judge_all_reduce(bandwidth: float, latency_s: float, count: int, device: str) -> Finding:
    """The finding on ``bandwidth`` bytes a second for ``count`` bytes."""
    what = f"{bandwidth / 1e9:.3g} GB/s a rank ({count // 2**20} MiB), latency {latency_s * 1e6:,.0f} us"
    if device == "cuda" and bandwidth < _SLOW_GBS * 1e9:
        remedy = (
            "NCCL_DEBUG=INFO names the transport; NET/Socket means no InfiniBand: set NCCL_IB_HCA, NCCL_SOCKET_IFNAME"
        )
        return Finding("all-reduce", "warning", what, remedy)
    return Finding("all-reduce", "ok", what)


def _median_s(tensor: torch.Tensor, times: int) -> float:
    """Seconds of one all-reduce of ``tensor``, the median."""
    seconds = [math.inf]
    for number in range(times + 1):
        if tensor.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        if number:  # the first connects the ranks
            seconds.append(time.perf_counter() - started)
    return sorted(seconds)[times // 2]
