"""Whatever ends a benchmark ends the commands that it has started, saved where they can save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bench.common.children import Children
from tests.launching import ROOT, environment, has_ended
from tests.trainer.checkpoints.test_mirror import until

# Two commands at once, of which each starts a process that saves when it is asked to.
PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from bench.common.children import Children
from settings import user_errors
folder = Path(sys.argv[1])
with user_errors(), Children() as children, ThreadPoolExecutor(2) as pool:
    words = [[sys.executable, "-c", sys.argv[2], str(folder / str(number)), sys.argv[3]] for number in range(4)]
    at_once = [pool.submit(children.run, word, folder / "log") for word in words]
    print([each.result() for each in at_once], flush=True)
"""
FAMILY = """
import os, subprocess, sys
CHILD = '''
import os, signal, sys, time
def save(*_):
    open(sys.argv[1] + "-saved", "w")
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else save)
with open(sys.argv[1] + "-new", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + "-new", sys.argv[1])
time.sleep(600)
'''
sys.exit(subprocess.run([sys.executable, "-c", CHILD, *sys.argv[1:]]).returncode)
"""


def started(folder: Path, kind: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The program once two of its commands run, and the processes that those have started."""
    words = [sys.executable, "-c", PROGRAM, str(folder), FAMILY, kind]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until(lambda: (folder / "0").exists() and (folder / "1").exists())
    return process, [psutil.Process(int((folder / name).read_text())) for name in ("0", "1")]


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGHUP, 129, "by SIGHUP"), (signal.SIGINT, 130, "interrupt")],
)
def test_what_runs_saves_and_what_waits_is_not_started(
    tmp_path: Path, number: signal.Signals, status: int, word: str
) -> None:
    process, grandchildren = started(tmp_path, "good")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and word in err and "Traceback" not in err
    assert all(has_ended(one) for one in grandchildren)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "0-saved", "1", "1-saved", "log"]


def test_the_same_signal_twice_is_one_and_a_later_one_kills(tmp_path: Path) -> None:
    process, grandchildren = started(tmp_path, "deaf")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=3)
    assert not any(has_ended(one) for one in grandchildren)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and all(has_ended(one) for one in grandchildren)


def test_a_command_s_status_and_words_are_kept_and_handlers_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Children() as children:
        command = [sys.executable, "-c", "import os; print(os.environ['OWN']); raise SystemExit(3)"]
        assert children.run(command, tmp_path / "log", {**os.environ, "OWN": "word"}) == 3
    assert (tmp_path / "log").read_text() == "word\n" and signal.getsignal(signal.SIGTERM) is before
