"""The run folder's disk: full, read-only, and gone. A file system of its own below it; needs the right to mount one.

What a full disk does to a save by the byte: ``tests/trainer/checkpoints/test_full_disk.py``.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_kills import lines
from tests.ranks import Ranks
from trainer.checkpoints import manifest
from trainer.distributed import ALONE
from trainer.exit_status import EXIT_PREEMPTED


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")


class Disk:
    """A file system of 64 MiB."""

    def __init__(self, place: Path):
        self.place, self.ballast = place, place / "ballast"
        place.mkdir()
        mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place))

    def fill(self) -> None:
        """To the last byte."""
        with contextlib.suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass

    def read_only(self) -> None:
        """From now on, for whatever is opened; Linux lets files that are open be written on."""
        mount("--bind", str(self.place), str(self.place))
        mount("-o", "remount,bind,ro", str(self.place))

    def close(self) -> None:
        """Unmount all."""
        while self.place.is_mount():
            subprocess.run(["umount", "--lazy", str(self.place)], check=True)


@pytest.fixture
def disk(tmp_path: Path, tiny: dict[str, Any]) -> Iterator[Disk]:
    """Under the tiny run's folder."""
    made = Disk(tmp_path / "disk")
    tiny["train"]["run_dir"] = str(made.place / "run")
    yield made
    made.close()


def test_a_disk_that_is_full_for_a_while_costs_nothing(tiny, write_config, disk) -> None:
    tiny["train"]["checkpoint"]["every_steps"] = 1000
    config, run = write_config(tiny), Path(tiny["train"]["run_dir"])
    with Ranks(config) as ranks:
        ranks.wait_until(lambda: "step      3" in ranks.output)
        disk.fill()
        ranks.wait_until(lambda: "cannot be written (No space left on device); its lines wait" in ranks.output)
        disk.ballast.unlink()
        ranks.wait_until(lambda: "can be written again; no line is missing" in ranks.output)
        ranks.processes[1].terminate()
        assert ranks.end() == [EXIT_PREEMPTED] * 2
        assert "Traceback" not in ranks.output and "Logging error" not in ranks.output
    steps = [line["step"] for line in lines(run) if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert all(json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_save_ends_the_run_and_the_next_start(tiny, write_config, disk) -> None:
    config, run = write_config(tiny), Path(tiny["train"]["run_dir"])
    with Ranks(config) as ranks:
        ranks.wait_until(lambda: ranks.output.count("saved ") == 2)
        disk.fill()
        error = ranks.error()
    newest, _ = manifest.newest_whole(run / "checkpoints", ALONE)
    assert newest is not None and error.endswith(f"resume: the newest checkpoint is {newest.name}")
    with Ranks(config) as ranks:  # refused at once, or at its first save if the heartbeats' removal made a little room
        assert "make room there" in ranks.error() and str(run) in ranks.error()
    disk.ballast.unlink()
    with Ranks(config, "train.checkpoint.resume=required") as ranks:
        ranks.wait_until(lambda: f"resumed from {newest} at step {int(newest.name[5:])}" in ranks.output)


@pytest.mark.slow
def test_a_run_folder_that_becomes_read_only_and_one_that_is(tiny, write_config, disk) -> None:
    config = write_config(tiny)
    with Ranks(config) as ranks:
        ranks.wait_until(lambda: ranks.output.count("saved ") == 2)
        disk.read_only()
        error = ranks.error()
        assert ranks.output.count("tracker tensorboard did not take scalars (OSError") == 1
    checkpoints = Path(tiny["train"]["run_dir"]) / "checkpoints"
    newest, _ = manifest.newest_whole(checkpoints, ALONE)
    assert newest is not None and "Read-only file system" in error and newest.name in error
    with Ranks(config) as ranks:
        assert "cannot be written (Read-only file system); make room there and make it" in ranks.error()


@pytest.mark.parametrize(
    ("remove", "every_steps"),
    [
        (shutil.rmtree, 1000),
        pytest.param(shutil.rmtree, 2, marks=pytest.mark.slow),  # some of the time while a checkpoint is written
        pytest.param(lambda run: run.rename(f"{run}-moved"), 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_folder_that_is_removed_is_written_again_with_the_state_in_memory(
    tiny, write_config, remove: Callable[[Path], object], every_steps: int
) -> None:
    tiny["train"]["checkpoint"]["every_steps"] = every_steps
    config, run = write_config(tiny), Path(tiny["train"]["run_dir"])
    with Ranks(config) as ranks:
        ranks.wait_until(lambda: "step      5" in ranks.output)
        for _ in range(9):
            with contextlib.suppress(OSError):  # files come into the folder while it is being removed
                remove(run)
                break
        assert ranks.end() == [EXIT_PREEMPTED] * 2, ranks.output
        assert (
            f"the run folder {run} is gone, with its contents; a checkpoint of the current state is written"
            in ranks.output
        )
        assert "Traceback" not in ranks.output and "Logging error" not in ranks.output, ranks.output
        (step,) = re.findall("asked to stop: step ([0-9,]+) is saved", ranks.output)
    newest, torn = manifest.newest_whole(run / "checkpoints", ALONE)
    assert newest == run / f"checkpoints/step-{int(step.replace(',', '')):08d}" and not torn
    with Ranks(config) as ranks:
        ranks.wait_until(lambda: f"resumed from {newest} at step {step}" in ranks.output and len(lines(run)) > 2)
        ranks.processes[0].terminate()
        assert ranks.end() == [EXIT_PREEMPTED] * 2
    assert (run / "config.yaml").exists()
