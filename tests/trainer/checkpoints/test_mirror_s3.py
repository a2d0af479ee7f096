"""Runs that are mirrored to a real S3 server: lost disks, a server that is gone, rights that are not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.logged import losses_of
from tests.ranks import Processes
from tests.s3 import S3
from trainer.checkpoints import manifest
from trainer.distributed import ALONE

Write = Callable[..., str]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    yield server
    server.stop()


@pytest.fixture
def run(tiny: dict[str, Any]) -> Path:
    tiny["train"]["checkpoint"] |= {"resume": "auto", "mirror_wait_s": 30}
    return Path(tiny["train"]["run_dir"])


def impatient() -> None:
    """In the run's processes: a server that does not answer is asked two times, at once."""
    from data import urls

    urls.with_retries.__defaults__ = 2, 0.1  # type: ignore[attr-defined]


def start(config: str, s3: S3, *overrides: str, ranks: int = 1) -> Processes:
    return Processes(
        "pretrain.train", config, *overrides, count=ranks, ranks=True, variables=s3.variables, first=impatient
    )


def test_two_ranks_go_on_where_the_lost_disk_was(s3: S3, tiny: dict[str, Any], run: Path, write_config: Write) -> None:
    """The metrics of before are there again, too."""
    config, mirror = write_config(tiny), f"train.checkpoint.mirror={s3.bucket('lost-disk')}/run"
    with start(config, s3, mirror, "train.stop_at_step=2", ranks=2) as first:
        assert first.end() == [0, 0] and "mirrored step-00000002 to s3://lost-disk/run in " in first.output
    before = losses_of(run)
    shutil.rmtree(run)
    keys = s3.keys("lost-disk")
    assert {"run/config.yaml", "run/metrics.jsonl", "run/step-00000002/manifest.json"} < set(keys)
    with start(config, s3, mirror, ranks=2) as second:
        assert second.end() == [0, 0], second.output
    assert "copying step-00000002 from s3://lost-disk/run" in second.output
    after = losses_of(run)
    assert "at step 2" in second.output and after == before | after and sorted(after) == [1, 2, 3, 4]
    assert "run/step-00000004/manifest.json" in s3.keys("lost-disk")


def test_a_server_that_is_gone_stops_nothing(s3: S3, tiny: dict[str, Any], run: Path, write_config: Write) -> None:
    mirror = f"train.checkpoint.mirror={s3.bucket('gone')}/run"
    config = write_config(tiny)
    with start(config, s3, mirror, "train.stop_at_step=2") as first:
        assert first.end() == [0]
    before = s3.keys("gone")
    s3.stop()
    try:
        with start(config, s3, mirror, "train.checkpoint.mirror_wait_s=1") as second:
            assert second.end() == [0], second.output
        with start(config, s3, mirror, f"train.run_dir={run}-empty") as third:
            refused = third.error()
    finally:
        s3.start()
    told = second.output
    assert "s3://gone/run cannot be used (EndpointConnectionError: Could not connect" in told
    assert f"; the run goes on from {run}/checkpoints/step-00000002" in told
    assert "checkpoints cannot be mirrored to s3://gone/run (EndpointConnectionError" in told
    assert "may not be in the mirror s3://gone/run: step-00000004, step-00000002 (EndpointConnectionError" in told
    assert manifest.newest_whole(run / "checkpoints", ALONE) == (run / "checkpoints/step-00000004", [])
    assert "so it is not known whether there is a checkpoint to resume from" in refused  # and no start from scratch
    assert s3.keys("gone") == before
    with start(config, s3, mirror) as fourth:  # all steps are done; what was left is copied
        assert fourth.end() == [0] and "mirrored step-00000004 to s3://gone/run" in fourth.output, fourth.output


def test_rights_that_are_not_there(s3: S3, tiny: dict[str, Any], run: Path, write_config: Write) -> None:
    config = write_config(tiny)
    with start(config, s3, "train.checkpoint.mirror=s3://no-such-bucket/run") as none:
        sentence = none.error()
    assert "s3://no-such-bucket/run cannot be used (FileNotFoundError: The specified bucket does not exist" in sentence
    s3.bucket("locked")
    s3.deny("locked", "PutObject")
    with start(config, s3, "train.checkpoint.mirror=s3://locked/run") as locked:
        assert locked.error() == (
            "error: train.checkpoint.mirror s3://locked/run cannot be used (PermissionError: Forbidden); grant access "
            "to it or correct the name, or leave it out"
        )
    assert not (run / "checkpoints").exists() or not any((run / "checkpoints").iterdir())


def test_half_a_copy_is_not_gone_on_from(s3: S3, tiny: dict[str, Any], run: Path, write_config: Write) -> None:
    """One file of the last checkpoint may not be written: the run ends well, and an empty disk gets the one before."""
    config, mirror = write_config(tiny), f"train.checkpoint.mirror={s3.bucket('half')}/run"
    s3.deny("half", "PutObject", "run/step-00000004/trainer.pt")
    with start(config, s3, mirror, "train.checkpoint.mirror_wait_s=0.5") as first:
        assert first.end() == [0], first.output
    assert "checkpoints cannot be mirrored to s3://half/run (PermissionError: Forbidden)" in first.output
    assert "may not be in the mirror s3://half/run: step-00000004 (PermissionError: Forbidden)" in first.output
    there = {key.removeprefix("run/step-00000004/") for key in s3.keys("half") if "step-00000004" in key}
    assert there and not there & {"trainer.pt", "manifest.json"}
    shutil.rmtree(run)
    s3.allow("half")
    with start(config, s3, mirror) as second:
        assert second.end() == [0], second.output
    assert "copying step-00000002 from s3://half/run" in second.output and "at step 2" in second.output
    assert "run/step-00000004/manifest.json" in s3.keys("half")
