"""Turns: one contestant steps at a time, what it reports arrives, and one that ends early is named with its words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.common.turns import Turns

WORKER = """
import sys, time
from bench.common.turns import Turn, TurnsOverError

port, name, rank, pause_s = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
turn, step, stepped = Turn(port, name, rank), 0, []

def report():
    told = {"steps": list(stepped), "rank": rank}
    stepped.clear()
    return told

try:
    while True:
        turn.begin(step, report)
        time.sleep(pause_s)
        stepped.append(time.monotonic())
        step += 1
        if step == 5:
            raise SystemExit("error: no more than four")
except TurnsOverError:
    pass
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """Start a contestant of one rank that only sleeps; returns what :meth:`Turns.start` does."""

    def begin(turns: Turns, name: str, pause_s: float) -> tuple[float, list[dict[str, Any]]]:
        command = [sys.executable, "-c", WORKER, str(turns.port), name, "0", str(pause_s)]
        return turns.start(name, command, dict(os.environ), 1, tmp_path / f"{name}.log")

    return begin


def test_each_takes_its_steps_alone_and_is_timed(start: Callable[..., Any]) -> None:
    with Turns() as turns:
        for name, pause_s in (("quick", 0.01), ("slow", 0.2)):
            startup_s, reports = start(turns, name, pause_s)
            assert startup_s > 0 and reports == [{"steps": [], "rank": 0, "steps_s": []}]
        spans = []
        for name in ("quick", "slow", "quick"):
            before = time.monotonic()
            elapsed_s, (told,) = turns.give(name, 2)
            spans.append((before, time.monotonic(), told["steps"]))
            assert len(told["steps_s"]) == 2
            assert sum(told["steps_s"]) <= elapsed_s
            assert elapsed_s > 2 * (0.2 if name == "slow" else 0.01)
        for first, last, moments in spans:
            assert len(moments) == 2 and all(first < moment < last for moment in moments)
        turns.end()
        assert [c.process.returncode for c in turns.contestants.values()] == [0, 0]


def test_one_that_ends_is_named_with_its_last_words(start: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^early: error: no more than four$"), Turns() as turns:
        start(turns, "early", 0.0)
        turns.give("early", 5)


def test_none_is_left_behind(start: Callable[..., Any]) -> None:
    with pytest.raises(KeyboardInterrupt), Turns() as turns:
        start(turns, "left", 60.0)
        process: subprocess.Popen[bytes] = turns.contestants["left"].process
        raise KeyboardInterrupt
    assert process.returncode is not None


def test_one_that_does_not_end_is_named(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.common.turns._TO_END_S", 0.2)
    with pytest.raises(ValueError, match=r"^stuck did not end within 0 s"), Turns() as turns:
        start(turns, "stuck", 0.0)
        os.kill(turns.contestants["stuck"].process.pid, signal.SIGSTOP)
        turns.end()
