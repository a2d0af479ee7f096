"""A run that hangs says where, and ends with the status that asks for another start."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launching import has_ended, run, start
from tests.system_calls import counted
from trainer.exit_status import EXIT_STALLED
from trainer.heartbeat import Beat, read_beats
from trainer.monitor.stop import exit_on_lost_rank
from trainer.monitor.watchdog import Watchdog, stall_sentence
from trainer.run_folder import RunFolder

STALL_S = 8
"""More than a loaded machine takes for any normal phase of the tiny run."""


def beat(rank: int, step: int, phase: str, before: str = "training", count: int = 1) -> Beat:
    return Beat(rank, f"node{rank}", 100 + rank, count, step, phase, before, 900.0, 0.0)


def test_the_sentence_names_who_is_behind_and_who_is_silent() -> None:
    earlier = [beat(0, 7, "training"), beat(1, 6, "training"), beat(2, 7, "training")]
    now = [beat(0, 7, "stalled"), beat(1, 6, "stalled", "loading"), beat(2, 7, "training")]
    assert stall_sentence(earlier, now, 900) == (
        "no progress for train.stall_timeout_s (900 s); behind: rank 1 on node1 (step 6, loading); "
        "no longer heard from, so frozen, killed or cut off: rank 2 on node2 (step 7, training)"
    )
    alike = [beat(0, 1234, "stalled"), beat(1, 1234, "training", count=3)]
    assert stall_sentence(alike, [alike[0], beat(1, 1234, "training", count=6)], 900).endswith(
        "all 2 ranks are at step 1,234; the culprit's stack is the one that differs"
    )
    assert stall_sentence([], [beat(0, 1, "stalled")], 900) == "no progress for train.stall_timeout_s (900 s)"
    many = [beat(rank, 1, "stalled") for rank in range(20)] + [beat(20, 2, "stalled")]
    assert stall_sentence([], many, 900).endswith("rank 7 on node7 (step 1, training) and 12 more")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path, 0)
    for path in (made.log, made.heartbeat.path):
        path.parent.mkdir()
    return made


def test_usr2_writes_the_stacks_and_nothing_stops(folder: RunFolder) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    watchdog = Watchdog(folder, 60, lambda: True)
    watchdog.start()
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert "test_usr2_writes_the_stacks_and_nothing_stops" in folder.log.read_text()
        assert "in _watch" in folder.log.read_text()  # every thread's
    finally:
        watchdog.stop()
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, before)
    assert read_beats(folder.heartbeat.path.parent)[0].phase == "starting"


def test_what_came_before_the_watch_is_not_counted(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a large checkpoint takes longer than any step may."""
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended"))
    folder.heartbeat._progress_s -= 3600
    watchdog = Watchdog(folder, 60, lambda: True)
    watchdog.start()
    watchdog.stop()
    faulthandler.unregister(signal.SIGUSR2)
    assert folder.heartbeat.still_s < 60 and "no progress" not in folder.log.read_text()


@pytest.mark.parametrize("ranks", [64, 512, 2048])
def test_heartbeats_of_all_ranks_ask_no_more_of_the_file_system_than_those_of_a_few(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """In a minute of a run, by a stopwatch of ours: at most 128 a second in all, of three calls each."""
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    most = 0
    for rank in sorted({0, 1, ranks // 2, ranks - 1}):
        run = RunFolder(folder.path, rank)
        watchdog = Watchdog(run, 900, lambda: True, ranks)
        beats = 0
        for second in range(0, 64, 2):  # the loop's own pace
            now_s[0] = 1000.0 + second
            if watchdog._is_due():
                with counted() as asked:
                    run.heartbeat.write()
                    assert watchdog._reason_to_stop(True) is None
                beats += 1
                assert asked == {"open": 1, "replace": 1, "stat": 1}
        most = max(most, beats)
        watchdog._file.close()
    assert most * ranks <= 1.3 * 64 * 128  # also the first one of all
    (told,) = {beat.every_s for beat in read_beats(folder.heartbeat.path.parent)}
    assert told == max(2.0, ranks / 128)


def test_of_thousands_of_ranks_one_reads_all_heartbeats_when_they_stall(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others ask for one file, and say where their stacks are."""
    for rank in range(512):
        RunFolder(folder.path, rank).heartbeat.write()
    said, opened = [], []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    for rank in (3, 0, 511):
        watchdog = Watchdog(RunFolder(folder.path, rank), 900, lambda: True, 512)
        monkeypatch.setattr(watchdog, "_say", said.append)
        with counted() as asked:
            watchdog._end()
        opened.append(asked["open"])
        assert asked.total() <= (2 * (512 + 3) if rank == 3 else 3) + 4
        watchdog._file.close()
    assert opened[0] >= 2 * 512 and opened[1] == opened[2] == 2
    assert "no longer heard from" in said[0] and "another rank says which are behind" in said[1] == said[2].replace(
        "rank-511", "rank-0"
    )


def test_one_rank_that_hangs_ends_the_run_with_all_stacks_and_status_76(tiny, write_config) -> None:
    run_dir = Path(tiny["train"]["run_dir"])
    done = _run_and_hang(tiny, write_config, "read", 2, launcher="fork")
    assert done.returncode == EXIT_STALLED, done.stdout[-3000:]
    start = r"^rank (.): no progress for train.stall_timeout_s \(8 s\); "
    told = rf"behind: rank 1 on \S+ \(step 3, loading\); its stacks are in {run_dir}"
    who = [
        re.findall(start + what, done.stdout, re.M) for what in (told, "another rank says which are behind; its sta")
    ]
    assert sorted(who) == [["0"], ["1"]]  # one reads all heartbeats and speaks, whichever was first
    waits, hangs = ((run_dir / f"logs/rank-{rank}.log").read_text() for rank in (0, 1))
    assert "in all_reduce" in waits and "in train_step" in waits and "hang_worker" in waits
    assert "in _hang" in hangs and "in _hang" not in waits
    assert [(b.phase, b.before) for b in read_beats(run_dir / "heartbeat")] == [
        ("stalled", "training"),
        ("stalled", "loading"),
    ]


@pytest.mark.slow
def test_native_code_that_holds_the_interpreter_is_ended_too(tiny, write_config) -> None:
    """By the timer of last resort, whose stacks go to stderr; the other rank's status is the run's."""
    done = _run_and_hang(tiny, write_config, "native", 2)
    assert done.returncode == EXIT_STALLED, done.stdout[-3000:]
    assert "Timeout (0:00:20)!" in done.stdout and "in _hang" in done.stdout
    assert re.search(r"rank 0: no progress .* no longer heard from, .*: rank 1 on", done.stdout)
    alone = _run_and_hang(tiny, write_config, "native", 1, "train.checkpoint.resume=auto")
    assert alone.returncode == 1 and "in _hang" in alone.stdout


@pytest.mark.slow
def test_a_frozen_rank_is_named_and_killed_by_the_launcher(tiny, write_config) -> None:
    run_dir = Path(tiny["train"]["run_dir"])
    tiny["train"] |= {"steps": 100_000, "evaluation": {"every_steps": 50_000}, "stall_timeout_s": STALL_S}
    tiny["train"]["log"]["images"] = False
    process = start("pretrain.train", write_config(tiny), processes=2, launcher="deepspeed")
    while not (run_dir / "heartbeat/rank-1.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    frozen = psutil.Process(json.loads((run_dir / "heartbeat/rank-1.json").read_text())["pid"])
    frozen.suspend()
    once = [sys.executable, "-m", "launch.watch", str(run_dir), "--once", "--patience", "4"]
    watched = subprocess.run(once, check=False, capture_output=True, text=True)
    assert watched.returncode == EXIT_STALLED
    # Before the other rank has ended for it, or after.
    assert re.search(r"(cut off|without reporting it): rank 1 on", watched.stdout), watched.stdout
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STALLED, output[-2000:]
    assert "no longer heard from, so frozen, killed or cut off: rank 1 on" in output
    assert has_ended(frozen)  # killed


def _run_and_hang(
    tiny: dict[str, Any], write_config: Any, how: str, ranks: int, *more: str, launcher: str = "deepspeed"
) -> Any:
    tiny["train"] |= {"steps": 100, "evaluation": {"every_steps": 100, "samples": 2}, "stall_timeout_s": STALL_S}
    tiny["train"] |= {"log": {"every_steps": 1, "peak_tflops": 1.0, "images": False}}
    tiny["train"]["checkpoint"] = {"every_steps": 100}
    config = write_config(tiny)
    return run("tests.trainer.monitor.hang_worker", how, config, *more, processes=ranks, launcher=launcher)


def test_a_lost_rank_is_one_sentence_and_status_76(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts are those of gloo in torch 2.13 and of NCCL in torch 2.11."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "2")
    gloo = "[/pytorch/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:2247: Connection reset by peer"
    nccl = "NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.27.3"
    for text in (f"{gloo}. This is typically caused by ...", nccl):
        with pytest.raises(SystemExit) as end, exit_on_lost_rank():
            raise RuntimeError(text)
        assert end.value.code == EXIT_STALLED
        told = capsys.readouterr().err
        assert told.startswith("rank 2: error: another rank or its host is gone (") and told.count("\n") == 1
        assert told.endswith("start again with train.checkpoint.resume=auto\n")
    with pytest.raises(RuntimeError, match="shape mismatch"), exit_on_lost_rank():
        raise RuntimeError("shape mismatch")
