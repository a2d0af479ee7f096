"""Heartbeats: written whole, read together, compared without clocks."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from trainer.heartbeat import Beat, Heartbeat, behind, read_beats


def beat(rank: int, step: int, phase: str = "training", before: str = "loading", count: int = 1) -> Beat:
    return Beat(rank, "node", 100 + rank, count, step, phase, before, 0.0, 0.0)


def test_it_says_who_does_what_where(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    for step, phase in ((3, "training"), (4, "training"), (4, "saving")):
        heartbeat.note(step, phase)
        heartbeat.write()
    (told,) = read_beats(tmp_path)
    assert (told.rank, told.host, told.pid, told.beat) == (3, socket.gethostname(), os.getpid(), 3)
    assert (told.step, told.phase, told.before, told.doing) == (4, "saving", "training", "saving")
    assert abs(told.time - time.time()) < 60
    assert [path.name for path in tmp_path.iterdir()] == ["rank-3.json"]
    heartbeat.note(4, "failed")
    heartbeat.write()
    assert read_beats(tmp_path)[0].doing == "saving"


def test_progress_is_measured_without_the_clock_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.note(1, "training")
    now_s[0] += 7
    monkeypatch.setattr(time, "time", lambda: 4e9)  # the clock jumps by decades
    heartbeat.write()
    assert read_beats(tmp_path)[0].still_s == 7
    heartbeat.tick()
    assert heartbeat.still_s == 0


def test_a_heartbeat_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    Heartbeat(tmp_path / "gone", 0).write()
    assert read_beats(tmp_path / "gone") == []


def test_files_that_are_no_heartbeats_are_left_out(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 10).write()
    Heartbeat(tmp_path, 9).write()
    (tmp_path / "rank-1.json").write_text('{"rank": 1, "st')
    (tmp_path / "rank-2.json").write_text(json.dumps({"rank": 2, "step": 1}))
    (tmp_path / "rank-3.json").write_text("3")
    assert [told.rank for told in read_beats(tmp_path)] == [9, 10]


@pytest.mark.parametrize(
    ("beats", "ranks"),
    [
        ([beat(0, 5), beat(1, 5)], []),
        ([beat(0, 5), beat(1, 4)], [1]),
        ([beat(0, 5), beat(1, 5, "loading")], [1]),
        (
            [beat(0, 5, "stalled", "training"), beat(1, 5, "stalled", "loading"), beat(2, 4, "stalled", "training")],
            [1, 2],
        ),
        ([beat(0, 0, "starting"), beat(1, 0, "evaluating")], [0]),
        ([], []),
    ],
)
def test_who_is_behind(beats: list[Beat], ranks: list[int]) -> None:
    assert [told.rank for told in behind(beats)] == ranks
