"""Ranks that cannot meet say so in one sentence, with who is awaited and where; status 1, never "start again"."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment
from trainer import rendezvous
from trainer.rendezvous import rank_numbers

PROGRAM = """
import os, sys
from settings import user_errors
with user_errors():
    from trainer import rendezvous
    rendezvous.QUIET_S = 1.0
    import torch
    rank, size, _ = rendezvous.rank_numbers()
    if "GPU" in os.environ:
        rendezvous.gpu_of = lambda device: os.environ["GPU"]
    rendezvous.meet(rank, size, "gloo", float(sys.argv[1]), torch.device("cpu"))
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    print("met", int(total))
"""


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def meet(ranks: list[dict[str, str]], timeout_s: float = 5.0, **common: str) -> list[subprocess.CompletedProcess[str]]:
    """One process for each of ``ranks``' variables; they do not share a launcher."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", **common}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(timeout_s)],
            cwd=ROOT,
            env=environment() | common | {"LOCAL_RANK": own["RANK"], **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in ranks
    ]
    done = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err, err[-2000:]
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def errors(done: list[subprocess.CompletedProcess[str]]) -> set[str]:
    assert all(one.returncode == 1 for one in done), [one.stderr for one in done]
    return {line.partition("error: ")[2] for one in done for line in one.stderr.splitlines() if "error: " in line}


def test_who_is_there_meets() -> None:
    done = meet([{"RANK": "0"}, {"RANK": "1"}], timeout_s=60)
    assert [one.stdout for one in done] == ["met 2\n", "met 2\n"], [one.stderr for one in done]


def test_the_rank_that_does_not_come_is_named_within_seconds() -> None:
    port = free_port()
    (alone,) = meet([{"RANK": "0"}], MASTER_PORT=port, WORLD_SIZE="3", timeout_s=3)
    assert f"waiting: ranks 1, 2 of 3 awaited at 127.0.0.1:{port}, for up to 3 s" in alone.stderr
    (sentence,) = errors([alone])
    assert sentence.startswith(f"the ranks cannot meet: ranks 1, 2 of 3 awaited at 127.0.0.1:{port}, but missing")
    assert "start as many processes as WORLD_SIZE says" in sentence and "start again" not in sentence


def test_two_with_one_number_and_two_counts() -> None:
    (sentence,) = errors(meet([{"RANK": "0"}, {"RANK": "1"}, {"RANK": "1"}], WORLD_SIZE="3"))
    assert "two processes have RANK=1, on " in sentence and "give every process a number of its own" in sentence
    (sentence,) = errors(meet([{"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "4"}], timeout_s=20))
    assert "WORLD_SIZE" in sentence and "make them the same on all hosts" in sentence


def test_a_rank_without_a_gpu_and_two_on_one_are_named() -> None:
    (sentence,) = errors(meet([{"RANK": "0", "GPU": "a"}, {"RANK": "1", "GPU": "none"}], timeout_s=60))
    assert sentence.startswith(f"the ranks cannot meet: rank 1 on {platform.node()} is without a GPU that can be used")
    (sentence,) = errors(meet([{"RANK": "0"}, {"RANK": "1"}], GPU="a", timeout_s=60))
    assert sentence.startswith(f"the ranks cannot meet: ranks 0, 1 on {platform.node()} are on the same GPU")


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ([("a", "none"), ("b", "none")], None),
        ([("a", "x"), ("a", "y"), ("b", "z")], None),
        ([("a", "x"), ("b", "x")], None),  # two containers: slow, and launch.doctor says so
        ([("a", "x"), ("b", "none"), ("b", "none"), ("c", "none")], "ranks 1, 2 on b and others on another host are"),
        ([("a", "x"), ("b", "y"), ("b", "z"), ("b", "y")], "ranks 1, 3 on b are on the same GPU, but NCCL"),
        ([(host, "x") for host in "aabbcc"], "ranks 0, 1 on a and others on 2 more hosts are on the same"),
    ],
)
def test_devices_that_do_not_go_together(places: list[tuple[str, str]], sentence: str | None) -> None:
    found = rendezvous._unlike_devices(places)
    assert found is None if sentence is None else str(found).startswith(sentence)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 must be a number from 1 to 65535"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x must be a number"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR=no-such-host.invalid is a name that "),
        ({"GLOO_SOCKET_IFNAME": "nope0"}, "GLOO_SOCKET_IFNAME=nope0 is not a network interface of "),
    ],
)
def test_a_place_that_is_none(variables: dict[str, str], sentence: str) -> None:
    (found,) = errors(meet([{"RANK": "0"}], **variables))
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    ("numbers", "message"), [(("x", "2", "0"), "whole numbers"), (("2", "2", "0"), "RANK must be below WORLD_SIZE=2")]
)
def test_numbers_that_no_launcher_gives(
    numbers: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), numbers, strict=True):
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(ValueError, match=message):
        rank_numbers()
