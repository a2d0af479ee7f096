"""What of a run folder's torn checkpoints gets to its mirror, and what they do to those that are there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.checkpoints.test_mirror import NAMES, Place, until
from tests.trainer.checkpoints.test_resume import fake
from trainer.checkpoints import manifest
from trainer.checkpoints.bucket import Bucket
from trainer.distributed import ALONE


def _of_no_size(file: Path) -> None:
    file.write_bytes(b"")


def _of_another_hash(file: Path) -> None:
    file.write_bytes(b"x" * file.stat().st_size)


Tear = Callable[[Path], None]
both = pytest.mark.parametrize("tear", [_of_no_size, _of_another_hash])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def torn(place: Place, step: int, tear: Tear) -> Path:
    checkpoint = fake(place.checkpoints, step)
    tear(checkpoint / "deepspeed/weights.pt")
    return checkpoint


def all_whole(place: Place) -> bool:
    return all(manifest.problem_of(place.away / name, ALONE) is None for name in place.whole)


@both
def test_one_that_the_start_did_not_read_is_compared_before_it_is_copied(place: Place, tear: Tear) -> None:
    """An older one takes its place."""
    fake(place.checkpoints, 1)
    torn(place, 2, tear)
    (fake(place.checkpoints, 3) / "manifest.json").unlink()
    resumed = fake(place.checkpoints, 4)
    assert place.mirror(resumed) == [] and place.whole == [NAMES[4], NAMES[1]] and all_whole(place)
    (sentence,) = place.warned
    assert sentence.startswith(f"{NAMES[2]} is torn and not mirrored: ")


@both
def test_one_that_the_start_passed_over_is_copied_when_it_is_written_again(place: Place, tear: Tear) -> None:
    """The new one, which may have the very same manifest."""
    resumed = fake(place.checkpoints, 1)
    again = torn(place, 2, tear)
    mirror = place.start(resumed)
    until(lambda: place.whole == [NAMES[1]])
    (again / "deepspeed/weights.pt").write_bytes(b"weights of step 2")
    mirror.wake(again.name)
    assert mirror.close(20.0) == [] and place.whole == [NAMES[2], NAMES[1]] and all_whole(place)
    assert place.warned == []


@both
def test_it_pushes_no_whole_one_out(place: Place, tear: Tear) -> None:
    resumed = fake(place.checkpoints, 1)
    assert place.mirror(mirror_keep=1) == []
    torn(place, 2, tear)
    assert place.mirror(resumed, mirror_keep=1) == [] and place.whole == [NAMES[1]]
    fake(place.checkpoints, 3)
    assert place.mirror(place.checkpoints / NAMES[3], mirror_keep=1) == [] and place.whole == [NAMES[3]]


@both
def test_what_was_copied_of_it_is_not_counted_and_stays(place: Place, tear: Tear) -> None:
    """The copy may be whole, or as torn as what is here."""
    resumed = fake(place.checkpoints, 1)
    again = torn(place, 2, lambda _: None)
    assert place.mirror(mirror_keep=1) == [] and place.whole == [NAMES[2]]
    tear(again / "deepspeed/weights.pt")
    mirror = place.start(resumed, mirror_keep=1)
    until(lambda: place.whole == [NAMES[2], NAMES[1]])
    mirror.wake(fake(place.checkpoints, 3).name)
    assert mirror.close(20.0) == [] and place.whole == [NAMES[3]]


def test_a_run_tells_its_mirror_what_it_goes_on_from(
    place: Place, tiny: dict[str, Any], train_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["train"]["checkpoint"] |= {"every_steps": 1, "mirror": place.url}
    assert train_here(tiny, "train.stop_at_step=2") == 0
    again = Path(tiny["train"]["run_dir"]) / "checkpoints" / NAMES[2]
    _of_no_size(again / "trainer.pt")
    assert train_here(tiny, "train.checkpoint.resume=auto", "train.stop_at_step=2") == 0
    assert manifest.problem_of(again, ALONE) is None and place.whole == [NAMES[2], NAMES[1]] and all_whole(place)
    told = capsys.readouterr()
    assert f"mirrored {NAMES[2]} to" in told.out and "not mirrored" not in told.out + told.err


def test_without_as_many_whole_ones_as_are_kept_nothing_goes(place: Place) -> None:
    bucket = Bucket(place.url)
    for step in (1, 2, 3):
        bucket.put(fake(place.checkpoints, step), set(), lambda: False)
    bucket.prune(keep=2, keep_every_steps=0, torn={NAMES[1], NAMES[2]})
    assert place.whole == [NAMES[3], NAMES[2], NAMES[1]]


def test_one_is_compared_once_however_often_its_copy_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, failed, go_on = list[str](), list[str](), threading.Event()
    problem_of, put = manifest.problem_of, Bucket.put

    def counted(folder: Path, *rest: Any) -> str | None:
        looked.append(folder.name)
        return problem_of(folder, *rest)

    def fail(bucket: Bucket, checkpoint: Path, *rest: Any) -> bool:
        if checkpoint.name == NAMES[1] and not go_on.is_set():
            failed.append(checkpoint.name)
            raise ConnectionError("gone")
        return put(bucket, checkpoint, *rest)

    monkeypatch.setattr(manifest, "problem_of", counted)
    monkeypatch.setattr(Bucket, "put", fail)
    fake(place.checkpoints, 1)
    mirror = place.start(fake(place.checkpoints, 2))
    until(lambda: len(failed) == 3)
    go_on.set()
    assert mirror.close(20.0) == [] and place.whole == [NAMES[2], NAMES[1]] and looked == [NAMES[1]]
