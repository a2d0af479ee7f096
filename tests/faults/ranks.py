"""Ranks as ``srun`` starts them, without a launcher, in a second instead of ten.

Each is a process of its own with a process id and a group, forked from one that has imported torch and DeepSpeed
(``multiprocessing``'s fork server). A test can kill a rank, or all of them, at any moment and start them again.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.train import main
from tests.launching import environment, free_port
from trainer.distributed import import_deepspeed
from trainer.exit_status import EXIT_STALLED

import_deepspeed()
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])
_PATIENCE_S = 240.0


class Ranks:
    """Stage one in ``count`` processes.

    Args:
        config: the run's YAML file.
        overrides: ``key.sub=value``.
        count: ranks.
        first: called in each rank before anything else, to break something there; a function of a module.
    """

    def __init__(self, config: str, *overrides: str, count: int = 2, first: Callable[[], None] | None = None):
        self._output = Path(config).with_suffix(".output")
        self._output.write_bytes(b"")
        alike = environment() | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        alike |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [
            _FORKS.Process(
                target=_be_rank,
                args=(["pretrain.train", config, *overrides], alike | _numbers(rank), self._output, first),
            )
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    @property
    def output(self) -> str:
        """What all of them have written to stdout and stderr so far."""
        return self._output.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether any of them runs."""
        return any(process.is_alive() for process in self.processes)

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()

    def end(self) -> list[int]:
        """Wait until all have ended; their exit statuses, negative for a signal's."""
        deadline = time.monotonic() + _PATIENCE_S
        for process in self.processes:
            process.join(deadline - time.monotonic())
            assert not process.is_alive(), f"a rank did not end: {self.output[-3000:]}"
        return [int(process.exitcode or 0) for process in self.processes]

    def error(self) -> str:
        """Wait until an error has ended all of them, and return its one sentence.

        Rank 0 says it. Another rank says the same, or that rank 0 is gone, if it learnt that first.
        """
        statuses = self.end()
        assert statuses[0] == 1 and set(statuses) <= {1, EXIT_STALLED}, (statuses, self.output)
        assert "Traceback" not in self.output and "Logging error" not in self.output, self.output
        (sentence,) = re.findall("^error: .*", self.output, re.MULTILINE)
        return str(sentence)

    def wait_until(self, happened: Callable[[], Any]) -> None:
        """Wait for something to happen while all ranks run."""
        deadline = time.monotonic() + _PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline, f"it never came: {self.output[-3000:]}"
            assert all(process.is_alive() for process in self.processes), self.output[-3000:]
            time.sleep(0.001)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self.processes:
            process.join()


def _numbers(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _be_rank(arguments: list[str], variables: dict[str, str], output: Path, first: Callable[[], None] | None) -> None:
    """In the new process: become a rank that was started from a shell."""
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    sys.argv = arguments
    if first is not None:
        first()
    raise SystemExit(main())
