"""A run is a folder; this is its layout.

runs/NAME/
  config.yaml             as resolved: can be run again as it is
  config.original.yaml    as written, with its comments
  metrics.jsonl           one line a logged step
  tensorboard/            the same, to look at
  heartbeat/rank-N.json   step, time, phase of every rank
  logs/rank-N.log         what every rank had to say
  checkpoints/            see trainer/checkpoint.py
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

from data.files import write_atomically
from settings import to_yaml
from trainer.config import RunConfig
from trainer.distributed import World


class RunFolder:
    """Paths of one run, created by rank 0."""

    def __init__(self, path: str | Path, rank: int):
        self.path = Path(path)
        self.rank = rank
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.heartbeat = self.path / "heartbeat" / f"rank-{rank}.json"
        self.log = self.path / "logs" / f"rank-{rank}.log"

    def create(self, config: RunConfig, original: str | Path) -> None:
        """Make the folders and write the configs (rank 0 only)."""
        for folder in (self.checkpoints, self.tensorboard, self.heartbeat.parent, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", to_yaml(config).encode())
        copy = self.path / "config.original.yaml"
        if not (copy.exists() and copy.samefile(original)):
            shutil.copyfile(original, copy)

    def beat(self, step: int, phase: str) -> None:
        """Say that this rank is alive: what it does, at which step, since when."""
        beat = {"rank": self.rank, "step": step, "phase": phase, "time": time.time(), "pid": os.getpid()}
        # No fsync: a heartbeat that a power cut loses says nothing wrong.
        temporary = self.heartbeat.with_suffix(".tmp")
        temporary.write_text(json.dumps(beat))
        temporary.replace(self.heartbeat)


def logger_for(run: RunFolder, world: World) -> logging.Logger:
    """Every rank logs to its own file; rank 0 to the terminal too, the others only warnings."""
    logger = logging.getLogger("hopscotch")
    logger.handlers.clear()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    file = logging.FileHandler(run.log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setLevel(logging.INFO if world.is_main else logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(message)s" if world.is_main else f"rank {world.rank}: %(message)s"))
    logger.addHandler(file)
    logger.addHandler(terminal)
    return logger
