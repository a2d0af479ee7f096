"""What stays, what it takes at most, and that a disk or quota too small for it is noticed at the start."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.trainer.checkpoints.test_resume import fake
from trainer.checkpoints import manifest, retention
from trainer.checkpoints import save as saving
from trainer.checkpoints.layout import step_of
from trainer.config import PretrainConfig
from trainer.config_blocks import CheckpointConfig, TrainConfig
from trainer.distributed import World
from trainer.exit_status import EXIT_MISTAKE

GB = 10**9
SIZE = 16.0 * GB  # bytes of a checkpoint


def training(steps: int = 100, **checkpoints: Any) -> TrainConfig:
    block = {"steps": steps, "global_batch_samples": 1, "micro_batch_samples": 1, "checkpoint": checkpoints}
    return TrainConfig.model_validate(block)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have every disk so many GB free."""

    def free(gigabytes: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(gigabytes * GB)))

    return free


@pytest.mark.parametrize(
    ("steps", "every", "keep", "milestones"),
    [
        (100, 10, 2, 0),
        (100, 10, 2, 30),
        (95, 10, 3, 20),
        (9, 10, 2, 5),
        (10, 10, 1, 10),
        (40, 7, 1, 14),
        (30, 10, 5, 10),
    ],
)
def test_themost_at_once_is_what_a_run_comes_to(
    tmp_path: Path, world: World, steps: int, every: int, keep: int, milestones: int
) -> None:
    config = CheckpointConfig.model_validate({"every_steps": every, "keep": keep, "keep_every_steps": milestones})
    most = 0
    for step in [*range(every, steps, every), steps]:
        saved = fake(tmp_path, step)
        most = max(most, len(retention.newest_first(tmp_path)))
        retention.prune(tmp_path, saved, config)
    train = training(steps, every_steps=every, keep=keep, keep_every_steps=milestones)
    assert retention.most_at_once(train) == most


def test_what_cannot_be_deleted_now_fails_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a file that somebody reads keeps its folder; it goes with a later one."""
    config, delete = CheckpointConfig.model_validate({"keep": 1}), os.rmdir

    def held(path: Any, **options: Any) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    monkeypatch.setattr(os, "rmdir", held)
    for step in (1, 2, 2, 3):
        if (again := tmp_path / f"step-{step:08d}").exists():
            retention.remove(again)
        retention.prune(tmp_path, fake(tmp_path, step), config)
        assert [step_of(path) for path in retention.newest_first(tmp_path)] == [step]
    monkeypatch.setattr(os, "rmdir", delete)
    for stale in retention.leftovers(tmp_path):
        shutil.rmtree(stale)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(("every", "left"), [(3, [1, 2, 3]), (1, [2, 3])])
def test_no_whole_one_goes_in_the_place_of_a_torn_one(
    tiny: dict[str, Any], train_here: Callable[..., int], every: int, left: list[int]
) -> None:
    """Step 2 was torn: it counts once the run has written it again, and goes with those that are as old."""
    folder, keep = Path(tiny["train"]["run_dir"]) / "checkpoints", "train.checkpoint.keep=2"
    assert train_here(tiny, keep, "train.checkpoint.every_steps=1", "train.stop_at_step=2") == 0
    (folder / "step-00000002" / "trainer.pt").write_bytes(b"")
    again = (keep, "train.checkpoint.resume=required", f"train.checkpoint.every_steps={every}")
    assert train_here(tiny, *again, "train.stop_at_step=3") == 0
    assert sorted(step_of(path) for path in retention.newest_first(folder)) == left
    assert train_here(tiny, *again) == 0
    assert sorted(step_of(path) for path in retention.newest_first(folder)) == [3, 4]


def test_while_fewer_than_are_kept_are_whole_a_torn_one_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        fake(tmp_path, step)
    keep_two = CheckpointConfig.model_validate({"keep": 2})
    torn = {"step-00000001", "step-00000002"}
    retention.prune(tmp_path, tmp_path / "step-00000003", keep_two, torn=torn)
    assert len(list(tmp_path.iterdir())) == 3
    retention.prune(tmp_path, fake(tmp_path, 4), keep_two, torn=torn)
    assert [step_of(path) for path in retention.newest_first(tmp_path)] == [4, 3]


def test_saves_by_the_clock_may_be_more_than_those_by_steps() -> None:
    by_steps = training(100, every_steps=100, keep=3, keep_every_steps=50)
    assert (retention.most_at_once(by_steps), retention.most_at_once(training(100, every_steps=100, keep=3))) == (1, 1)
    by_clock = training(100, every_steps=100, every_minutes=5, keep=3, keep_every_steps=50)
    assert retention.most_at_once(by_clock) == 5  # three, the one being written, and step 50


def test_a_disk_that_will_not_hold_the_run_is_told_at_its_start(
    tmp_path: Path, world: World, disk: Callable[[float], None]
) -> None:
    """Two to keep, one being written, and the milestones of steps 30 and 60 behind them: 80 GB."""
    train = training(every_steps=10, keep=2, keep_every_steps=30)
    disk(80.001)
    assert retention.check_plan(SIZE, tmp_path, train, world) is None
    disk(79)
    assert retention.check_plan(SIZE, tmp_path, train, world) == (
        "this run will keep 5 checkpoints at once (train.checkpoint.keep, keep_every_steps and the one being written), "
        f"about 16.000 GB each, but {tmp_path} has only 79.000 GB for them; make room there before it is full, or keep "
        "fewer"
    )
    big = fake(tmp_path, 30) / "deepspeed" / "weights.pt"  # a resumed run: what it has saved is part of the five
    with open(big, "wb") as file:
        file.truncate(2 * GB)
    assert retention.check_plan(SIZE, tmp_path, train, world) is None


def test_a_quota_too_small_for_the_run_does_not_let_it_start(
    tmp_path: Path, world: World, disk: Callable[[float], None]
) -> None:
    disk(1000)
    checkpoints = {"every_steps": 10, "keep": 2, "keep_every_steps": 30}
    assert retention.check_plan(SIZE, tmp_path, training(**checkpoints, max_gb=80.001), world) is None
    with pytest.raises(ValueError) as told:
        retention.check_plan(SIZE, tmp_path, training(**checkpoints, max_gb=79.5), world)
    assert str(told.value).startswith("train.checkpoint.max_gb (79.5) is too small for 5 checkpoints at once")
    assert str(told.value).endswith(f"in {tmp_path}; raise it to 80.000, or keep fewer")
    for name in ("abandoned-1", "step-00000020.partial"):  # the second is gone with the next save
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "weights.pt", "wb") as file:
            file.truncate(3 * GB)
    with pytest.raises(ValueError, match=r"each beside 3\.000 GB of other files in .*; raise it to 83\.000"):
        retention.check_plan(SIZE, tmp_path, training(**checkpoints, max_gb=81), world)


def test_a_save_that_the_quota_has_no_room_for_is_refused(
    tmp_path: Path, world: World, disk: Callable[[float], None]
) -> None:
    disk(1000)
    with open(fake(tmp_path, 7) / "deepspeed" / "more.pt", "wb") as file:
        file.truncate(15 * GB)
    retention.check_room(SIZE, tmp_path, "step-00000008", 31.1)
    retention.check_room(SIZE, tmp_path, "step-00000008", None)
    with pytest.raises(ValueError) as told:
        retention.check_room(SIZE, tmp_path, "step-00000008", 30.0)
    assert str(told.value) == (
        f"checkpoint step-00000008 needs about 16.000 GB in {tmp_path}, where train.checkpoint.max_gb (30) leaves "
        "15.000 GB; raise it, or remove files there that are no longer needed and resume: the newest checkpoint is "
        "step-00000007"
    )


def test_a_run_with_a_quota_ends_before_it_begins_or_with_the_older_checkpoint_whole(
    tiny: dict[str, Any], world: World, train_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 1.2 MB each and three at once; the quota then shrinks by what somebody else puts there."""
    folder = Path(tiny["train"]["run_dir"]) / "checkpoints"
    tiny["train"]["log"]["images"] = False
    assert train_here(tiny, "train.checkpoint.max_gb=0.001") == EXIT_MISTAKE
    assert "error: train.checkpoint.max_gb (0.001) is too small for 2 checkpoints at once" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    assert train_here(tiny, "train.steps=2", "train.checkpoint.max_gb=0.01") == 0
    save = saving.check_room

    def meanwhile(*arguments: Any) -> None:
        (folder / "notes").write_bytes(bytes(8_500_000))
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "check_room", meanwhile)
        assert train_here(tiny, "train.checkpoint.resume=auto", "train.checkpoint.max_gb=0.01") == EXIT_MISTAKE
    error = capsys.readouterr().err
    assert "checkpoint step-00000004 needs about 0.00" in error and error.endswith("checkpoint is step-00000002\n")
    assert manifest.newest_whole(folder, world) == (folder / "step-00000002", [])


@pytest.mark.parametrize(
    ("optimizer", "precision", "stage", "expected"),
    [
        ("adamw", "fp32", 0, 12 * 800 + 4 * 100),  # the weights are their own masters
        ("adamw", "fp32", 2, 16 * 800 + 4 * 100),
        ("adamw", "bf16", 2, 14 * 800 + 2 * 100),
        ("adamw", "bf16", 3, 12 * 800 + 2 * 100),  # no weights, but for those that do not train
        ("adafactor", "fp32", 0, 4 * 800 + 4 * (20 + 40) + 4 * 100),
    ],
)
def test_what_a_checkpoint_takes(
    configure: Callable[..., PretrainConfig], optimizer: str, precision: str, stage: int, expected: int
) -> None:
    config = configure(
        f"train.optimizer.kind={optimizer}", f"train.precision={precision}", f"deepspeed.zero_stage={stage}"
    )
    module = nn.ModuleList([nn.Linear(20, 40, bias=False), nn.Linear(10, 10, bias=False).requires_grad_(False)])
    assert retention.checkpoint_bytes(module, config) == expected
