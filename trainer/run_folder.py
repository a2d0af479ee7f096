"""A run is a folder; this is its layout.

runs/NAME/
  config.yaml             as resolved: can be run again as it is
  config.original.yaml    as written, with its comments
  code.commit, code.diff  commit of the code, and what tracked files had on top of it, if anything, at the last start
  metrics.jsonl           one line a logged step
  tensorboard/            the same, to look at
  heartbeat/rank-N.json   step, time, phase of every rank
  logs/rank-N.log         what every rank had to say
  checkpoints/            see trainer/checkpoint.py
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from data.files import write_atomically
from settings import to_yaml
from trainer import code_state
from trainer.config import StageConfig
from trainer.distributed import World

LOGGER = "hopscotch"
"""Name of the logger that every rank writes to."""
_BEAT_EVERY_S = 1.0


class RunFolder:
    """Paths of one run, created by rank 0."""

    def __init__(self, path: str | Path, rank: int):
        self.path = Path(path)
        self.rank = rank
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.heartbeat = self.path / "heartbeat" / f"rank-{rank}.json"
        self._phase, self._beat_s = "", 0.0
        self.log = self.path / "logs" / f"rank-{rank}.log"

    def create(self, config: StageConfig, original: str | Path) -> None:
        """Make the folders; write the configs and which code this is (rank 0 only)."""
        for folder in (self.checkpoints, self.tensorboard, self.heartbeat.parent, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", to_yaml(config).encode())
        copy = self.path / "config.original.yaml"
        if not (copy.exists() and copy.samefile(original)):
            shutil.copyfile(original, copy)
        for name, content in (("code.commit", code_state.commit()), ("code.diff", code_state.diff())):
            (self.path / name).unlink(missing_ok=True)  # of an earlier start
            if content:
                write_atomically(self.path / name, content.encode())

    def beat(self, step: int, phase: str) -> None:
        """Say that this rank is alive: what it does and at which step; at most every second unless the phase is new."""
        now = time.time()
        if phase == self._phase and now - self._beat_s < _BEAT_EVERY_S:
            return
        self._phase, self._beat_s = phase, now
        beat = {"rank": self.rank, "step": step, "phase": phase, "time": now, "pid": os.getpid()}
        # No fsync: a heartbeat that a power cut loses says nothing wrong.
        temporary = self.heartbeat.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk is the checkpoint's business, not the heartbeat's
            temporary.write_text(json.dumps(beat))
            temporary.replace(self.heartbeat)


class _Terminal(logging.Handler):
    """Prints lines above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def open_log(run: RunFolder, world: World) -> logging.Logger:
    """Every rank logs to its own file, tracebacks included; rank 0 to the terminal too."""
    logger = logging.getLogger(LOGGER)
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    file = logging.FileHandler(run.log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    if world.is_main:
        terminal = _Terminal(logging.INFO)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(terminal)
    return logger
