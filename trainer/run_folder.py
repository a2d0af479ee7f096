"""A run is a folder; this is its layout.

runs/NAME/
  config.yaml             as resolved: can be run again as it is
  config.original.yaml    as written, with its comments
  code.commit, code.diff  commit of the code, and what tracked files had on top of it, if anything, at the last start
  metrics.jsonl           one line a logged step
  tensorboard/            the same, to look at
  heartbeat/rank-N.json   step and phase of every rank: see trainer/heartbeat.py
  logs/rank-N.log         what every rank had to say
  checkpoints/            see trainer/checkpoint.py
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data.files import write_atomically
from settings import to_yaml
from trainer import code_state
from trainer.config import StageConfig
from trainer.heartbeat import Heartbeat

if TYPE_CHECKING:
    from trainer.distributed import World

LOGGER = "hopscotch"
"""Name of the logger that every rank writes to."""


class RunFolder:
    """Paths of one run, created by rank 0."""

    def __init__(self, path: str | Path, rank: int):
        self.path = Path(path)
        self.rank = rank
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.heartbeat = Heartbeat(self.path / "heartbeat", rank)
        self.log = self.path / "logs" / f"rank-{rank}.log"

    def create(self, config: StageConfig, original: str | Path) -> None:
        """Make the folders; write the configs and which code this is (rank 0 only)."""
        beats = self.heartbeat.path.parent
        for folder in (self.checkpoints, self.tensorboard, beats, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        for old in beats.iterdir():
            old.unlink()  # of an earlier start, which may have had more ranks
        write_atomically(self.path / "config.yaml", to_yaml(config).encode())
        copy = self.path / "config.original.yaml"
        if not (copy.exists() and copy.samefile(original)):
            shutil.copyfile(original, copy)
        for name, content in (("code.commit", code_state.commit()), ("code.diff", code_state.diff())):
            (self.path / name).unlink(missing_ok=True)  # of an earlier start
            if content:
                write_atomically(self.path / name, content.encode())

    def beat(self, step: int, phase: str) -> None:
        """Say what this rank does now, and at which step: progress."""
        self.heartbeat.note(step, phase)


class _Terminal(logging.Handler):
    """Prints lines above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a terminal or launcher that is gone must not take the run with it
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _File(logging.FileHandler):
    """A log whose disk may be full: the checkpoints' and metrics' sentences report that, on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing, where logging would print a traceback for every line."""


def open_log(run: RunFolder, world: World) -> logging.Logger:
    """Every rank logs to its own file, tracebacks included; rank 0 to the terminal too."""
    logger = logging.getLogger(LOGGER)
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    file = _File(run.log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    if world.is_main:
        terminal = _Terminal(logging.INFO)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(terminal)
    threading.excepthook = _tell_of_thread
    return logger


def _tell_of_thread(died: threading.ExceptHookArgs) -> None:
    """Keep the traceback of a thread that a disk has ended for the log; any other is Python's to print.

    TensorBoard's thread dies of a full disk, and then ``Metrics`` says so in a sentence.
    """
    if isinstance(died.exc_value, OSError):
        logging.getLogger(LOGGER).debug("a thread has died", exc_info=died.exc_value)
    else:
        threading.__excepthook__(died)
