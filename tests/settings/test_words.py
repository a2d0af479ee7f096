"""Numbers as people say them."""

from __future__ import annotations

from settings.words import counted, duration, epochs


def test_one_and_many() -> None:
    assert [counted(1, "shard"), counted(1200, "shard"), counted(2, "copy", "copies")] == [
        "1 shard", "1,200 shards", "2 copies"
    ]  # fmt: skip


def test_durations_are_for_people() -> None:
    told = [duration(s) for s in (0.4, 99, 100, 3600, 6000, 11_100, 180_000)]
    assert told == ["0 s", "99 s", "2 min", "60 min", "1 h 40 min", "3 h 5 min", "2 d 2 h"]


def test_few_epochs_are_not_none() -> None:
    assert [epochs(n) for n in (0, 0.00312, 0.1, 2.5)] == ["0.00 epochs", "0.0031 epochs", "0.10 epochs", "2.50 epochs"]
