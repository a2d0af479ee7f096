"""What stops a run before its last step: signals, lost ranks, and bad steps."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from trainer.checkpoints.layout import newest_name
from trainer.exit_status import EXIT_STALLED
from trainer.monitor.orphan import LAUNCHER

if TYPE_CHECKING:
    from trainer.distributed import World

Part = TypeVar("Part")
_LOST = re.compile("gloo/transport|ncclRemoteError|remote process exited")
_FIRST_ERROR_S = 5.0
"""How long a rank that lost another one waits, so that a launcher sees the exit status of the one that ended first."""


_NAMED = 8
"""Most ranks and samples that are named one by one; there may be thousands."""
_CTRL_C = "Ctrl-C: the run finishes this step, saves and ends; press it again to end at once, unsaved"
_CTRL_C_AT_THE_END = (
    "Ctrl-C: all steps are saved; the run finishes what is under way and ends; press it again to end at once"
)
_LAUNCHERS_OWN = (
    "\n(the deepspeed command ends before that, with a KeyboardInterrupt that is harmless; wait for 'asked to stop')"
)


class AskedToStop(Exception):
    """Raised on every rank alike between two parts of an evaluation, once the ranks have agreed that some was."""


class StopRequest:
    """Remembers SIGTERM, SIGUSR1, SIGHUP and Ctrl-C until the ranks can agree on them; a second Ctrl-C ends at once.

    SIGHUP comes when the terminal is closed or its connection is lost; under ``nohup`` it stays ignored. After it,
    output to that terminal is discarded; the run's log has it.

    The handler only sets a flag: launchers deliver the signal to one rank after the other, so a collective inside a
    handler would wait for ranks that never got it. The flag travels in the step's own all-reduce; between the parts of
    an evaluation the ranks agree on it, too.

    Args:
        tell: answer Ctrl-C with a line on stderr; for one of the ranks.

    Attributes:
        requested: whether somebody has asked.
        all_saved: to be set once all steps are done and saved; what Ctrl-C is answered depends on it.
    """

    def __init__(self, tell: bool = False) -> None:
        self.requested, self.all_saved, self._tell = False, False, tell
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._note)

    def request(self) -> bool:
        """Ask to stop, as a signal does; from any thread. Returns whether this was the first request."""
        before, self.requested = self.requested, True
        return not before

    def agreed(self, world: World) -> bool:
        """Whether some rank was asked; collective."""
        return world.any(self.requested)

    def raise_if_agreed(self, world: World) -> None:
        """Between two parts of an evaluation; collective.

        Raises:
            AskedToStop: some rank was asked.
        """
        if self.agreed(world):
            raise AskedToStop

    def between(self, parts: Iterable[Part], world: World) -> Iterator[Part]:
        """The ``parts`` of an evaluation, with :meth:`raise_if_agreed` between two of them."""
        for number, part in enumerate(parts):
            if number:
                self.raise_if_agreed(world)
            yield part

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request()
        if number == signal.SIGHUP:
            for descriptor in self._terminals:
                if not os.isatty(descriptor):  # any more
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if number == signal.SIGINT:
            if self._tell:
                answer = _CTRL_C_AT_THE_END if self.all_saved else _CTRL_C
                with contextlib.suppress(OSError):  # past sys.stderr, whose lock the interrupted code may hold
                    os.write(2, f"\n{answer}{_LAUNCHERS_OWN if len(LAUNCHER) > 1 else ''}\n".encode())
            signal.signal(signal.SIGINT, signal.default_int_handler)


def is_lost_rank(error: BaseException) -> bool:
    """True for a collective's error after another rank died."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


@contextmanager
def exit_on_lost_rank() -> Iterator[None]:
    """Turn a collective's error after another rank died into one sentence and status 76.

    gloo sees a closed connection at once; NCCL may not, and then the watchdog ends the run with the same status.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        logging.getLogger("hopscotch").debug("lost a rank", exc_info=True)
        time.sleep(_FIRST_ERROR_S)
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        print(
            f"rank {os.environ.get('RANK', '0')}: error: another rank or its host is gone ({reason}); its own log in "
            "train.run_dir/logs or its host's messages say why; start again with train.checkpoint.resume=auto",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(EXIT_STALLED) from None


def bad_step(step: int, samples: tuple[int, int], bad_ranks: list[tuple[int, list[int]]]) -> str:
    """The warning for a step that was skipped.

    Args:
        step: its number.
        samples: its first and last one.
        bad_ranks: those whose loss was not finite, with their samples; none if it was the gradient.
    """
    if bad_ranks:
        who = "; ".join(f"rank {rank} (its samples {_span(ids)})" for rank, ids in bad_ranks[:_NAMED])
        where = f"the loss was not finite on {who}"
    else:
        where = f"the gradient (samples {samples[0]} to {samples[1]}) was not finite, the loss was finite on every rank"
    return f"step {step}: {where}; the update was left out and training goes on with the next batch"


def _span(ids: list[int]) -> str:
    return ", ".join(str(i) for i in ids) if len(ids) <= _NAMED else f"{ids[0]} to {ids[-1]}, {len(ids)} of them"


def too_many_bad_steps(count: int, step: int, checkpoints: Path) -> str:
    """The sentence that a run ends with after ``count`` bad steps in a row."""
    return (
        f"{count} steps in a row up to step {step} had a loss or gradient that is not finite (train.max_bad_steps); "
        "lower train.optimizer.lr, skip the samples named above with data.skip_ranges, or look for a broken device if "
        f"it is always the same rank; resume with train.checkpoint.resume=required: {newest_name(checkpoints)}"
    )
