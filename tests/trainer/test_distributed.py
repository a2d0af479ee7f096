"""Who we are under each launcher, and the collectives of a world of one."""

from __future__ import annotations

import os
import resource
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer import distributed
from trainer.distributed import World, _from_slurm, first_host

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
    # The job is larger than the step.
    "SLURM_NTASKS": "12",
    "SLURM_TASKS_PER_NODE": "4(x3)",
    "SLURM_JOB_NODELIST": "gpu[06-08]",
}
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that no launcher has touched."""
    for name in [*RANKS, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what _from_slurm sets is undone, too
        monkeypatch.delenv(name)
    return monkeypatch


def _ranks() -> dict[str, str]:
    return {name: os.environ[name] for name in RANKS if name in os.environ}


def test_srun_gives_ranks_and_a_place_to_meet(bare: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        bare.setenv(name, value)
    _from_slurm()
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07"}
    assert _ranks() == {**expected, "MASTER_PORT": str(20_000 + 123456 % 40_000)}


def test_every_rank_of_a_job_meets_at_the_same_port_and_two_jobs_do_not(bare: pytest.MonkeyPatch) -> None:
    ports = []
    for job, rank in (("17", "0"), ("17", "7"), ("18", "0")):
        for name, value in {**SLURM, "SLURM_PROCID": rank, "SLURM_JOB_ID": job}.items():
            bare.setenv(name, value)
        for name in RANKS:
            bare.delenv(name, raising=False)
        _from_slurm()
        ports.append(int(os.environ["MASTER_PORT"]))
    assert ports[0] == ports[1] != ports[2] and all(1024 < port < 65536 for port in ports)


def test_what_a_launcher_has_set_stays(bare: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "RANK": "0", "MASTER_ADDR": "here"}.items():
        bare.setenv(name, value)
    _from_slurm()
    assert _ranks() == {"RANK": "0", "MASTER_ADDR": "here"}


def test_a_meeting_place_that_the_user_gave_stays(bare: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "MASTER_ADDR": "ib-host", "MASTER_PORT": "29500"}.items():
        bare.setenv(name, value)
    _from_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"]) == ("ib-host", "29500", "5")


def test_a_batch_script_is_one_process_whatever_the_size_of_its_job(bare: pytest.MonkeyPatch) -> None:
    """SLURM sets SLURM_PROCID and the job's task count there, too."""
    for name, value in {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        if not name.startswith("SLURM_STEP"):
            bare.setenv(name, value)
    _from_slurm()
    assert _ranks() == {}


def test_without_slurm_nothing_is_set(bare: pytest.MonkeyPatch) -> None:
    _from_slurm()
    assert _ranks() == {}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[9]", "gpu9"),
        ("gpu[9,11-12]", "gpu9"),
        ("login,gpu[03-05]", "login"),
        ("a-1,b-2", "a-1"),
        ("p4d-dy-node-[1-16]", "p4d-dy-node-1"),
        ("node[001-128].cluster", "node001.cluster"),
        ("rack[0-1]n[02-04]", "rack0n02"),
        ("n[1-2]-ib,m[3-4]", "n1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_a_world_of_one_answers_itself(world: World) -> None:
    value: Any = {"a": 1}
    assert (world.rank, world.size, world.local_rank, world.local_size, world.is_main) == (0, 1, 0, 1, True)
    assert world.all_gather_objects(value) == [value] and world.broadcast_object(value) is value
    numbers = torch.tensor([1.0, 2.0])
    assert world.all_reduce_sum(numbers) is numbers and numbers.tolist() == [1.0, 2.0]
    world.barrier()


@pytest.mark.parametrize(("visible", "device"), [(4, 3), (1, 0), (2, 1)])
def test_a_rank_takes_its_gpu_or_the_only_one_it_sees(bare: pytest.MonkeyPatch, visible: int, device: int) -> None:
    """No GPU is needed: who would be bound to what."""
    calls: list[Any] = []
    bare.setattr(distributed, "uses_cuda", lambda: True)
    bare.setattr(torch.cuda, "device_count", lambda: visible)
    bare.setattr(torch.cuda, "set_device", calls.append)
    fake = SimpleNamespace(init_distributed=lambda backend, timeout, verbose: calls.append((backend, timeout)))
    bare.setattr(distributed, "import_deepspeed", lambda: fake)
    bare.setattr(distributed, "meet", lambda *given: calls.append(given))
    for name, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        bare.setenv(name, value)
    bare.setenv("LOCAL_SIZE", "4")
    assert distributed.join(90.0) == World(7, 8, device, 4, torch.device("cuda", device))
    bound = torch.device("cuda", device)
    assert calls == [bound, (7, 8, "nccl", 90.0, bound), ("nccl", timedelta(seconds=90))]
    assert os.environ["LOCAL_RANK"] == str(device)  # DeepSpeed reads it, too


def test_open_files_are_raised_to_what_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for limits, expected in (
        ((1024, 4096), [(4096, 4096)]),
        ((1024, resource.RLIM_INFINITY), [(65_536, resource.RLIM_INFINITY)]),
        ((70_000, 70_000), []),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), []),
    ):
        made: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda _, wanted, made=made: made.append(wanted))
        distributed._raise_open_files()
        assert made == expected
