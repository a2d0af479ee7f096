"""Three kinds of errors, each with its exit status, so that a script can tell them apart.

    a user's mistake      one sentence: the rule, the values, the fix        1; of a run 78 (trainer/exit_status.py)
    the world's state     one sentence: a lost rank, a stop from outside     75, 76 (also there)
    a fault of ours       the traceback, and where to report it             70

A user's mistake is a ``ValueError`` or ``OSError`` that a ``raise`` statement of ours raised on purpose, and an
``OSError`` that names a file. The same classes raised by a library, by Python itself or by our own arithmetic are
faults: "'ascii' codec can't encode" tells a user nothing, and without its traceback it tells us nothing either.
"""

from __future__ import annotations

import atexit
import dis
import errno
import gc
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

EXIT_FAULT = 70
"""Exit status of a fault of ours or of a library (EX_SOFTWARE)."""
_OURS = str(Path(__file__).resolve().parent.parent)
_NOT_OURS = (f"{os.sep}site-packages{os.sep}", f"{os.sep}.venv{os.sep}")
_RAISE = dis.opmap["RAISE_VARARGS"]
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Of a disk that is full, over a quota, or read-only."""
_MISTAKES = {
    *NOT_WRITABLE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG,
}  # fmt: skip
"""Of a name that is wrong, or that this user may not use, and of disks without room. All others, such as EIO, ESTALE
and EMFILE, are of a disk, a mount or a machine that fails: nobody's mistake, and another start may not meet it."""
_REPORT = (
    "this is a bug in Hopscotch or a library that it uses, not a mistake of yours; please report it with the output "
    "above and that of `python -m launch.doctor`"
)
_OTHER_RANKS_WAIT_S = 5.0
_LOSSLESS = ("surrogateescape", "utf-8")
"""Standard output where no locale is set; it shows everything."""


def rank_by_environment() -> int:
    """This process's rank as its launcher or ``srun`` says, before the ranks have met; 0 where there is only one."""
    own = os.environ.get("SLURM_PROCID", "0") if "SLURM_STEP_NUM_TASKS" in os.environ else "0"
    rank = os.environ.get("RANK", own)
    return int(rank) if rank.isdigit() else 0


def looks_first() -> bool:
    """Whether this process looks for mistakes before the ranks meet.

    Rank 0 does, whose launcher then ends the others. ``srun`` may leave them waiting for it, so there all do.
    """
    return "RANK" not in os.environ or rank_by_environment() == 0


def ranks_by_environment() -> int:
    """How many processes the launcher or ``srun`` has started; 1 without."""
    count = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    return int(count) if count.isdigit() else 1


@contextmanager
def user_errors(mistake: int = 1) -> Iterator[None]:
    """Turn a user's mistake raised inside into ``error: <sentence>`` on stderr and exit status ``mistake``.

    Ctrl-C is one word and status 130. Where a reader such as ``head`` has closed our output, the command ends quietly,
    with the status of SIGPIPE. Everything else passes through; at the end of the process it is a fault of ours.

    Under a launcher most mistakes hit every rank alike. Ranks other than 0 wait a little before they speak: the
    launcher ends them when rank 0 fails, and the reader is spared as many copies as there are ranks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and (sys.stdout.errors, sys.stdout.encoding) != _LOSSLESS:
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: what a terminal cannot show is no fault
    atexit.register(gc.freeze)  # the interpreter's last search for cycles takes a second with torch loaded
    sys.excepthook = _end_as_fault
    try:
        yield
        sys.stdout.flush()  # here, where a closed pipe is caught, and not at the interpreter's end
    except KeyboardInterrupt:
        if rank_by_environment() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError) as error:
        if not is_users(error):
            raise
        logging.getLogger("hopscotch").debug("ended by an error", exc_info=True)  # goes to a run's log file, if any
        rank = rank_by_environment()
        if rank:
            time.sleep(_OTHER_RANKS_WAIT_S)
        print(f"error: {error}" if not rank else f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        broken = isinstance(error, OSError) and error.errno is not None and error.errno not in _MISTAKES
        raise SystemExit(1 if broken else mistake) from None


def is_users(error: BaseException) -> bool:
    """True for what a ``raise`` statement of ours raised, and for a file or disk that the system has refused."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in NOT_WRITABLE):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True  # made, but never raised: handed over by another thread or process of ours
    code = trace.tb_frame.f_code
    ours = code.co_filename.startswith(_OURS) and not any(part in code.co_filename for part in _NOT_OURS)
    return (ours or code.co_filename.startswith("<")) and code.co_code[trace.tb_lasti] == _RAISE


def _end_as_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
    # torch.distributed wraps the hook in one that collects what is printed, and never shows it if the hook exits.
    sys.stderr = sys.__stderr__ or sys.stderr
    logging.getLogger("hopscotch").debug("ended by a fault", exc_info=(kind, error, trace))  # to a run's log file
    sys.__excepthook__(kind, error, trace)
    print(_REPORT, file=sys.stderr, flush=True)
    raise SystemExit(EXIT_FAULT)
