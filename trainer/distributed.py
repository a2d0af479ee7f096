"""The process group: joining and leaving it, and the few collectives that the trainer calls itself.

Works under the ``deepspeed`` launcher, ``torchrun``, ``srun python -m`` and plain ``python`` (one process). SLURM sets
none of the variables that the rendezvous needs, so they are derived here from those it does set.
"""

from __future__ import annotations

import gc
import os
import re
import resource
import threading
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import Batch
from model.sequence import SequenceGroup
from trainer import flight_recorder
from trainer.config_blocks import DeepSpeedSettings
from trainer.deepspeed_internals import import_deepspeed, uses_cuda
from trainer.rendezvous import meet, rank_numbers

_OPEN_FILES = 65_536
_SETTLE_S = 0.1
"""How long gloo's threads get to release the tensors of finished collectives."""


@dataclass(frozen=True)
class World:
    """This process's place among all ranks.

    Attributes:
        rank, size: this process's rank and the number of ranks.
        local_rank, local_size: the same within this machine.
        device: where this rank computes.
        sequence: this rank's sequence-parallel group, itself included; None where every rank has whole windows.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    sequence: SequenceGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes shared files."""
        return self.rank == 0

    @property
    def ranks_a_window(self) -> int:
        """How many ranks share a window."""
        return 1 if self.sequence is None else self.sequence.size

    @property
    def data_rank(self) -> int:
        """Data-parallel rank: the index of this rank, or of its sequence-parallel group."""
        return self.rank // self.ranks_a_window

    @property
    def data_size(self) -> int:
        """Data-parallel size: how many ranks, or groups, have windows of their own."""
        return self.size // self.ranks_a_window

    def sharing_windows(self, settings: DeepSpeedSettings, timeout_s: float) -> World:
        """This world with the sequence-parallel groups of neighbouring ranks that ``settings`` ask for; collective.

        Args:
            settings: the run's ``deepspeed`` block.
            timeout_s: timeout of collectives within a group.

        Raises:
            ValueError: if the ranks cannot be divided into such groups.
        """
        settings.groups(self.size)
        ranks = settings.sequence_parallel
        if ranks == 1:
            return self
        own, _ = dist.new_subgroups(ranks, timeout=timedelta(seconds=timeout_s))
        return replace(self, sequence=SequenceGroup(self.rank % ranks, ranks, own))

    def local_part(self, batch: Batch) -> Batch:
        """This rank's part of its group's ``batch``."""
        if self.sequence is None:
            return batch
        return batch.at(self.sequence.positions(batch.tokens.shape[1] // self.ranks_a_window))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true on some rank; on every rank."""
        return bool(self.all_reduce_max(torch.tensor(float(value), device=self.device)))

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """Broadcast rank ``source``'s values to every rank, in place."""
        if self.size > 1:
            there = values.to(self.device)
            dist.broadcast(there, src=source)
            values.copy_(there)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """The flat ``values`` of all ranks, concatenated in rank order, on every rank."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def all_gather_objects(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order, on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


ALONE = World(0, 1, 0, 1, torch.device("cpu"))
"""A single process on a CPU, for code that reads and writes without ranks."""


def join(timeout_s: float, run: Path | None = None) -> World:
    """Join the process group and bind this rank to its device.

    Args:
        timeout_s: timeout of collectives.
        run: the run folder, for what NCCL writes when a collective times out.

    Raises:
        ValueError: if the ranks cannot meet.
    """
    _from_slurm()
    _raise_open_files()
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, alone in environment.items():
        os.environ.setdefault(name, alone)
    rank, size, local_rank = rank_numbers()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    os.environ.setdefault("LOCAL_SIZE", str(local_size))
    deepspeed = import_deepspeed()
    if uses_cuda():
        # Where each task sees one GPU only, that GPU has index 0.
        if local_rank >= torch.cuda.device_count():
            local_rank %= torch.cuda.device_count()
            os.environ["LOCAL_RANK"] = str(local_rank)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # Otherwise every rank uses all cores, and they compete for them.
            torch.set_num_threads(max((os.cpu_count() or 1) // local_size, 1))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl":
        flight_recorder.enable(run)
    meet(rank, size, backend, timeout_s, device)
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=timeout_s), verbose=False)
    return World(rank, size, local_rank, local_size, device)


def leave() -> None:
    """Destroy all process groups, so that a finished run exits without warnings; collective.

    A rank that leaves first would close connections that others may still use. DeepSpeed's own function also drops
    DeepSpeed's reference to the group of all ranks. A group that is still referenced keeps gloo's threads alive, and a
    thread that releases a tensor just as the interpreter shuts down aborts the process ("terminate called without an
    active exception"). Their last collective is done, so they get a moment to release it.
    """
    if dist.is_initialized():
        from deepspeed import comm

        dist.barrier()
        comm.destroy_process_group()
        gc.collect()
        threading.Event().wait(_SETTLE_S)  # releases the GIL, which such a thread waits for


def _from_slurm() -> None:
    """Under ``srun`` set RANK and related variables from the step's own; what a launcher has already set is kept.

    Only ``srun`` sets the step's task count: a script or shell inside an allocation is one process, whatever the job's
    size, and a step may have fewer tasks and hosts than its job.
    """
    if "SLURM_STEP_NUM_TASKS" not in os.environ or "RANK" in os.environ:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault("LOCAL_WORLD_SIZE", _first_count(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")))
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 40_000))


def _raise_open_files() -> None:
    """Raise the open-file limit: sockets to every rank and checkpoint files exceed the usual default of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _first_count(tasks_per_node: str) -> str:
    """``4(x2),3`` -> ``4``."""
    return tasks_per_node.split(",")[0].split("(")[0]


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``gpu[03-05,9],login`` -> ``gpu03``, ``rack[0-1]n[2-4]`` -> ``rack0n2``."""
    entry = re.match(r"(\[[^]]*\]|[^,\[])*", nodelist)
    assert entry is not None
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", entry.group())
