"""What a stage of the demo shows: the lines of its command, and its progress below them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

_SILENCE_S = 5.0
"""In a log, a status line is printed when a command has been silent for this long."""
_STEPS = "{desc} {percentage:3.0f}% |{bar:24}| step {n_fmt} of {total_fmt}, {elapsed}"
_CLOCK = "{desc} {elapsed}"


class Screen:
    """Lines with a progress bar below on a terminal; in a log, a status line now and then during silence.

    Args:
        title: a word or two for what runs.
        steps: total number; 0 if it has no steps.
        step: returns how many are done.
    """

    def __init__(self, title: str, steps: int = 0, step: Callable[[], int] = lambda: 0):
        self._title, self._step, self._first = title, step, step()
        self._started_s = self._said_s = time.monotonic()
        self._bar = tqdm(
            desc=f"  {title}",
            total=steps or None,
            bar_format=_STEPS if steps else _CLOCK,
            disable=not sys.stdout.isatty(),
            leave=False,
            file=sys.stdout,
            dynamic_ncols=True,
        )

    @property
    def took_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    @property
    def has_advanced(self) -> bool:
        """True once more steps are done than at the start."""
        return self._step() > self._first

    def line(self, text: str) -> None:
        """Show a line of the command."""
        self._show(text)

    def tick(self) -> None:
        """Show the progress; to be called several times a second."""
        if not self._bar.disable:
            self._bar.n = self._step() if self._bar.total else 0
            self._bar.refresh()
        elif time.monotonic() - self._said_s > _SILENCE_S:
            self._show(f"... {self._title}, {self.took_s:.0f} s")

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def _show(self, text: str) -> None:
        tqdm.write(f"  {text}", file=sys.stdout)
        sys.stdout.flush()
        self._said_s = time.monotonic()
