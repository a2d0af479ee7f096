"""After ``launch.rewind``: what the mirror holds of the history that the run was taken back from."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from launch.rewind import go_back
from tests.trainer.checkpoints.test_mirror import NAMES, Place, until
from tests.trainer.checkpoints.test_resume import fake
from trainer.checkpoints import manifest
from trainer.checkpoints.bucket import Bucket


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_lies_beyond_is_set_aside(place: Place) -> None:
    for step in (1, 2, 3):
        fake(place.checkpoints, step)
    assert place.mirror(mirror_keep=3) == []
    for step in (2, 3):
        shutil.rmtree(place.checkpoints / NAMES[step])
    again = fake(place.checkpoints, 2)
    (again / "deepspeed/weights.pt").write_bytes(b"otherwise")
    (again / "manifest.json").unlink()
    manifest.write(again, {})
    assert place.mirror(mirror_keep=3) == []
    assert place.whole == [NAMES[2], NAMES[1]]
    assert (place.away / NAMES[2] / "deepspeed/weights.pt").read_bytes() == b"otherwise"
    assert (place.away / NAMES[3] / "deepspeed/weights.pt").is_file()  # its owner's to remove
    shutil.rmtree(place.checkpoints)
    assert place.resume() == place.checkpoints / NAMES[2]


def test_it_is_set_aside_although_the_next_save_lies_beyond_it(place: Place) -> None:
    """At the start, before anything is copied; and then it neither counts nor goes."""
    for step in (1, 2, 3):
        fake(place.checkpoints, step)
    assert place.mirror() == [] and place.whole == [NAMES[3], NAMES[2]]
    shutil.rmtree(place.checkpoints / NAMES[1])
    assert go_back(place.run, 2) is not None
    mirror = place.start(place.checkpoints / NAMES[2])
    until(lambda: place.whole == [NAMES[2]])
    for step, whole in ((5, [5, 2]), (6, [6, 5])):
        mirror.wake(fake(place.checkpoints, step).name)
        until(lambda whole=whole: place.whole == [NAMES[step] for step in whole])
    assert mirror.close(20.0) == [] and place.warned == []
    assert sorted(found.name for found in place.away.glob("step*")) == [NAMES[step] for step in (3, 5, 6)]


def test_a_step_that_was_set_aside_and_is_reached_again_is_like_any_other(place: Place) -> None:
    for step in (1, 2):
        fake(place.checkpoints, step)
    assert place.mirror() == [] and go_back(place.run, 1) is not None
    mirror = place.start(place.checkpoints / NAMES[1])
    until(lambda: place.whole == [NAMES[1]])
    for step in (2, 3, 4):
        mirror.wake(fake(place.checkpoints, step).name)
        until(lambda step=step: NAMES[step] in place.whole)
    assert mirror.close(20.0) == [] and sorted(found.name for found in place.away.glob("step*")) == NAMES[3:5]


def test_what_cannot_be_set_aside_yet_pushes_nothing_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    works, set_aside = threading.Event(), Bucket.set_aside

    def fail(bucket: Bucket, *rest: Any) -> None:
        if not works.is_set():
            raise ConnectionError("gone")
        set_aside(bucket, *rest)

    for step in (1, 3):
        fake(place.checkpoints, step)
    assert place.mirror() == [] and go_back(place.run, 1) is not None
    monkeypatch.setattr(Bucket, "set_aside", fail)
    mirror = place.start(place.checkpoints / NAMES[1])
    mirror.wake(fake(place.checkpoints, 4).name)
    until(lambda: place.warned)
    assert place.whole == [NAMES[4], NAMES[3], NAMES[1]]
    works.set()
    mirror.wake(fake(place.checkpoints, 5).name)
    assert mirror.close(20.0) == [] and place.whole == [NAMES[5], NAMES[4]]
    assert place.warned == [f"{place.url}: checkpoints no longer kept there cannot be removed (ConnectionError: gone)"]
