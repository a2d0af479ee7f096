"""Who asks what of the file system while thousands of ranks write a checkpoint: no more a rank than with a few."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.system_calls import counted
from trainer.checkpoints import receipts

WORLDS = [64, 512, 2048]


def entries(rank: int) -> dict[str, dict[str, int]]:
    """A rank's files at ZeRO 3."""
    names = (f"deepspeed/zero_pp_rank_{rank}_model.pt", f"deepspeed/zero_pp_rank_{rank}_optim.pt", f"rng-{rank:05d}.pt")
    return {name: {"bytes": 1} for name in names}


def write(partial: Path, rank: int) -> None:
    """What a rank writes, and the receipt."""
    for name in entries(rank):
        (partial / name).write_text("x")
    receipts.leave(partial, rank, entries(rank))


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # of this one disk by thousands of ranks
    made = tmp_path / "step-00000001.partial"
    receipts.begin(made)
    (made / "deepspeed").mkdir()
    return made


@pytest.mark.parametrize("ranks", WORLDS)
def test_calls_of_a_rank_do_not_grow_with_the_number_of_ranks(partial: Path, ranks: int) -> None:
    """Every rank but the last two has written; a poll asks as much at 64 ranks as at 2,048."""
    collected = receipts.Collection(partial, ranks)
    for rank in range(ranks - 2):
        write(partial, rank)
    with counted() as own:
        write(partial, ranks - 2)
    assert own.total() <= 20  # three files and a receipt: opened, synced, renamed
    with counted() as waiting:
        assert receipts.last_growth(partial) is not None
    assert waiting == {"stat": 1}
    with counted() as first:
        assert collected.look() is None
    assert first["open"] == ranks - 1 + 1  # each receipt once, as each was written once; and what the others look at
    assert first.total() - first["open"] <= 3 + 8
    with counted() as poll:
        for _ in range(10):
            assert collected.look() is None
    assert poll["open"] == 0 and poll.total() <= 10 * (3 + 8)
    write(partial, ranks - 1)
    with counted() as last:
        assert collected.look() is True
    assert last == {"listdir": 1, "open": 1}
    assert collected.files == {name: entry for rank in range(ranks) for name, entry in entries(rank).items()}
    receipts.remove(partial)
    with counted() as over:
        assert receipts.last_growth(partial) is None
    assert over == {"stat": 1}


def test_what_grows_is_told_and_what_does_not_is_not(partial: Path) -> None:
    """A rank that writes one file for an hour has sent no receipt."""
    collected = receipts.Collection(partial, 2)
    shows = partial / "receipts/growing"

    def told() -> bool:
        os.utime(shows, (0, 0))
        assert collected.look() is None
        return receipts.last_growth(partial) != 0

    assert told() and not told()
    with (partial / "deepspeed/zero_pp_rank_1_optim.pt").open("w") as file:
        for size in (1, 2):
            file.truncate(size)
            assert told() and not told()
    write(partial, 0)
    assert told() and not told() and "1 of 2 ranks" in shows.read_text()
    receipts.end(partial)
    assert receipts.last_growth(partial) is None


def test_a_failure_is_seen_by_rank_0_and_a_checkpoint_that_is_gone_by_all(partial: Path) -> None:
    collected = receipts.Collection(partial, 2)
    write(partial, 0)
    receipts.leave_failure(partial, 1)
    assert collected.look() is False
    partial.rename(partial.with_suffix(""))  # got its name while one looks
    assert receipts.last_growth(partial) is None
    receipts.end(partial)
    receipts.leave_failure(partial, 1)  # nobody is left to be told
