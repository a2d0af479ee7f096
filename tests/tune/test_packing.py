"""Packing: every example once, no window too full, little padding, the same every time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tune.packing import Windows, pack


def lists(windows: Windows) -> list[list[int]]:
    return [windows[number].tolist() for number in range(len(windows))]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("room", [1, 7, 64])
def test_every_example_once_and_no_window_too_full(room: int, together: bool) -> None:
    lengths = np.random.default_rng(room).integers(1, room + 1, size=300)
    windows = pack(lengths, room, together)
    assert sorted(windows.members.tolist()) == list(range(300))
    assert [member for members in lists(windows) for member in members] == windows.members.tolist()
    for members in lists(windows):
        assert len(members) >= 1 and lengths[members].sum() <= room
        assert members == sorted(members)
        assert together or len(members) == 1


def test_a_known_packing() -> None:
    # 6 alone leaves 4, which the first 4 fills; 5 and 3 leave 2, which fits none of what is left.
    assert lists(pack(np.array([4, 6, 3, 5, 4]), 10)) == [[0, 1], [3, 4], [2]]
    assert lists(pack(np.array([], np.int64), 10)) == []


def test_the_same_windows_every_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size=500)
    first, second = pack(lengths, 64), pack(lengths.copy(), 64)
    assert np.array_equal(first.members, second.members) and np.array_equal(first.starts, second.starts)


def test_well_filled_and_fast() -> None:
    lengths = np.random.default_rng(0).geometric(1 / 60, size=50_000).clip(1, 512)
    start = time.perf_counter()
    windows = pack(lengths, 512)
    assert time.perf_counter() - start < 5
    # No packing has fewer windows than the inputs fill: within one of that is as good as it gets.
    assert len(windows) <= -(-int(lengths.sum()) // 512) + 1
