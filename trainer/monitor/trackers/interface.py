"""What a tracker is: a few methods, each called from the tracker's own thread (``sender.py``), one at a time.

    metrics.py --reports--> all.py --a queue each--> sender.py --> to_tensorboard.py, to_wandb.py, to_mlflow.py

Names of metrics and pictures are those of ``metrics.jsonl``, the same for all. A report that did not arrive is lost for
the tracker only: the run folder has everything.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.files import write_atomically
from settings import flatten

IDS = "trackers.json"
"""In a run folder: this run's id in each tracker, so that a resume continues the same run there."""
_IDS_LOCK = threading.Lock()


class UnreachableError(Exception):
    """A tracker's server did not answer, or is busy: the same report may be accepted later.

    With any other exception of a tracker the report is lost.
    """


@dataclass(frozen=True)
class Opening:
    """What a tracker is told about a run.

    Attributes:
        folder: the run's; its name is that of the run.
        project: what runs are grouped under.
        config: as resolved, nested.
        commit: of the code, None if it is not known.
        resumed_at: optimiser steps done before this start; None for a fresh run.
    """

    folder: Path
    project: str
    config: dict[str, Any]
    commit: str | None
    resumed_at: int | None

    @property
    def flat_config(self) -> dict[str, Any]:
        """The config by ``block.field``; lists are kept."""
        return flatten(self.config)

    def kept_id(self, tracker: str) -> str | None:
        """The tracker's own id of this run from an earlier start, if the run resumes from one."""
        path = self.folder / IDS
        if self.resumed_at is None or not path.exists():
            return None
        found = json.loads(path.read_text()).get(tracker)
        return None if found is None else str(found)

    def keep_id(self, tracker: str, own: str) -> None:
        """Keep the tracker's id of this run for the next start."""
        path = self.folder / IDS
        with _IDS_LOCK:  # trackers open in threads of their own
            ids = json.loads(path.read_text()) if path.exists() else {}
            write_atomically(path, json.dumps(ids | {tracker: own}).encode())


class Tracker(Protocol):
    """Receives one run's reports. Any method may block, and may raise: see :class:`UnreachableError`."""

    name: str
    """As in ``train.log.trackers``."""

    def open(self, opening: Opening) -> None:
        """Begin a run, or continue that of an earlier start."""

    def scalars(self, step: int, at_s: float, scalars: dict[str, float]) -> None:
        """Finite metrics after ``step`` steps, logged at time ``at_s`` in seconds since 1970."""

    def text(self, step: int, name: str, text: str) -> None:
        """A sentence."""

    def image(self, step: int, name: str, png: bytes) -> None:
        """A picture, as the content of a PNG file."""

    def files(self, folder: Path, paths: Sequence[Path]) -> None:
        """Files of the run's ``folder``, each under its path in it; those sent before are replaced."""

    def close(self, phase: str) -> None:
        """Write everything out. ``phase``: how this rank ended, one of ``trainer.heartbeat.FINAL``."""
