"""The run's log: a file for every rank, and the terminal for the first one."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from pathlib import Path

from tqdm import tqdm


def logger_of_run() -> logging.Logger:
    """The logger that every rank writes to; :func:`open_log` says where it goes."""
    return logging.getLogger("hopscotch")


class _Terminal(logging.Handler):
    """Prints lines above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a closed terminal or a dead launcher must not end the run
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _File(logging.FileHandler):
    """A log file that ignores write errors: checkpoints and metrics report a full disk on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing, where logging would print a traceback for every line."""


def open_log(path: Path, to_terminal: bool) -> logging.Logger:
    """Every rank logs to its own file, tracebacks included; rank 0 to the terminal too."""
    logger = logger_of_run()
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    file = _File(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    if to_terminal:
        terminal = _Terminal(logging.INFO)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(terminal)
    threading.excepthook = _tell_of_thread
    return logger


def _tell_of_thread(died: threading.ExceptHookArgs) -> None:
    """Log the traceback of a thread that ended on a disk error; Python prints that of any other.

    TensorBoard's thread dies when the disk is full; ``Metrics`` then reports it in a sentence.
    """
    if isinstance(died.exc_value, OSError):
        logger_of_run().debug("a thread has died", exc_info=died.exc_value)
    else:
        threading.__excepthook__(died)
