"""Commands and ranks in processes that are forked, not launched: they start in a fraction of a second instead of ten.

Each is a process of its own with a process id, a session, an environment and an output, as ``srun`` or a shell starts
them, forked from one that has imported torch, DeepSpeed and the rest (``multiprocessing``'s fork server). A test can
kill a rank, or all of them, at any moment and start them again. Where the launcher, the interpreter's start or the
noise of the imports is the subject, ``tests/launching.py`` starts real ones.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from tests.launching import ROOT, environment, free_port

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, "tests.heavy"])
_PATIENCE_S = 240.0
_GRACE_S = 30.0
"""How long the others may go on after one has failed; gloo notices within seconds."""


class Processes:
    """``python -m module arguments`` in ``count`` processes, ranks of one another if there are two or more.

    Args:
        module: what to run, as ``__main__``; or a function of a module, called with the arguments.
        arguments: of all alike.
        count: how many.
        ranks: whether they are told to be ranks, 0 and following; a single process is not unless asked.
        first: called in each process before anything else, to break something there; a function of a module.
        variables: further environment of all.
    """

    def __init__(
        self,
        module: str | Callable[..., object],
        *arguments: Any,
        count: int = 1,
        ranks: bool | None = None,
        first: Callable[[], None] | None = None,
        variables: dict[str, str] | None = None,
    ):
        self._output = tempfile.NamedTemporaryFile(prefix="ranks-", suffix=".output")  # noqa: SIM115
        alike = environment() | (variables or {})
        ranks = count > 1 if ranks is None else ranks
        if ranks:
            alike |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            alike |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ensure_server()
        self.processes = []
        for rank in range(count):
            own = alike | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {})
            given = (module, arguments, own, self._output.name, first)
            self.processes.append(_FORKS.Process(target=_be_process, args=given))
        for process in self.processes:
            process.start()

    @property
    def output(self) -> str:
        """What all of them have written to stdout and stderr so far."""
        return Path(self._output.name).read_text(errors="replace")

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

    def status(self, timeout_s: float) -> int:
        """Wait as a launcher does: the exit status of the first that fails, whereupon the others are ended, or 0.

        Raises:
            subprocess.TimeoutExpired: if they take longer.
        """
        deadline, status = time.monotonic() + timeout_s, 0
        while running := [process for process in self.processes if process.is_alive()]:
            connection.wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
            failed = [process.exitcode for process in self.processes if process.exitcode]
            if failed and not status:
                status, deadline = failed[0], min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() >= deadline:
                self.kill()
                if not status:
                    raise subprocess.TimeoutExpired("forked", timeout_s, self.output)
        return status or next((process.exitcode for process in self.processes if process.exitcode), 0)

    def error(self) -> str:
        """Wait until an error has ended all of them, and return its one sentence.

        Rank 0 says it. Another rank says the same, or that rank 0 is gone, if it learnt that first.
        """
        from trainer.exit_status import EXIT_MISTAKE, EXIT_STALLED

        statuses = self.end()
        assert statuses[0] == EXIT_MISTAKE and set(statuses) <= {EXIT_MISTAKE, EXIT_STALLED}, (statuses, self.output)
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

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self.processes:
            process.join()


class Ranks(Processes):
    """Stage one in ``count`` ranks.

    Args:
        config: the run's YAML file.
        overrides: ``key.sub=value``.
        count, first: as of :class:`Processes`.
    """

    def __init__(self, config: str, *overrides: str, count: int = 2, first: Callable[[], None] | None = None):
        super().__init__("pretrain.train", config, *overrides, count=count, ranks=True, first=first)


@cache
def ensure_server() -> None:
    """Start the fork server, from the root and with one thread, wherever the test that needs it first stands.

    Changes this process's environment meanwhile, so what starts processes in several threads calls it before them.
    """
    before = dict(os.environ)
    os.environ.update(environment() | {"PYTHONPATH": str(ROOT)})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _be_process(
    module: str | Callable[..., object],
    arguments: tuple[Any, ...],
    variables: dict[str, str],
    output: str,
    first: Callable[[], None] | None,
) -> None:
    """In the new process: become one that was started from a shell."""
    import torch

    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    with open(output, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    multiprocessing.set_start_method(None, force=True)  # its own processes are not of this fork server
    torch.set_num_threads(1)
    try:
        if first is not None:
            first()
        if callable(module):
            module(*arguments)
        else:
            sys.argv = [module, *map(str, arguments)]
            sys.modules.pop(module, None)  # it runs again, as __main__
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
