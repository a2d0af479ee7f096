"""What failures cost: against figures worked out by hand."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.plan import __main__ as plan
from launch.plan.goodput import NODE_MTBF_DAYS, Failures, interval_s, save_s
from launch.plan.memory_model import checkpoint_bytes
from launch.plan.workload import read_workload

HOURS_3 = 3 * 3600.0
LARGE = str(Path(__file__).parent / "large.yaml")


@pytest.mark.parametrize(
    ("restart_s", "stall_s", "write_s", "interval_s", "lost"),
    [
        # A stall of 900 s, a wait of 660 s, SLURM's 120 s in the queue, 240 s to start: (5000 + 1920) / 10800.
        (900 + 660 + 120 + 240, 0, 0, 10_000, 0.641),
        (240, 10, 0, 500, 0.0654),  # 10 / 500 + (250 + 240) / 10800
        (240, 10, 0, 458, 0.0653),
        (0, 0, 0, 10_800, 0.5),
        (0, 0, 1080, 10_800, 0.6),  # what is still being written is redone, too
        (600, 100, 0, 1000, 0.2019),
        (9000, 10, 0, 10_000, 1.0),  # never more than all of it
    ],
)
def test_the_share_of_time_lost(
    restart_s: float, stall_s: float, write_s: float, interval_s: float, lost: float
) -> None:
    assert Failures(HOURS_3, restart_s, stall_s, write_s).lost(interval_s) == pytest.approx(lost, rel=2e-3)


def test_the_best_interval_is_daly_s_and_loses_least() -> None:
    failures = Failures(HOURS_3, 240, 10)
    assert failures.best_interval_s == pytest.approx(458.1, abs=0.1)  # about 46 steps of 10 s
    assert round(failures.best_interval_s / 10) == 46
    best = failures.lost(failures.best_interval_s)
    assert all(failures.lost(seconds) > best - 1e-5 for seconds in range(100, 2000, 10))
    assert Failures(100, 240, 300).best_interval_s == 100  # saving takes longer than the machine lasts


def test_the_default_is_what_llama_3_met() -> None:
    assert pytest.approx(54 * 2048 / 419, abs=0.1) == NODE_MTBF_DAYS


@pytest.mark.parametrize(("stage", "share"), [(0, 1.0), (3, 1 / 64)])
def test_the_fullest_rank_decides_how_long_a_save_stalls(stage: int, share: float) -> None:
    workload = read_workload(LARGE, [f"deepspeed.zero_stage={stage}", "train.precision=bf16"])
    stall_s, write_s = save_s(workload, 64, disk_gbs=2.0)
    size = checkpoint_bytes(workload, stage)
    assert stall_s == pytest.approx(share * size / 10e9) and write_s == pytest.approx(size / 2e9)
    waits = read_workload(LARGE, ["train.checkpoint.background=false", f"deepspeed.zero_stage={stage}"])
    assert save_s(waits, 64, disk_gbs=2.0)[1] == 0


def test_steps_or_minutes_whichever_is_sooner() -> None:
    every = "train.checkpoint.every_steps=100"
    assert interval_s(read_workload(LARGE, [every]), 3.0) == 300
    assert interval_s(read_workload(LARGE, [every, "train.checkpoint.every_minutes=2"]), 3.0) == 120
    assert interval_s(read_workload(LARGE, [every, "train.checkpoint.every_minutes=20"]), 3.0) == 300


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command says of failures, in one line."""

    def call(*options: Any) -> str:
        arguments = ["launch.plan", LARGE, "--gpus", "64", "--gpu", "h100-80g", *map(str, options)]
        monkeypatch.setattr(sys, "argv", arguments)
        assert plan.main() == 0
        found = re.search(r"^failures.*\n.*\n.*$", capsys.readouterr().out, re.MULTILINE)
        assert found is not None
        return " ".join(found[0].split())

    return call


def test_the_plan_tells_what_failures_cost(told: Callable[..., str]) -> None:
    usual = told()
    assert "one every 33 d 0 h if a node fails every 264 days, 240 s to the next step" in usual
    worse = told("--node-mtbf-days", 1, "--restart-s", 600, "--save-stall-s", 10)
    assert "one every 3 h 0 min if a node fails every 1 days, 600 s to the next step" in worse
    assert "for which training waits 10 s" in worse and "train.checkpoint.every_minutes=7.6" in worse


def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--node-mtbf-days", "--restart-s", "--save-stall-s"]
    for option in options:
        for value in ("0", "inf", "nan"):
            monkeypatch.setattr(sys, "argv", ["launch.plan", LARGE, "--gpus", "64", "--gpu", "h100-80g", option, value])
            with pytest.raises(SystemExit):
                plan.main()
            told = f"argument {option}: must be a number above 0, at most 1e+12, got '{value}'"
            assert told in capsys.readouterr().err
