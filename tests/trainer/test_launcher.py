"""A rank whose launcher is gone saves and stops; nothing else that starts or leaves a process counts as a launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT, has_ended, start

# A process that starts its first argument with the others, waits for it, and is named after its own script.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
# What a rank does: look, say what it saw, look again until the launcher is gone.
RANK = """
import os, sys, time
from trainer.launcher import LAUNCHER, is_gone
def say(text):
    with open(sys.argv[1], "a") as file:
        file.write(text + "\\n")
say(f"{os.getpid()} {os.getppid()} {len(LAUNCHER)}")
while os.path.exists(sys.argv[1]) and not is_gone(LAUNCHER):
    time.sleep(0.02)
say("gone")
time.sleep(60)
"""
LAUNCH = "deepspeed.launcher.launch"


class Chain:
    """Processes with these names, each the parent of the next, the last of a rank."""

    def __init__(self, folder: Path, names: list[str]):
        self.said = folder / "said"
        for name in [*names, "rank"]:
            (folder / name).write_text(RANK if name == "rank" else PARENT)
        scripts = [str(folder / name) for name in [*names, "rank"]]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.top = subprocess.Popen([sys.executable, *scripts, str(self.said)], env=environment, start_new_session=True)
        self.watched = int(self.line(1).split()[2])
        self.rank = psutil.Process(int(self.line(1).split()[0]))
        self.parents = self.rank.parents()[: len(names)][::-1]

    def line(self, number: int, timeout_s: float = 60) -> str:
        end = time.monotonic() + timeout_s
        while not (self.said.exists() and self.said.read_text().count("\n") >= number):
            assert time.monotonic() < end, f"line {number} never came"
            time.sleep(0.02)
        return self.said.read_text().splitlines()[number - 1]

    def is_told(self, wait_s: float) -> bool:
        try:
            return self.line(2, wait_s) == "gone"
        except AssertionError:
            return False

    def close(self) -> None:
        os.killpg(self.top.pid, signal.SIGKILL)
        self.top.wait()


@pytest.mark.parametrize(
    ("names", "watched", "killed", "gone"),
    [
        (["deepspeed", LAUNCH], 2, 0, True),
        (["deepspeed", LAUNCH], 2, 1, True),
        (["shell", "deepspeed", LAUNCH], 2, 0, False),  # a login that ends, with nohup
        (["shell", LAUNCH], 1, 0, False),
        (["shell", LAUNCH], 1, 1, True),
        (["shell", "torchrun"], 1, 0, False),
        (["shell", "torchrun"], 1, 1, True),
        (["shell"], 0, 0, False),  # plain python, srun, a container
    ],
)
def test_who_counts_as_a_launcher(tmp_path: Path, names: list[str], watched: int, killed: int, gone: bool) -> None:
    chain = Chain(tmp_path, names)
    try:
        assert chain.watched == watched
        chain.parents[killed].kill()
        assert chain.is_told(10 if gone else 0.3) == gone
    finally:
        chain.close()


@pytest.mark.parametrize(
    ("whom", "number", "status"),
    [
        ("deepspeed", signal.SIGTERM, -signal.SIGTERM),
        pytest.param("deepspeed", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("launch", signal.SIGKILL, 0, marks=pytest.mark.slow),  # DeepSpeed's own: it takes -9 for no error
        pytest.param("torchrun", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_no_orphans_and_a_whole_checkpoint(tiny, write_config, whom: str, number: int, status: int) -> None:
    tiny["train"] |= {"steps": 100_000, "checkpoint": {"every_steps": 50_000}, "evaluation": {"every_steps": 50_000}}
    tiny["train"]["log"]["images"] = False
    run_dir = Path(tiny["train"]["run_dir"])
    launcher = "torchrun" if whom == "torchrun" else "deepspeed"
    process = start("pretrain.train", write_config(tiny), processes=2, launcher=launcher)
    try:
        end = time.monotonic() + 120
        while not ((run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_text().count("\n") > 3):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = [psutil.Process(_beat(run_dir, rank)["pid"]) for rank in (0, 1)]
        assert set(ranks) <= set(family)
        (family[0] if whom == "launch" else process).send_signal(number)
        assert process.wait(60) == status
        _until_gone(family)
        assert [_beat(run_dir, rank)["phase"] for rank in (0, 1)] == ["stopped", "stopped"]
        saved = [path.name for path in (run_dir / "checkpoints").iterdir()]
        assert saved == [f"step-{_beat(run_dir, 0)['step']:08d}"]
        assert (run_dir / "checkpoints" / saved[0] / "manifest.json").exists()
        assert (
            "the launcher is gone: this rank asks to stop"
            in (run_dir / "logs/rank-0.log").read_text() + (run_dir / "logs/rank-1.log").read_text()
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _until_gone(processes: list[psutil.Process]) -> None:
    end = time.monotonic() + 60
    while left := [process for process in processes if not has_ended(process)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def _beat(run_dir: Path, rank: int) -> dict:
    return json.loads((run_dir / f"heartbeat/rank-{rank}.json").read_text())
