"""A tracker that is slow, gone, hangs or says no costs a run nothing but what the tracker would have shown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from trainer.monitor.trackers import sender as module
from trainer.monitor.trackers.interface import UnreachableError
from trainer.monitor.trackers.sender import TrackerSender


class Fake:
    """Takes everything, once ``before`` a call has not raised."""

    name = "fake"

    def __init__(self, before: Callable[[str], None] = lambda method: None):
        self.taken: list[tuple[Any, ...]] = []
        self._before = before

    def __getattr__(self, method: str) -> Callable[..., None]:
        def take(*arguments: Any) -> None:
            self._before(method)
            self.taken.append((method, *arguments))

        return take


def _close(sender: TrackerSender, within_s: float = 5.0) -> float:
    """Seconds that closing has waited."""
    began_s = time.monotonic()
    sender.begin_close("ended")
    sender.end_close(began_s + within_s)
    return time.monotonic() - began_s


def test_reports_arrive_in_their_order_and_the_end_waits_for_them() -> None:
    said: list[str] = []
    tracker = Fake(lambda method: time.sleep(0.02))
    sender = TrackerSender(tracker, said.append)
    sender.send("open", "a run")
    for step in range(5):
        sender.send("scalars", step, {"train/loss": 1.0})
    _close(sender)
    assert [taken[0] for taken in tracker.taken] == ["open", *["scalars"] * 5, "close"]
    assert [taken[1] for taken in tracker.taken[1:6]] == [0, 1, 2, 3, 4] and tracker.taken[-1] == ("close", "ended")
    assert said == [] and sender.lost == 0


def test_one_that_accepts_and_never_answers_neither_slows_nor_holds_up_the_run() -> None:
    said: list[str] = []
    never = threading.Event()
    sender = TrackerSender(Fake(lambda method: never.wait()), said.append, room=10)  # type: ignore[arg-type, return-value]
    began_s = time.monotonic()
    for step in range(1000):
        sender.send("scalars", step, {"train/loss": 1.0})
    assert time.monotonic() - began_s < 10  # one that waited would never come back
    assert 0.2 < _close(sender, within_s=0.3) < 10
    full, end = said
    assert full.startswith(
        "tracker fake accepts no reports: 10 are queued and further ones are dropped; the run goes on"
    )
    assert end.startswith("1,001 reports did not reach tracker fake; metrics.jsonl")  # the last is that it has ended
    assert sender._thread.daemon
    never.set()


def test_one_that_comes_back_gets_what_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    said: list[str] = []
    away = threading.Event()
    away.set()

    def before(method: str) -> None:
        if away.is_set():
            raise UnreachableError("http://somewhere:5000")

    tracker = Fake(before)
    sender = TrackerSender(tracker, said.append)
    for step in range(3):
        sender.send("scalars", step)
    time.sleep(0.1)
    away.clear()
    while len(tracker.taken) < 3 or sender._failing:
        time.sleep(0.01)
    _close(sender)
    assert [taken[1] for taken in tracker.taken[:3]] == [0, 1, 2] and sender.lost == 0
    assert said == [
        "tracker fake does not answer (http://somewhere:5000); reports are queued, and the run goes on",
        "tracker fake answers again",
    ]


def test_one_that_comes_back_at_the_end_is_closed_though_its_queue_was_full() -> None:
    said: list[str] = []
    asked, back = threading.Event(), threading.Event()

    def before(method: str) -> None:
        asked.set()
        if not back.is_set():
            raise UnreachableError("http://somewhere:5000")

    tracker = Fake(before)
    sender = TrackerSender(tracker, said.append, room=3)
    sender.send("scalars", 0)
    assert asked.wait(60)
    for step in range(1, 6):  # the first waits to be tried again, three find room
        sender.send("scalars", step)
    back.set()
    assert _close(sender, within_s=60) < 5
    assert tracker.taken == [*(("scalars", step) for step in range(4)), ("close", "ended")]
    assert sender.lost == 2 and said[-1].startswith("2 reports did not reach tracker fake;")


def test_the_end_does_not_wait_for_one_that_is_gone() -> None:
    said: list[str] = []

    def before(method: str) -> None:
        raise UnreachableError("http://somewhere:5000")

    sender = TrackerSender(Fake(before), said.append)
    for step in range(50):
        sender.send("scalars", step)
    assert _close(sender, within_s=60) < 5
    assert said[1].startswith("51 reports did not reach tracker fake;") and len(said) == 2


def test_a_report_that_is_refused_is_lost_alone() -> None:
    said: list[str] = []

    def before(method: str) -> None:
        if method == "image":
            raise ValueError("no such colour\nand more")

    tracker = Fake(before)
    sender = TrackerSender(tracker, said.append)
    for method in ("open", "image", "image", "scalars"):
        sender.send(method)
    _close(sender)
    assert [taken[0] for taken in tracker.taken] == ["open", "scalars", "close"]
    assert said[0] == "tracker fake did not take image (ValueError: no such colour); the run goes on"
    assert [line for line in said if "did not" in line][1:] == [
        "2 reports did not reach tracker fake; metrics.jsonl and the run folder have them all"
    ]


def test_one_that_cannot_be_opened_is_left_alone() -> None:
    said: list[str] = []
    asked: list[str] = []

    def before(method: str) -> None:
        asked.append(method)
        raise PermissionError("401: wrong key")

    sender = TrackerSender(Fake(before), said.append)
    for method in ("open", "files", "scalars"):
        sender.send(method)
    assert _close(sender, within_s=60) < 5
    assert asked == ["open"]
    assert said[0] == "tracker fake cannot be used (PermissionError: 401: wrong key); the run goes on"
    assert said[1].startswith("4 reports did not reach tracker fake;")
