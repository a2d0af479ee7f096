"""A run folder that cannot be written while a checkpoint comes from the mirror: told as such, by all ranks."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data import urls
from tests.ranks import Processes
from tests.trainer.checkpoints.test_mirror import NAMES, Place
from tests.trainer.checkpoints.test_resume import fake
from trainer.checkpoints import manifest, resume
from trainer.checkpoints.bucket import Bucket
from trainer.distributed import ALONE, join, leave


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """With a checkpoint in the mirror, and none here."""
    made = Place(tmp_path)
    fake(made.checkpoints, 1)
    (made.run / "metrics.jsonl").write_text("mine\n")
    assert made.mirror() == []
    shutil.rmtree(made.run)
    return made


def sentence(run: Path, code: int) -> str:
    return (
        f"train.run_dir {run} cannot be written ({os.strerror(code)}); make room there and make it writable, or give "
        "another folder"
    )


def test_a_run_folder_that_cannot_be_made(place: Place) -> None:
    place.run.parent.joinpath("file").write_text("")
    run = place.run.parent / "file" / "run"
    with pytest.raises(ValueError) as refused:
        resume.find_checkpoint(run / "checkpoints", "auto", ALONE, place.url, run / "metrics.jsonl")
    assert str(refused.value) == sentence(run, errno.ENOTDIR)


@pytest.mark.parametrize(
    ("owner", "name", "code", "files"),
    [
        (Bucket, "get", errno.ENOSPC, ()),
        (Bucket, "get", errno.EACCES, ("checkpoints/a",)),
        (Bucket, "get_beside", errno.EIO, ("/far", None, "metrics.jsonl")),
        (os, "fsync", errno.EIO, ()),
        (manifest, "entry_of", errno.EIO, ()),
        (Path, "rename", errno.EROFS, ()),
    ],
)
def test_what_its_disk_refuses(
    place: Place, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, code: int, files: tuple[str | None, ...]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code), *(file and str(place.run / file) for file in files))

    with monkeypatch.context() as broken:
        broken.setattr(urls.with_retries, "__defaults__", (1, 0.0))
        broken.setattr(owner, name, fail)
        with pytest.raises(ValueError) as refused:
            place.resume()
    assert str(refused.value) == sentence(place.run, code)
    assert place.resume() == place.checkpoints / NAMES[1]


def test_what_the_mirror_refuses_is_not_the_disks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(place.away / NAMES[1]))

    monkeypatch.setattr(urls.with_retries, "__defaults__", (1, 0.0))
    monkeypatch.setattr(Bucket, "get", fail)
    with pytest.raises(ValueError, match=rf"train\.checkpoint\.mirror {place.url} cannot be used \(OSError: "):
        place.resume()


def full_on_rank_1() -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ["RANK"] == "1":
        os.fsync = fail


def resume_as_a_rank(run: Path, url: str) -> None:
    world = join(60.0)
    try:
        resume.find_checkpoint(run / "checkpoints", "auto", world, url, run / "metrics.jsonl")
    except ValueError as error:
        print(f"rank {world.rank}: {error}\n", end="", flush=True)
    leave()


def test_all_ranks_know_what_the_disk_of_one_refuses(place: Place) -> None:
    checkpoint = place.away / NAMES[1]
    (checkpoint / "trainer.pt").write_bytes(b"state")
    (checkpoint / "manifest.json").unlink()
    manifest.write(checkpoint, {})
    with Processes(resume_as_a_rank, place.run, place.url, count=2, first=full_on_rank_1) as ranks:
        assert ranks.end() == [0, 0], ranks.output
    for rank in (0, 1):
        assert f"rank {rank}: {sentence(place.run, errno.ENOSPC)}" in ranks.output
