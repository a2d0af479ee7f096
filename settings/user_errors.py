"""A user's mistake ends a command with one sentence and status 1; a bug of ours keeps its traceback."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_OTHER_RANKS_WAIT_S = 5.0


def rank_by_environment() -> int:
    """This process's rank as its launcher or ``srun`` says, before the ranks have met; 0 where there is only one."""
    own = os.environ.get("SLURM_PROCID", "0") if "SLURM_STEP_NUM_TASKS" in os.environ else "0"
    return int(os.environ.get("RANK", own))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn ``ValueError`` and ``OSError`` raised inside into ``error: <sentence>`` on stderr and exit status 1.

    Ctrl-C is one word and status 130. Where a reader such as ``head`` has closed our output, the command ends quietly,
    with the status of SIGPIPE.

    Under a launcher most mistakes hit every rank alike. Ranks other than 0 wait a little before they speak: the
    launcher ends them when rank 0 fails, and the reader is spared as many copies as there are ranks.
    """
    atexit.register(gc.freeze)  # the interpreter's last search for cycles takes a second with torch loaded
    try:
        yield
        sys.stdout.flush()  # here, where a closed pipe is caught, and not at the interpreter's end
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError) as error:
        logging.getLogger("hopscotch").debug("ended by an error", exc_info=True)  # goes to a run's log file, if any
        rank = rank_by_environment()
        if rank:
            time.sleep(_OTHER_RANKS_WAIT_S)
        print(f"error: {error}" if not rank else f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
