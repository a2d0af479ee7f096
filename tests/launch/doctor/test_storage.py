"""What the doctor says of where a run writes: disk, run folder, trackers and mirror."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from data.files import nearest_folder
from launch.doctor import storage
from launch.doctor.findings import Finding, run
from tests.launch.doctor.helpers import only
from tests.trainer.checkpoints.test_resume import fake
from trainer.config_blocks import TrainConfig


def test_the_disk_must_hold_the_checkpoints(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert only(storage.space(tmp_path, None, 0)).level == "ok"
    assert only(storage.space(tmp_path, free / 10, keep=2)).level == "ok"
    assert only(storage.space(tmp_path, free / 2, keep=2)).level == "warning"
    full = only(storage.space(tmp_path, 2.0 * free, keep=2))
    assert full.level == "error" and "train.run_dir" in full.remedy


def test_write_speed_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    assert "GB/s" in only(storage.write_speed(tmp_path, None, probe_bytes=2**20)).found
    assert list(tmp_path.iterdir()) == []
    assert storage.judge_speed(1e9, 100e9).level == "ok"
    assert storage.judge_speed(1e8, 100e9).level == "warning"


def test_a_folder_that_cannot_be_written_is_an_error() -> None:
    finding = only(run({"write speed": lambda: storage.write_speed(Path("/proc"), None)}))
    assert finding.level == "error" and "/proc" in finding.found


def test_a_run_folder_in_use_is_an_error(tiny: dict[str, Any], tmp_path: Path) -> None:
    train = TrainConfig.model_validate(tiny["train"])
    assert only(storage.run_folder(train)).level == "ok"
    required = train.model_copy(update={"checkpoint": train.checkpoint.model_copy(update={"resume": "required"})})
    nothing = only(storage.run_folder(required))
    assert nothing.level == "error" and "nothing to resume from" in nothing.found
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    taken = only(run({"run folder": lambda: storage.run_folder(train)}))
    assert taken.level == "error" and "already holds step-00000002" in taken.found
    assert taken.remedy.startswith("set train.checkpoint.resume=auto")
    assert only(storage.run_folder(required)).level == "ok"


def test_a_tracker_that_cannot_be_used_is_an_error(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train = TrainConfig.model_validate(tiny["train"])
    assert only(storage.trackers(train)).found == "tensorboard"
    log = train.log.model_copy(update={"trackers": ["mlflow"]})
    finding = only(run({"trackers": lambda: storage.trackers(train.model_copy(update={"log": log}))}))
    assert finding.level == "error" and finding.found.startswith("train.log.trackers has mlflow, ")


def test_a_mirror_is_looked_at(tiny: dict[str, Any], tmp_path: Path) -> None:
    def finding(url: str, setting: str) -> Finding:
        block = tiny["train"] | {"checkpoint": {"mirror": url, "resume": setting}}
        return only(run({"mirror": lambda: storage.mirror(TrainConfig.model_validate(block))}))

    url = f"file://{tmp_path}/away"
    empty = finding(url, "auto")
    assert empty.level == "ok" and empty.found.startswith(
        f"{url}: no checkpoint there; a small file written and removed"
    )
    assert list((tmp_path / "away").iterdir()) == []
    assert "there is no checkpoint" in finding(url, "required").found
    fake(tmp_path / "away", 3)
    assert "the newest checkpoint there is step-00000003" in finding(url, "required").found
    taken = finding(url, "never")
    assert taken.level == "error" and taken.found == f"{url} already holds step-00000003"
    assert "the protocol 's33' is not known" in finding("s33://bucket/run", "auto").found
    unwritable = finding("file:///proc/none", "auto")
    assert (
        unwritable.level == "error" and "train.checkpoint.mirror file:///proc/none cannot be used" in unwritable.found
    )


def test_the_folder_asked_is_one_that_exists(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
