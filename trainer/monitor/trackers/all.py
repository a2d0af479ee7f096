"""All trackers of a run: each report goes to every one of them, through its own sender."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.monitor.trackers.interface import Opening, Tracker
from trainer.monitor.trackers.sender import TrackerSender

_PATIENCE_S = 60.0
"""How long a run that has done all its steps waits for its trackers."""
_SHORT_PATIENCE_S = 10.0
"""The same for one that was asked to stop or failed: whoever asked may not wait long."""


def make(name: str) -> Tracker:
    """The tracker ``name`` of ``train.log.trackers``; imports its library, which takes seconds."""
    if name == "wandb":
        from trainer.monitor.trackers.to_wandb import ToWandb

        return ToWandb()
    if name == "mlflow":
        from trainer.monitor.trackers.to_mlflow import ToMLflow

        return ToMLflow()
    from trainer.monitor.trackers.to_tensorboard import ToTensorBoard

    return ToTensorBoard()


class Trackers:
    """Sends a run's reports to its trackers; only :meth:`close` waits, for a bounded time.

    Args:
        names: of ``train.log.trackers``.
        opening: what they are told about the run.
        at_start: files that describe the run.
        at_end: files that it leaves behind.
        tell: called with a sentence for the user.
    """

    def __init__(
        self,
        names: Sequence[str],
        opening: Opening,
        at_start: Sequence[Path],
        at_end: Sequence[Path],
        tell: Callable[[str], None],
    ):
        self._folder, self._at_end = opening.folder, at_end
        self._senders = [TrackerSender(make(name), tell) for name in names]
        self._send("open", opening)
        self._send("files", self._folder, [path for path in at_start if path.exists()])

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Metrics after ``step`` steps; all of them finite."""
        if scalars:
            self._send("scalars", step, time.time(), scalars)

    def text(self, step: int, name: str, text: str) -> None:
        """A sentence."""
        self._send("text", step, name, text)

    def image(self, step: int, name: str, png: bytes) -> None:
        """A picture, as the content of a PNG file."""
        self._send("image", step, name, png)

    def close(self, phase: str) -> None:
        """Send the last files and wait for all trackers together; ``phase`` is how the run ended."""
        self._send("files", self._folder, [path for path in self._at_end if path.exists()])
        deadline_s = time.monotonic() + (_PATIENCE_S if phase == "ended" else _SHORT_PATIENCE_S)
        for sender in self._senders:
            sender.begin_close(phase)
        for sender in self._senders:
            sender.end_close(deadline_s)

    def _send(self, method: str, *arguments: Any) -> None:
        for sender in self._senders:
            sender.send(method, *arguments)
