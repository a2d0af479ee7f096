"""Loading ahead: order, depth, errors, leaving early, and what the consumer waited."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from data.prefetch import prefetch


def test_items_come_in_order_and_end() -> None:
    items = prefetch(range(100), depth=3)
    assert list(items) == list(range(100))
    assert list(items) == []


def test_error_comes_at_its_place_and_only_once() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("shard-00007.bin is damaged")

    items = prefetch(broken(), depth=5)
    assert (next(items), next(items)) == (1, 2)
    with pytest.raises(ValueError, match="shard-00007"):
        next(items)
    assert list(items) == []


def test_runs_ahead_no_further_than_depth() -> None:
    taken: list[int] = []

    def counting() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with prefetch(counting(), depth=2) as items:
        next(items)
        time.sleep(0.3)
        assert len(taken) <= 1 + 2 + 1  # one consumed, two ready, one in hand


def test_waiting_is_measured() -> None:
    def slow() -> Iterator[int]:
        asked.wait()
        time.sleep(0.5)
        yield from range(3)

    asked = threading.Event()
    waiting = prefetch(slow(), depth=1)
    items = iter(waiting)
    asked.set()
    assert list(items) == [0, 1, 2] and waiting.waited_s >= 0.3


def test_what_is_ready_is_not_waited_for() -> None:
    made = threading.Event()

    def all_made() -> Iterator[int]:
        yield from range(3)
        made.set()

    with prefetch(all_made(), depth=4) as items:
        assert made.wait(60)
        assert [next(items) for _ in range(3)] == [0, 1, 2] and items.waited_s == 0.0


def test_leaving_early_ends_the_thread() -> None:
    with prefetch(iter(int, 1), depth=1) as items:  # endless zeros
        next(items)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    assert list(items) == []
