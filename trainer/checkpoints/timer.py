"""When a checkpoint is due by the clock: ``train.checkpoint.every_minutes``."""

from __future__ import annotations

import time
from collections.abc import Callable


class SaveTimer:
    """Rank 0 asks it before every step; the others learn the answer from the step's all-reduce.

    Args:
        every_minutes: minutes between the beginnings of two saves; None for never.
        clock: seconds, monotonic.
    """

    def __init__(self, every_minutes: float | None, clock: Callable[[], float] = time.monotonic):
        self._every_s = float("inf") if every_minutes is None else 60 * every_minutes
        self._clock = clock
        self.restart()

    @property
    def due(self) -> bool:
        """Whether that much time has passed since the last save began, or since the start."""
        return self._clock() - self._since_s >= self._every_s

    def restart(self) -> None:
        """Called when a save begins, for whatever reason."""
        self._since_s = self._clock()
