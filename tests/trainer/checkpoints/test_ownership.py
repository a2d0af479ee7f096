"""Whose a mirror is: of two runs that name one, and of two starts of one run, only one writes there."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data import urls
from launch.doctor import storage
from launch.doctor.findings import run as findings_of
from tests.trainer.checkpoints.test_mirror import NAMES, until
from tests.trainer.checkpoints.test_resume import fake
from trainer.checkpoints import resume
from trainer.checkpoints.bucket import Bucket
from trainer.checkpoints.mirror import Mirror, open_mirror
from trainer.checkpoints.ownership import Start
from trainer.config import PretrainConfig
from trainer.distributed import ALONE


class Run:
    """A run folder with checkpoints, and its starts with the mirror that all of them name."""

    def __init__(self, tiny: dict[str, Any], folder: Path, name: str, *steps: int) -> None:
        self.folder, self.url = folder / name, f"file://{folder}/away"
        train = {**tiny["train"], "run_dir": str(self.folder), "checkpoint": {"mirror": self.url}}
        self.config = PretrainConfig.model_validate(tiny | {"train": train})
        (self.folder / "checkpoints").mkdir(parents=True)
        for step in steps:
            fake(self.folder / "checkpoints", step)

    def start(self) -> Mirror:
        """As a run with ``resume: auto`` does."""
        checkpoints, metrics = self.folder / "checkpoints", self.folder / "metrics.jsonl"
        found = resume.find_checkpoint(checkpoints, "auto", ALONE, self.url, metrics)
        log = logging.getLogger(self.folder.name)
        mirror = open_mirror(checkpoints, metrics, self.config, ALONE, log, found)
        assert mirror is not None
        return mirror


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls.with_retries, "__defaults__", (2, 0.001))


def test_a_run_with_checkpoints_is_not_mixed_with_another_run_s(tiny: dict[str, Any], tmp_path: Path) -> None:
    one, other = Run(tiny, tmp_path, "one", 1, 2), Run(tiny, tmp_path, "other", 1)
    assert one.start().close(20.0) == []
    with pytest.raises(ValueError, match=rf"{one.url} belongs to another run, .* give this run a mirror of its own"):
        other.start()
    finding = findings_of({"mirror": lambda: storage.mirror(other.config.train)})[0]
    assert finding.level == "error" and "belongs to another run" in finding.found
    assert Bucket(one.url).whole() == [NAMES[2], NAMES[1]]  # nothing is set aside, nor written over
    assert one.start().close(20.0) == []  # a later start of the same run


def test_a_run_that_went_on_elsewhere_is_not_taken_back(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = Run(tiny, tmp_path, "here", 1), Run(tiny, tmp_path, "there")
    assert here.start().close(20.0) == []
    assert there.start().close(20.0) == [] and "copying step-00000001" in capsys.readouterr().out
    assert there.start().close(20.0) == []
    with pytest.raises(ValueError, match="or this run has resumed from it on another disk"):
        here.start()
    shutil.rmtree(here.folder)
    assert here.start().close(20.0) == []


def test_of_two_runs_that_live_only_the_later_one_writes(
    tiny: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first has a checkpoint there, nobody can tell it from one whose disk is lost."""
    first = Run(tiny, tmp_path, "first")
    living = first.start()
    assert Run(tiny, tmp_path, "second").start().close(20.0) == []
    living.wake(fake(first.folder / "checkpoints", 1).name)
    until(lambda: "nothing more is mirrored: another start now writes to" in caplog.text)
    started = time.monotonic()
    assert living.close(20.0) == [NAMES[1]] and time.monotonic() - started < 10
    assert "another start has taken it over" in caplog.text and Bucket(first.url).whole() == []


def test_the_end_does_not_wait_for_a_mirror_that_gives_up_meanwhile(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked, answer = Run(tiny, tmp_path, "run"), threading.Event(), threading.Event()

    def problem(start: Start, bucket: Bucket) -> str:
        asked.set()
        assert answer.wait(20)
        return "another start writes there"

    monkeypatch.setattr(Start, "problem", problem)
    name = fake(run.folder / "checkpoints", 1).name
    living = run.start()
    assert asked.wait(20)
    threading.Timer(0.5, answer.set).start()  # once close() waits
    started = time.monotonic()
    assert living.close(20.0) == [name] and time.monotonic() - started < 10


def test_a_mirror_that_answers_late_is_taken_then(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> Any:
        raise ConnectionError("gone")

    run = Run(tiny, tmp_path, "run", 1)
    with monkeypatch.context() as broken:
        broken.setattr(Bucket, "starts", gone)
        living = run.start()
    assert living.close(20.0) == [] and len(Bucket(run.url).starts()) == 1
