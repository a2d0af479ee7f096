"""Rendezvous: all ranks register in one store, then create the process group.

    rank 0     listens at MASTER_ADDR:MASTER_PORT (under torchrun its agent does) and counts arrivals
    others     connect, and compare their set-up (WORLD_SIZE, torch) with that of the first rank to arrive
    the last   checks the devices of all ranks
    all        wait for one message: that everyone is present, or why they cannot meet

Any failure on the way is a mistake in the set-up (an address, an interface, a port, a count, a name, a version, a GPU),
so every rank ends with one sentence and status 1, never with "start again". After ten seconds rank 0 reports which
ranks are missing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

QUIET_S = 10.0
"""Seconds until a waiting rank reports what it waits for."""
_POLLED_S = 0.5
_NAMED = 8
_COME = "start as many processes as WORLD_SIZE says, and check that their hosts reach that address"
_TOGETHER = "all"
_NO_GPU = "none"


def rank_numbers() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this machine, as set by the launcher in the environment.

    Raises:
        ValueError: if they are not numbers, or are inconsistent.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in names)
    except ValueError:
        raise ValueError(
            f"{', '.join(f'{name}={os.environ[name]}' for name in names)} must be whole numbers; a launcher sets them "
            "(deepspeed, torchrun, srun), so start with one, or correct them"
        ) from None
    if not (0 <= rank < size and local_rank >= 0):
        raise ValueError(
            f"RANK={rank} and LOCAL_RANK={local_rank} must not be negative, and RANK must be below WORLD_SIZE={size}; "
            "correct the environment, or start with a launcher"
        )
    return rank, size, local_rank


def meet(rank: int, size: int, backend: str, timeout_s: float, device: torch.device) -> None:
    """Create the process group of all ranks.

    Args:
        rank, size: this process's rank and the number of ranks.
        backend: ``gloo`` or ``nccl``.
        timeout_s: seconds that ranks wait for each other, here and in every collective.
        device: this rank's.

    Raises:
        ValueError: if the ranks cannot meet.
    """
    _require_interface()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    place = f"{address}:{port}"
    try:
        store = _store(rank, size, address, _port(port, size), timeout_s)
        store.set(f"gpu/{rank}", gpu_of(device))
        _wait_for_all(store, rank, size, place, timeout_s)
        bound = device if device.type == "cuda" else None
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s), device_id=bound
        )
    except (dist.DistError, RuntimeError) as error:
        if rank and "Failed to recv" in str(error):
            raise ValueError(
                f"rank 0 at {place} has ended before all ranks had met; its last output says why"
            ) from error
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"the ranks cannot meet at {place} ({reason}); if another job uses that port, give the launcher another "
            "one: deepspeed --master_port N, torchrun --master-port N"
        ) from error


def _require_interface() -> None:
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in there:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME={name} is not a network interface of {platform.node()}, which has "
                f"{', '.join(there)}; name one of them, or unset the variable"
            )


def _port(text: str, size: int) -> int:
    least = 1 if size > 1 else 0  # a single rank may use any free port
    if not text.isdigit() or not least <= int(text) < 65_536:
        raise ValueError(f"MASTER_PORT={text} must be a number from 1 to 65535; correct it")
    return int(text)


def _store(rank: int, size: int, address: str, port: int, timeout_s: float) -> dist.Store:
    """Connect to the store that all ranks share."""
    _require_name(address, port, timeout_s)
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with _reported_after(f"rank {rank} of {size} on {platform.node()}: still connecting to rank 0 at {address}:{port}"):
        store = dist.TCPStore(address, port, size, serves, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    # An agent's store outlives a restart of its ranks.
    return dist.PrefixStore(f"meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _require_name(address: str, port: int, timeout_s: float) -> None:
    """Wait until the address resolves: a name server may take a while to know a new host."""
    until = time.monotonic() + min(timeout_s, QUIET_S)
    while True:
        try:
            socket.getaddrinfo(address, port)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"MASTER_ADDR={address} is a name that {platform.node()} cannot resolve ({error.strerror}); give "
                    "the launcher a name or an address of rank 0's host that all hosts know"
                ) from None
            time.sleep(1.0)


def _wait_for_all(store: dist.Store, rank: int, size: int, place: str, timeout_s: float) -> None:
    """Wait until every rank is here, or one of them says why they cannot meet."""
    problem = _problem(store, rank, size)
    here = store.add("here", 1)
    if problem is not None:
        store.compare_set("word", "", problem)
    elif here == size:
        store.compare_set("word", "", _unlike_devices(_places(store, size)) or _TOGETHER)
    start = time.monotonic()
    reported = False
    while not _comes(store, "word", start + (timeout_s if reported or rank else min(QUIET_S, timeout_s))):
        awaited = f"{_awaited(store, size)} of {size} awaited at {place}"
        if reported or timeout_s <= QUIET_S:
            store.compare_set("word", "", f"{awaited}, but missing after {timeout_s:g} s; {_COME}")
        else:
            print(f"waiting: {awaited}, for up to {timeout_s:g} s", file=sys.stderr, flush=True)
            reported = True
    word = store.get("word").decode()
    if word != _TOGETHER:
        _let_others_read(store, rank)
        raise ValueError(f"the ranks cannot meet: {word}")


def _comes(store: dist.Store, key: str, until_s: float) -> bool:
    """Wait for ``key``: True once it is set, False after ``until_s`` on the monotonic clock."""
    pause_s = 0.01
    while not store.check([key]):
        if time.monotonic() > until_s:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLLED_S)
    return True


def _let_others_read(store: dist.Store, rank: int) -> None:
    """Keep rank 0, and with it the store, alive until all ranks that are here have read the reason."""
    read = store.add("read", 1)
    until = time.monotonic() + 4 * _POLLED_S
    while rank == 0 and read < store.add("here", 0) and time.monotonic() < until:
        time.sleep(_POLLED_S / 10)
        read = store.add("read", 0)


def _problem(store: dist.Store, rank: int, size: int) -> str | None:
    """Register this rank; return how its set-up differs from that of the first rank to arrive, if it does."""
    host = platform.node()
    other = store.compare_set(f"host/{rank}", "", host).decode()
    if store.add(f"times/{rank}", 1) > 1:
        return f"two processes have RANK={rank}, on {other} and {host}; give every process a number of its own"
    for what, own in (("WORLD_SIZE", str(size)), ("torch", torch.__version__)):
        first = store.compare_set(what, "", own).decode()
        if first != own:
            return (
                f"rank {rank} on {host} has {what} {own}, but another rank has {first}; make them the same on all hosts"
            )
    return None


def gpu_of(device: torch.device) -> str:
    """An id that is unique among all GPUs; ``none`` for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else _NO_GPU


def _places(store: dist.Store, size: int) -> list[tuple[str, str]]:
    """Host and GPU of every rank, once all are there."""
    hosts, gpus = (store.multi_get([f"{what}/{rank}" for rank in range(size)]) for what in ("host", "gpu"))
    return [(host.decode(), gpu.decode()) for host, gpu in zip(hosts, gpus, strict=True)]


def _unlike_devices(places: Sequence[tuple[str, str]]) -> str | None:
    """Why ranks on these hosts and GPUs cannot work together (NCCL would hang or raise its own error), or None."""
    ranks_at: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        ranks_at.setdefault(place, []).append(rank)
    without = {host: ranks for (host, gpu), ranks in ranks_at.items() if gpu == _NO_GPU}
    if without and len(without) < len(ranks_at):
        return (
            f"{_on_hosts(without)} without a GPU that can be used, while others have one; start ranks on hosts with "
            "GPUs only (python -m launch.doctor there says what is wrong), or all with DS_ACCELERATOR=cpu"
        )
    shared = {host: ranks for (host, gpu), ranks in ranks_at.items() if gpu != _NO_GPU and len(ranks) > 1}
    if not shared:
        return None
    return (
        f"{_on_hosts(shared)} on the same GPU, but NCCL takes one rank per GPU; start as many ranks on a host as it "
        "has GPUs (deepspeed --num_gpus, torchrun --nproc-per-node, srun --ntasks-per-node), and see that "
        "CUDA_VISIBLE_DEVICES names each once"
    )


def _on_hosts(ranks_by_host: dict[str, list[int]]) -> str:
    """``ranks 4, 5 on node1 and 2 hosts more are``."""
    host, ranks = next(iter(ranks_by_host.items()))
    others = len(ranks_by_host) - 1
    more = f" and others on {'another host' if others == 1 else f'{others} more hosts'}" if others else ""
    return f"{_ranks(ranks)} on {host}{more} {'is' if len(ranks) == 1 and not others else 'are'}"


def _ranks(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(map(str, numbers[:_NAMED]))}{more}"


def _awaited(store: dist.Store, size: int) -> str:
    return _ranks([rank for rank in range(size) if not store.check([f"host/{rank}"])])


@contextlib.contextmanager
def _reported_after(sentence: str) -> Iterator[None]:
    timer = threading.Timer(QUIET_S, lambda: print(f"waiting: {sentence}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
