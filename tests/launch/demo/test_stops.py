"""Signals to the demo end all that it started, with what was trained saved, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.launching import ROOT, environment, has_ended

PATIENCE_S = 240.0
ENDS_WITHIN_S = 15.0
"""From a signal to a stage of the demo until all has ended, saved; on an otherwise idle machine with two cores."""

# A command that starts another process, which only ends when it is told to, and says who they are.
FAMILY = """
import os, signal, subprocess, sys, time
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.{child}); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
child.stdout.readline()
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
RUN = """
import os, sys
from launch.demo.processes import Commands
from launch.demo.screen import Screen
commands, screen = Commands(), Screen("family")
status = commands.run([sys.executable, "-c", sys.argv[1]], os.environ, screen)
print("ended", commands.signals, status, flush=True)
"""


class Started:
    """A process in a group of its own, and the lines that it says."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < end and self.process.poll() is None, f"never said {pattern}:\n{self.said}"
            time.sleep(0.02)
        return found

    def end(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status


def family(child: str) -> tuple[Started, list[psutil.Process]]:
    """``Commands`` with a command and its child, which ends on SIGTERM (``SIG_DFL``) or not (``SIG_IGN``)."""
    started = Started([sys.executable, "-c", RUN, FAMILY.replace("{child}", child)])
    pids = started.wait_for(r"pids (\d+) (\d+)").groups()
    return started, [psutil.Process(int(pid)) for pid in pids]


def wait_until_ended(processes: list[psutil.Process]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not all(map(has_ended, processes)):
        assert time.monotonic() < end, processes
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("to", [os.kill, os.killpg])
def test_a_signal_ends_a_command_and_what_it_started(number: signal.Signals, to: Callable[[int, int], None]) -> None:
    started, processes = family("SIG_DFL")
    to(started.process.pid, number)
    assert started.end() == 0 and started.lines[-1].split()[:2] == ["ended", "1"]
    assert all(map(has_ended, processes))


def test_the_second_signal_kills_what_does_not_end_but_not_one_that_make_passes_on() -> None:
    started, processes = family("SIG_IGN")
    os.killpg(started.process.pid, signal.SIGTERM)
    started.process.send_signal(signal.SIGTERM)
    wait_until_ended(processes[:1])
    time.sleep(2.5)
    assert not has_ended(processes[1]) and started.process.poll() is None
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == 0 and started.lines[-1].split()[:2] == ["ended", "2"]
    wait_until_ended(processes)


def test_nobody_reading_is_a_signal_too() -> None:
    command = [sys.executable, "-c", RUN, FAMILY.replace("{child}", "SIG_DFL").replace("time.sleep(600)\n", "\n", 1)]
    endless = command[-1] + "while True: print('more', flush=True); time.sleep(0.1)\n"
    process = subprocess.Popen(
        [*command[:-1], endless], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    pids = next(line.split()[1:] for line in process.stdout if b"pids" in line)
    process.stdout.close()
    process.wait(PATIENCE_S)
    wait_until_ended([psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))])


@pytest.mark.parametrize(
    ("screen", "said"),
    [
        ('Screen("family")', "stopping (stop again to end at once)"),
        ('Screen("family", 9, iter([4, 4]).__next__)', "stopping (stop again to end at once)"),
        ('Screen("family", 9, iter([4, 5]).__next__)', "stopping and saving what was trained (stop again"),
    ],
)
def test_only_steps_that_were_done_are_said_to_be_saved(screen: str, said: str) -> None:
    talks = "print('up', flush=True); import time; time.sleep(600)"
    started = Started([sys.executable, "-c", RUN.replace('Screen("family")', screen), talks])
    started.wait_for("up")
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == 0 and started.lines[1].strip().startswith(said), started.said


def test_a_stopped_command_does_not_say_how_it_alone_would_be_resumed() -> None:
    launcher = "[2026-12-01 15:03:07,380] [ERROR] [launch.py:259:sigkill_handler] ['python'] exits with return code ="
    lines = ["asked to stop: step 9 is saved; go on with: deepspeed my.yaml", f"{launcher} 75", f"{launcher} 70"]
    talks = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print(*{lines}, sep="\\n", flush=True) or sys.exit())
print(*{lines}, sep="\\n", flush=True)
time.sleep(600)
"""
    started = Started([sys.executable, "-c", RUN, talks])
    started.wait_for("= 70")
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == 0
    said = [line.strip() for line in started.lines]
    assert said[:3] == lines and said[3:-1] == [
        "stopping (stop again to end at once)",
        lines[0].partition(";")[0],
        lines[2],
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not hear that its parent has died")
def test_the_command_does_not_outlive_a_demo_that_is_killed() -> None:
    started, processes = family("SIG_DFL")
    started.process.kill()
    wait_until_ended(processes[:1])
    processes[1].kill()


@pytest.fixture
def configs(tmp_path: Path, tiny: dict[str, Any], write_config: Callable[..., str]) -> list[str]:
    """The demo's configs, tiny, with everything in ``tmp_path``."""
    data = str(tmp_path / "run-data")
    tiny["data"] |= {"dir": data}
    tiny["train"] |= {"steps": 40, "evaluation": {"every_steps": 20, "samples": 2}}
    tiny["train"]["checkpoint"] = {"every_steps": 20, "resume": "auto"}
    tuned = yaml.safe_load((ROOT / "configs/tune_demo.yaml").read_text().replace("runs/demo-data", data))
    tuned["base"]["path"], tuned["ensemble"]["layers"] = tiny["train"]["run_dir"], 2
    tuned["data"] |= {"sequence_tokens": 64, "too_long": "leave_out"}
    tuned["train"] = tiny["train"] | {"run_dir": str(tmp_path / "run-tuned")}
    return [write_config(tiny), write_config(tuned, "tune.yaml")]


STOPS = [  # what is said when the signal is sent, which signal, to the process alone or to its group, the stage
    (r"\[1/7\]", signal.SIGTERM, os.kill, "tokenizer"),
    (r"\[2/7\][^[]*\$", signal.SIGINT, os.killpg, "data"),
    (r"step +3  loss", signal.SIGTERM, os.kill, "stage one"),
    (r"step +25  loss", signal.SIGINT, os.killpg, "stage one"),
    (r"\[4/7\][^[]*\$", signal.SIGTERM, os.killpg, "examples"),
    (r"\[5/7\][^[]*\$", signal.SIGHUP, os.kill, "stage two"),  # before there are ranks
    (r"\[5/7\][^[]*step +3  loss", signal.SIGTERM, os.killpg, "stage two"),
    (r"\[6/7\][^[]*\$", signal.SIGTERM, os.kill, "export"),
    (r"\[7/7\][^[]*\$", signal.SIGINT, os.killpg, "answers"),
]


@pytest.mark.slow
def test_stopped_in_every_stage_it_goes_on_to_the_end(configs: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.demo", *configs, "--processes", "2"]
    took_s: list[float] = []
    for pattern, number, to, stage in STOPS:
        started = Started(command)
        started.wait_for(pattern)
        to(started.process.pid, number)
        began_s = time.monotonic()
        assert started.end() == 75, started.said
        took_s.append(time.monotonic() - began_s)
        print(f"{stage}: all ended {took_s[-1]:.1f} s after {number.name}")
        assert started.lines[-1] == f"stopped in {stage}; go on with: {shlex.join(command)}", started.said
        assert started.said.count("go on with") == 1, started.said
        left = [process for process in psutil.process_iter() if str(tmp_path) in " ".join(_command_line(process))]
        assert left == []
    started = Started(command)
    assert started.end() == 0, started.said
    assert "done already: " + str(tmp_path / "run-hf") in started.said and "right, for example" in started.said
    for name in ("run", "run-tuned"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "train/loss" in line]
        assert steps == list(range(1, 41))  # none lost, none twice
        assert "resumed from" in (tmp_path / name / "logs" / "rank-0.log").read_text()
    assert max(took_s) < ENDS_WITHIN_S, took_s


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
