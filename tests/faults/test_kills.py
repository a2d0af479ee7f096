"""``kill -9`` at random moments, again and again: no run is lost, and none goes on wrong without a word.

The launchers' own deaths are in ``tests/trainer/monitor/test_orphan.py``.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launching import start
from tests.ranks import Ranks
from trainer.checkpoints import manifest
from trainer.checkpoints.retention import step_of
from trainer.distributed import ALONE
from trainer.exit_status import EXIT_STALLED

Write = Callable[[dict[str, Any]], str]


def lines(run: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` as far as it is there, without a line that a kill cut."""
    path, found = run / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def exact(run: Path) -> dict[int, dict[str, Any]]:
    """All figures by step but those of the clock and the memory."""
    steps: dict[int, dict[str, Any]] = {}
    for line in lines(run):
        kept = {name: value for name, value in line.items() if not name.startswith(("speed/", "memory/"))}
        steps.setdefault(line["step"], {}).update(kept)
    return steps


def _changed(path: Path) -> float:
    """When, in seconds since 1970; 0 if there is no such file now."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class Chain:
    """One run that is killed and started again until it is done."""

    def __init__(self, config: str, run: Path, steps: int, seed: int):
        self.config, self.run, self.steps, self.dice = config, run, steps, random.Random(seed)
        self.checkpoints = run / "checkpoints"
        self.kills = self.in_a_save = 0

    def newest(self) -> int:
        """Step of the newest whole checkpoint; 0 without one."""
        found, _ = manifest.newest_whole(self.checkpoints, ALONE)
        return 0 if found is None else step_of(found)

    def once(self, ranks: int) -> None:
        """Start, let it come to a random moment, kill, and see what is left."""
        before, began = self.newest(), time.time()
        with Ranks(self.config, f"train.steps={self.steps}", count=ranks) as running:
            moment = self.dice.choice(("start", "step", "save", "save", "save"))
            self._wait(running, moment, before)
            victims = [] if moment == "start" else self.dice.choice(([], [], [0], [ranks - 1]))
            whole = max((step_of(p.parent) for p in self.checkpoints.glob("step-????????/manifest.json")), default=0)
            running.kill(*victims)
            statuses = running.end()
        self.kills += 1
        torn = [path.name for path in self.checkpoints.glob("*.partial") if _changed(path) > began]
        self.in_a_save += bool(torn)
        who = f"rank {victims[0]}" if victims else "all ranks"
        print(f"kill {self.kills}: {who} of {ranks}, {moment}, from step {before}; whole {whole}, torn {torn}")
        if moment != "start":
            assert "resumed from" in running.output if before else "step      0" in running.output, running.output
            assert not before or f"at step {before}" in running.output
        assert self.newest() >= whole >= before, running.output[-3000:]
        survivors = [status for rank, status in enumerate(statuses) if victims and rank not in victims]
        assert all(status == EXIT_STALLED for status in survivors), running.output[-3000:]

    def _wait(self, running: Ranks, moment: str, before: int) -> None:
        if moment == "start":
            time.sleep(self.dice.uniform(0, 3))
            return
        if moment == "step":
            count = self.dice.randint(1, 5)
            running.wait_until(lambda: len(re.findall("^step +[0-9,]+  loss", running.output, re.MULTILINE)) >= count)
            time.sleep(self.dice.uniform(0, 0.1))
            return
        step, began = before + 2 * self.dice.randint(1, 2), time.time()
        whole, partial = (self.checkpoints / f"step-{step:08d}{ending}" for ending in ("", ".partial"))
        running.wait_until(lambda: _changed(partial) > began or whole.exists())  # it may be over in no time
        time.sleep(self.dice.uniform(0, 0.04))

    def to_the_end(self, ranks: int) -> None:
        """The last start, which nobody disturbs."""
        with Ranks(self.config, f"train.steps={self.steps}", count=ranks) as running:
            assert running.end() == [0] * ranks, running.output[-3000:]


def _chain(tiny: dict[str, Any], write_config: Write, kills: int, sizes: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    """Metrics of a run that was killed so often, and of one that was not."""
    run, steps = Path(tiny["train"]["run_dir"]), 20 * kills + 10  # a start may come far before its kill
    chain = Chain(write_config(tiny), run, steps, seed)
    print(f"seed {seed}")
    for number in range(kills):
        chain.once(sizes[number % len(sizes)])
    chain.to_the_end(sizes[0])
    print(f"{chain.kills} kills, {chain.in_a_save} of them left a checkpoint half written")
    tiny["train"]["run_dir"] = str(run) + "-undisturbed"
    calm = Chain(write_config(tiny), Path(tiny["train"]["run_dir"]), steps, seed)
    calm.to_the_end(sizes[0])
    killed, undisturbed = exact(chain.run), exact(calm.run)
    assert sorted(killed) == sorted(undisturbed) == list(range(steps + 1))
    return killed, undisturbed


@pytest.mark.parametrize("kills", [2, pytest.param(32, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tiny, write_config, kills: int) -> None:
    """Bit by bit: every loss, density, price and validation figure of every step."""
    killed, undisturbed = _chain(tiny, write_config, kills, (2,), seed=7)
    assert killed == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [2, 3])
def test_kills_with_resumes_at_another_number_of_ranks(tiny, write_config, stage: int) -> None:
    """Two ranks and one by turns: equal to rounding."""
    tiny["deepspeed"]["zero_stage"] = stage
    killed, undisturbed = _chain(tiny, write_config, 6, (2, 1), seed=11)
    for step, line in undisturbed.items():
        for name in ("train/loss", "validation/code/loss"):
            if name in line:
                assert math.isclose(killed[step][name], line[name], rel_tol=1e-3), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "status"), [("deepspeed", 256 - signal.SIGKILL), ("torchrun", 1)])
def test_a_rank_killed_under_a_launcher(tiny, write_config, launcher: str, status: int) -> None:
    """The launcher ends the other one; what it returns is its own affair."""
    config, run = write_config(tiny), Path(tiny["train"]["run_dir"])
    with start("pretrain.train", config, processes=2, launcher=launcher) as process:
        deadline = time.monotonic() + 240
        while not list(run.glob("checkpoints/step-*/manifest.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(json.loads((run / "heartbeat/rank-1.json").read_text())["pid"], signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output[-3000:]
    with Ranks(config) as again:
        again.wait_until(lambda: "resumed from" in again.output)
