"""A rank whose launcher is gone saves and stops; nothing else that starts or leaves a process counts as a launcher."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT, command, environment, has_ended, start
from trainer.monitor import orphan

# A process that starts its first argument with the others, waits for it, and is named after its own script.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
# What a rank does: look, say what it saw, look again until the launcher is gone.
RANK = """
import os, sys, time
from trainer.monitor.orphan import LAUNCHER, is_gone
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


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        (
            ["/v/bin/python", "/v/bin/deepspeed", "--num_gpus", "2", "--module", "pretrain.train", "my run.yaml"],
            "/v/bin/deepspeed --num_gpus 2 --module pretrain.train 'my run.yaml' train.checkpoint.resume=auto",
        ),
        (
            ["/v/bin/python", "BIN/torchrun", "-m", "tune.train", "t.yaml", "train.checkpoint.resume=never", "a.b=1"],
            "torchrun -m tune.train t.yaml a.b=1 train.checkpoint.resume=auto",
        ),
        (
            ["/v/bin/python", "-m", "torch.distributed.run", "-m", "pretrain.train", "my.yaml"],
            "python -m torch.distributed.run -m pretrain.train my.yaml train.checkpoint.resume=auto",
        ),
        (["sshd: me@notty"], "the same command with train.checkpoint.resume=auto"),
    ],
)
def test_the_command_that_goes_on(tmp_path: Path, monkeypatch, line: list[str], typed: str) -> None:
    (tmp_path / "torchrun").write_text("#!/bin/sh\n")
    (tmp_path / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(orphan, "_line", lambda pid: [word.replace("BIN", str(tmp_path)) for word in line])
    monkeypatch.setattr(orphan, "STARTED_AS", orphan.started_as([1, 2]))
    assert orphan.command_again("train.checkpoint.resume=auto") == typed


def test_without_a_launcher_it_is_this_process(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pretrain.train", "my.yaml"])
    assert orphan.started_as([]) == ["python", "-m", "pretrain.train", "my.yaml"]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert orphan.started_as([]) is None


@pytest.mark.slow
def test_ctrl_c_on_a_terminal(tiny, write_config) -> None:
    """The deepspeed command ends at once, with a traceback that is not ours; the ranks save, and say how to go on."""
    tiny["train"] |= {"steps": 100_000, "checkpoint": {"every_steps": 50_000}, "evaluation": {"every_steps": 50_000}}
    tiny["train"]["log"]["images"] = False
    run_dir, config = Path(tiny["train"]["run_dir"]), write_config(tiny)
    words = command("pretrain.train", config, processes=2, launcher="deepspeed")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe(words[0], words, environment())
    told, pressed, end = b"", False, time.monotonic() + 240
    while time.monotonic() < end and b"\n" not in told.partition(b"go on with: ")[2]:
        with contextlib.suppress(OSError):  # the terminal is gone with its last process
            told += os.read(terminal, 65536) if select.select([terminal], [], [], 0.5)[0] else b""
        if not pressed and told.count(b"tokens/s") > 3:
            pressed = bool(os.write(terminal, b"\x03"))
    assert pressed, told.decode()
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGINT, told.decode()
    text = told.decode().replace("\r\n", "\n")
    assert text.index("Ctrl-C: the run finishes this step, saves and ends") < text.index("asked to stop: step")
    (again,) = re.findall(r"is saved; go on with: (.*)\n", text)
    assert again == shlex.join([*words, "train.checkpoint.resume=auto"])
    _until_gone(
        [psutil.Process(pid) for pid in (_beat(run_dir, rank)["pid"] for rank in (0, 1)) if psutil.pid_exists(pid)]
    )
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert saved.name == f"step-{_beat(run_dir, 0)['step']:08d}" and (saved / "manifest.json").exists()
