"""What stops a run besides its end: signals, and steps that went bad."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from trainer.retention import newest_name

EXIT_PREEMPTED = 75
"""Exit status of a run that was asked to stop, saved its state and wants to be started again (EX_TEMPFAIL)."""


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C until the ranks can agree on them; a second Ctrl-C ends at once.

    The handler only sets a flag: launchers deliver the signal to one rank after the other, so a collective inside a
    handler would wait for ranks that never got it. The flag travels in the step's own all-reduce.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def too_many_bad_steps(count: int, step: int, checkpoints: Path) -> str:
    """The sentence that a run ends with after ``count`` bad steps in a row."""
    return (
        f"{count} steps in a row up to step {step} had a loss or gradient that is not finite "
        "(train.max_bad_steps); lower train.optimizer.lr, pass over the samples named above with data.skip_ranges, or "
        f"look for a broken device if it is always the same rank; resume with train.checkpoint.resume=required: "
        f"{newest_name(checkpoints)}"
    )
