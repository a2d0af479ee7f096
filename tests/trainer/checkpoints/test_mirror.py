"""Copies in a bucket: what is there and when, what failures do, and how an empty run folder gets them back."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data import urls
from tests.trainer.checkpoints.test_resume import fake
from trainer.checkpoints import manifest, resume, retention
from trainer.checkpoints.bucket import Bucket
from trainer.checkpoints.mirror import Mirror
from trainer.config_blocks import CheckpointConfig
from trainer.distributed import ALONE

NAMES = [f"step-{step:08d}" for step in range(10)]


class Place:
    """A run's checkpoints, and where they are mirrored to: another folder, by its URL."""

    def __init__(self, folder: Path) -> None:
        self.run, self.away = folder / "run", folder / "away"
        self.checkpoints = self.run / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        self.url = f"file://{self.away}"
        self.told: list[str] = []
        self.warned: list[str] = []

    def start(self, resumed: Path | None = None, **config: Any) -> Mirror:
        made, metrics = CheckpointConfig.model_validate({"mirror": self.url, **config}), self.run / "metrics.jsonl"
        return Mirror(self.checkpoints, metrics, made, self.told.append, self.warned.append, resumed)

    def mirror(self, resumed: Path | None = None, **config: Any) -> list[str]:
        """Copy all that is there, and end."""
        return self.start(resumed, **config).close(20.0)

    def resume(self, setting: str = "auto") -> Path | None:
        return resume.find_checkpoint(self.checkpoints, setting, ALONE, self.url, self.run / "metrics.jsonl")

    @property
    def whole(self) -> list[str]:
        return Bucket(self.url).whole()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(urls.with_retries, "__defaults__", (urls.ATTEMPTS, 0.001))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Have the bucket's writes of files fail; which were tried."""

    def fail(error: Exception, times: float, file: str = "") -> list[str]:
        from fsspec.implementations.local import LocalFileSystem

        tried, put_file = list[str](), LocalFileSystem.put_file

        def put(self: Any, path1: str, path2: str, **rest: Any) -> None:
            if file in path2:
                tried.append(path2)
                if len(tried) <= times:
                    raise error
            put_file(self, path1, path2, **rest)

        monkeypatch.setattr(LocalFileSystem, "put_file", put)
        return tried

    return fail


def test_the_newest_are_there_and_the_milestones(place: Place) -> None:
    for step in (1, 2, 3):
        fake(place.checkpoints, step)
    (place.run / "metrics.jsonl").write_text("{}\n")
    assert place.mirror() == [] and place.warned == []
    assert place.whole == [NAMES[3], NAMES[2]]
    assert manifest.problem_of(place.away / NAMES[3], ALONE) is None
    assert [sentence.split(" in ")[0] for sentence in place.told] == [
        f"mirrored {NAMES[step]} to {place.url}" for step in (3, 2)
    ]
    assert (place.away / "metrics.jsonl").read_text() == "{}\n"
    for step in (4, 5, 6):
        fake(place.checkpoints, step)
    assert place.mirror(mirror_keep=1, mirror_keep_every_steps=2) == []
    # Step 2 stays as one of every two, 4 is copied as one, 3 goes.
    assert place.whole == [NAMES[6], NAMES[4], NAMES[2]]
    assert sorted(found.name for found in place.away.glob("step*")) == [NAMES[step] for step in (2, 4, 6)]


def test_each_that_becomes_whole_is_copied_while_the_run_goes_on(place: Place) -> None:
    mirror = place.start()
    for step in (1, 2, 3):
        mirror.wake(fake(place.checkpoints, step).name)
        until(lambda step=step: NAMES[step] in place.whole)
    (place.run / "metrics.jsonl").write_text("the last evaluation\n")
    assert mirror.close(20.0) == [] and len(place.told) == 3
    assert (place.away / "metrics.jsonl").read_text() == "the last evaluation\n"


def test_a_bucket_that_fails_is_tried_again_and_told_once(place: Place, failing: Any) -> None:
    tried = failing(ConnectionError("gone"), times=3)
    fake(place.checkpoints, 1)
    assert place.mirror() == [] and place.whole == [NAMES[1]]
    assert len(tried) == 4
    assert place.warned == [
        f"checkpoints cannot be mirrored to {place.url} (ConnectionError: gone); training goes on, they stay in "
        f"{place.checkpoints}, and copying is retried"
    ]
    assert len(place.told) == 1 and place.told[0].endswith("; it works again")


def test_what_is_copied_already_is_not_copied_again(
    place: Place, failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.checkpoints import bucket

    monkeypatch.setattr(bucket, "_AT_ONCE", 1)
    checkpoint = fake(place.checkpoints, 1)
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "trainer.pt").write_bytes(b"state")
    manifest.write(checkpoint, {})
    tried = failing(ConnectionError("gone"), times=2, file="trainer.pt")
    others = failing(ConnectionError("never"), times=0, file="weights.pt")
    assert place.mirror() == [] and len(tried) == 3 and len(others) == 1


def test_half_a_copy_is_not_whole(place: Place, failing: Any) -> None:
    failing(ConnectionError("gone"), times=1e9, file=f"{NAMES[2]}/deepspeed")
    fake(place.checkpoints, 1)
    assert place.mirror() == []
    fake(place.checkpoints, 2)
    assert place.start().close(0.2) == [NAMES[2]]
    assert place.whole == [NAMES[1]]
    assert place.warned[-1] == (
        f"may not be in the mirror {place.url}: {NAMES[2]} (ConnectionError: gone); they are whole in "
        f"{place.checkpoints}, and the next start with this mirror copies those to be kept there"
    )
    shutil.rmtree(place.checkpoints)
    assert place.resume() == place.checkpoints / NAMES[1]


def test_the_next_start_copies_what_the_last_one_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(place.checkpoints, 1)
    with monkeypatch.context() as broken:
        broken.setattr(Bucket, "put", lambda *_: time.sleep(60))
        start = time.monotonic()
        assert place.start().close(0.1) == [NAMES[1]] and time.monotonic() - start < 5
        assert "train.checkpoint.mirror_wait_s (0.1) has passed" in place.warned[0]
    assert place.mirror() == [] and place.whole == [NAMES[1]]


def test_while_a_bucket_fails_the_newest_takes_the_place_of_the_one_before(place: Place, failing: Any) -> None:
    failing(ConnectionError("gone"), times=1e9, file=f"{NAMES[1]}/")
    fake(place.checkpoints, 1)
    mirror = place.start(mirror_keep=1)
    until(lambda: place.warned)
    mirror.wake(fake(place.checkpoints, 2).name)
    until(lambda: place.whole == [NAMES[2]])
    assert mirror.close(20.0) == [] and not (place.away / NAMES[1]).exists()


def test_what_is_being_copied_stays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, go_on, put = threading.Event(), threading.Event(), Bucket.put

    def slowly(*arguments: Any) -> bool:
        copying.set()
        assert go_on.wait(20)
        return put(*arguments)

    monkeypatch.setattr(Bucket, "put", slowly)
    config = CheckpointConfig.model_validate({"keep": 1})
    fake(place.checkpoints, 1)
    mirror = place.start()
    assert copying.wait(20) and mirror.held == NAMES[1]
    newest = fake(place.checkpoints, 2)
    retention.prune(place.checkpoints, newest, config, mirror.held)
    mirror.wake(newest.name)
    go_on.set()
    assert mirror.close(20.0) == [] and mirror.held is None and place.whole == [NAMES[2], NAMES[1]]
    retention.prune(place.checkpoints, newest, config, mirror.held)
    assert [found.name for found in place.checkpoints.iterdir()] == [NAMES[2]]


def test_one_that_is_removed_before_it_is_held_is_no_failure(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention looks at ``held`` just before the thread sets it."""
    from fsspec.implementations.local import LocalFileSystem

    put_file = LocalFileSystem.put_file

    def removed_first(self: Any, path1: str, path2: str, **rest: Any) -> None:
        if NAMES[1] in path1 and Path(path1).exists():
            retention.remove(place.checkpoints / NAMES[1])
        put_file(self, path1, path2, **rest)

    monkeypatch.setattr(LocalFileSystem, "put_file", removed_first)
    for step in (1, 2):
        fake(place.checkpoints, step)
    assert place.mirror() == [] and place.whole == [NAMES[2]] and place.warned == []


def test_a_copy_that_was_cut_off_does_not_count(place: Place) -> None:
    """Nor does it push a whole one out; it goes once it lies below those that are kept."""
    bucket = Bucket(place.url)
    for step in (1, 2, 3):
        bucket.put(fake(place.checkpoints, step), set(), lambda: False)
    (place.away / NAMES[2] / "manifest.json").unlink()
    bucket.prune(keep=2, keep_every_steps=0)
    assert place.whole == [NAMES[3], NAMES[1]] and (place.away / NAMES[2]).is_dir()
    bucket.put(fake(place.checkpoints, 4), set(), lambda: False)
    bucket.prune(keep=2, keep_every_steps=0)
    assert place.whole == [NAMES[4], NAMES[3]] and {path.name for path in place.away.iterdir()} == {NAMES[4], NAMES[3]}


def test_a_bucket_from_which_nothing_may_be_removed_fills_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Forbidden")

    for method in ("rm", "rm_file"):
        monkeypatch.setattr(LocalFileSystem, method, refuse)
    mirror = place.start(mirror_keep=1)
    for step in (1, 2, 3):
        mirror.wake(fake(place.checkpoints, step).name)
        until(lambda step=step: NAMES[step] in place.whole)
    assert mirror.close(20.0) == [] and place.whole == [NAMES[3], NAMES[2], NAMES[1]]
    assert place.warned == [
        f"{place.url}: checkpoints no longer kept there cannot be removed (PermissionError: Forbidden)"
    ]


def test_the_end_of_a_run_does_not_wait_out_a_long_pause(
    place: Place, failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "FIRST_PAUSE_S", 30.0)
    failing(ConnectionError("gone"), times=1)
    fake(place.checkpoints, 1)
    mirror = place.start()
    until(lambda: place.warned)
    start = time.monotonic()
    assert mirror.close(20.0) == [] and time.monotonic() - start < 10


def test_an_empty_run_folder_goes_on_from_the_mirror(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.resume() is None
    with pytest.raises(ValueError, match="there is no checkpoint"):
        place.resume("required")
    for step in (1, 2, 3):
        fake(place.checkpoints, step)
    (place.run / "metrics.jsonl").write_text("mine\n")
    place.mirror(mirror_keep=3)
    shutil.rmtree(place.run)
    (place.away / NAMES[3] / "deepspeed/weights.pt").write_bytes(b"torn")
    with pytest.raises(ValueError) as taken:
        place.resume("never")
    assert str(taken.value) == (
        f"{place.url} already holds {NAMES[3]}; set train.checkpoint.resume=auto to go on with that run, or give "
        "another train.checkpoint.mirror"
    )
    assert place.resume("required") == place.checkpoints / NAMES[2]
    assert manifest.newest_whole(place.checkpoints, ALONE)[0] == place.checkpoints / NAMES[2]
    assert (place.run / "metrics.jsonl").read_text() == "mine\n"
    out, err = capsys.readouterr()
    assert f"has no whole checkpoint; copying {NAMES[3]} from {place.url}" in out
    assert f"skipped: {NAMES[3]} of {place.url} is torn: deepspeed/weights.pt does not have the size" in err


def test_what_is_whole_here_is_taken_without_asking(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    here = fake(place.checkpoints, 1)
    monkeypatch.setattr(Bucket, "whole", lambda self: 1 / 0)
    assert place.resume() == here


def test_a_torn_one_here_is_replaced(place: Place) -> None:
    fake(place.checkpoints, 1)
    place.mirror()
    (place.checkpoints / NAMES[1] / "deepspeed/weights.pt").unlink()
    assert place.resume() == place.checkpoints / NAMES[1]
    assert manifest.problem_of(place.checkpoints / NAMES[1], ALONE) is None


def test_only_torn_ones_anywhere_is_an_error(place: Place) -> None:
    fake(place.checkpoints, 1)
    place.mirror()
    (place.away / NAMES[1] / "deepspeed/weights.pt").unlink()
    shutil.rmtree(place.checkpoints)
    with pytest.raises(ValueError, match=f"or {place.url}: none of {NAMES[1]} is whole"):
        place.resume()
    (place.away / NAMES[1] / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is whole"):
        place.resume()


def test_a_mirror_that_does_not_answer_is_no_start_from_scratch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> Any:
        raise ConnectionError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(Bucket, "whole", gone)
        with pytest.raises(ValueError) as refused:
            place.resume()
    assert str(refused.value) == (
        f"train.checkpoint.mirror {place.url} cannot be used (ConnectionError: gone); check the network and the "
        "service, or leave it out, so it is not known whether there is a checkpoint to resume from"
    )
    fake(place.checkpoints, 1)
    fake(place.checkpoints, 2)
    place.mirror()
    shutil.rmtree(place.checkpoints)
    for method in ("manifest_bytes", "get", "get_beside"):  # not passed over as if it were torn
        with monkeypatch.context() as broken:
            broken.setattr(Bucket, method, gone)
            with pytest.raises(ValueError, match=r"cannot be used \(ConnectionError: gone"):
                place.resume()
    assert place.resume() == place.checkpoints / NAMES[2]


def test_no_room_for_the_copy_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(place.checkpoints, 1)
    place.mirror()
    shutil.rmtree(place.checkpoints)
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3}))
    with pytest.raises(ValueError, match=f"checkpoint {NAMES[1]} needs about 0.000 GB in"):
        place.resume()


def test_the_plan_counts_the_one_that_is_being_copied() -> None:
    from tests.trainer.checkpoints.test_retention import training

    assert retention.most_at_once(training(every_steps=10, mirror="file:///b")) == 4
    assert retention.most_at_once(training(every_steps=10)) == 3


def until(happened: Callable[[], Any]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
