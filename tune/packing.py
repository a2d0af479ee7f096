"""Packs examples into windows with little padding.

Best fit decreasing: from the longest example to the shortest, each goes into the fullest window that still has room
for it, or into a new one. The windows depend on the lengths alone, so every process makes the same ones.

E: examples, W: windows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """W lists of examples, flat: a million small arrays would take more memory than the examples."""

    members: np.ndarray
    """int64 [E], the examples' numbers, window after window."""
    starts: np.ndarray
    """int64 [W + 1], where each window's members begin."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, window: int) -> np.ndarray:
        """The numbers of a window's examples, ascending: int64 [examples in it]."""
        return self.members[self.starts[window] : self.starts[window + 1]]


def pack(lengths: np.ndarray, room: int, together: bool = True) -> Windows:
    """Put examples of ``lengths`` inputs (int64 [E], each from 1 to ``room``) into windows of ``room`` inputs.

    An example of n ids has n - 1 inputs: its last id is only predicted. Every example is in one window; with
    ``together`` false, each has its own window.
    """
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= room
    if not together:
        return Windows(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    window_of = np.empty(len(lengths), np.int64)
    windows = 0
    # Windows with room left, by how much, and these rooms in ascending order: never more than `room` of them.
    open_windows: dict[int, list[int]] = {}
    rooms: list[int] = []
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        tightest = bisect_left(rooms, length)
        if tightest == len(rooms):
            window, left = windows, room - length
            windows += 1
        else:
            left = rooms[tightest]
            window = open_windows[left].pop()
            if not open_windows[left]:
                del open_windows[left], rooms[tightest]
            left -= length
        window_of[example] = window
        if left:
            if left not in open_windows:
                open_windows[left] = []
                insort(rooms, left)
            open_windows[left].append(window)
    starts = np.concatenate([[0], np.cumsum(np.bincount(window_of, minlength=windows))])
    return Windows(np.argsort(window_of, kind="stable"), starts)
