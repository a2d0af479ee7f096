"""This process among all ranks: joining and leaving them, and the few collectives that the trainer calls itself.

Works under the ``deepspeed`` launcher, ``torchrun``, ``srun python -m`` and plain ``python`` (one process). SLURM sets
none of the variables that the rendezvous needs, so they are derived from its own here.
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
"""How long gloo's threads get to let go of the tensors of collectives that are over."""


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank, size: number of this process and how many there are.
        local_rank, local_size: the same within this machine.
        device: where this rank computes.
        sequence: the ranks that share their windows with this one, itself among them; None where every rank has whole
            ones.
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
        """Number among all those of which each has windows of its own: single ranks, or groups that share them."""
        return self.rank // self.ranks_a_window

    @property
    def data_size(self) -> int:
        """How many have windows of their own."""
        return self.size // self.ranks_a_window

    def sharing_windows(self, settings: DeepSpeedSettings, timeout_s: float) -> World:
        """The same, where neighbouring ranks share their windows as ``settings`` say; collective.

        Args:
            settings: of the run.
            timeout_s: how long a collective among them may wait.

        Raises:
            ValueError: the ranks do not divide into such groups.
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
        """Elementwise largest over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """The values that rank ``source`` has, on every rank, in place."""
        if self.size > 1:
            there = values.to(self.device)
            dist.broadcast(there, src=source)
            values.copy_(there)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """The flat ``values`` of every rank, one after the other, on every rank."""
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
"""One process on a CPU: for what reads and writes without ranks."""


def join(timeout_s: float, run: Path | None = None) -> World:
    """Meet the other ranks and bind this one to its device.

    Args:
        timeout_s: how long a collective may wait.
        run: the run folder, for what NCCL writes when one has waited longer.

    Raises:
        ValueError: they cannot meet.
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
        # With one GPU visible to each task, every task's GPU is its number 0.
        if local_rank >= torch.cuda.device_count():
            local_rank %= torch.cuda.device_count()
            os.environ["LOCAL_RANK"] = str(local_rank)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # Without this every rank takes all cores and they fight over them.
            torch.set_num_threads(max((os.cpu_count() or 1) // local_size, 1))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl":
        flight_recorder.enable(run)
    meet(rank, size, backend, timeout_s, device)
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=timeout_s), verbose=False)
    return World(rank, size, local_rank, local_size, device)


def leave() -> None:
    """Tear all process groups down, so that a finished run ends without warnings; all ranks together.

    One that leaves first would close connections that the others may still use. DeepSpeed's own function also drops the
    group of all ranks that DeepSpeed keeps. A group to which something still refers lives on with gloo's threads, and
    one of these that lets go of a tensor in the moment in which the interpreter begins to end aborts the process
    ("terminate called without an active exception"); they have done their last collective and get time to let go.
    """
    if dist.is_initialized():
        from deepspeed import comm

        dist.barrier()
        comm.destroy_process_group()
        gc.collect()
        threading.Event().wait(_SETTLE_S)  # without the interpreter lock, for which such a thread waits


def _from_slurm() -> None:
    """Under ``srun`` fill in RANK and its kin from the step's own variables; what a launcher has set already stays.

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
    """Sockets to every rank, files of a checkpoint: more than the 1,024 that many systems allow unless asked."""
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
