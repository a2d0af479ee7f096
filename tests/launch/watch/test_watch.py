"""launch.watch on run folders as ranks leave them: states, exit statuses, who is late, and no trust in clocks."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from launch.watch import __main__ as watch
from launch.watch.__main__ import state_of
from trainer.heartbeat import Beat, Heartbeat

Watch = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of 1,000 steps, at step 400."""
    folder = tmp_path / "run"
    (folder / "heartbeat").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 1000}}))
    lines: list[dict[str, object]] = [{"step": 300, "validation/code/loss": 3.75}]
    for step in (200, 300, 400):
        figures = {"train/loss": 4 - step / 1000, "speed/step_s": 6.0, "speed/tokens_per_s": 12345.6}
        routing = {"density/mean": 0.5125, "budget/target": 0.5, "speed/imbalance": 1.0375}
        lines.append({"step": step, **figures, **routing})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 410, "train/lo')  # being written
    for name in ("step-00000300", "step-00000400.partial"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints/step-00000300/manifest.json").write_text("{}")
    return folder


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Watch:
    """Run the command here: exit status and what it printed."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["watch", *map(str, arguments)])
        try:
            status = watch.main()
        except SystemExit as end:
            status = int(str(end.code))
        told = capsys.readouterr()
        return status, told.out + told.err

    return call


def say(run: Path, rank: int, *places: tuple[int, str]) -> Heartbeat:
    heartbeat = Heartbeat(run / "heartbeat", rank)
    for step, phase in places:
        heartbeat.note(step, phase)
    heartbeat.write()
    return heartbeat


@contextmanager
def beating(*heartbeats: Heartbeat) -> Iterator[None]:
    """Ranks that are alive."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            for heartbeat in heartbeats:
                heartbeat.write()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_running_run_is_told_with_status_0(run: Path, watched: Watch) -> None:
    with beating(say(run, 0, (401, "training")), say(run, 1, (401, "loading"))):
        status, told = watched(run, "--once")
    assert status == 0
    assert f"{run}: running, step 401 of 1,000 (40%), 60 min to go" in told
    for fact in ("loss 3.6000", "validation code 3.7500", "density 0.512 (target 0.500)", "12,346 tokens/s"):
        assert fact in told
    assert "busiest rank 1.038 times the mean" in told
    assert re.search(r"checkpoint step-00000300, \d+ s old", told) and "late" not in told and "silent" not in told
    assert [line.split()[0] for line in told.splitlines()[3:]] == ["0", "1"]


@pytest.mark.parametrize(
    ("phases", "state", "status"),
    [
        (("ended", "ended"), "ended", 0),
        (("stopped", "stopped"), "stopped", 75),
        (("stalled", "training"), "stalled", 76),
        (("failed", "training"), "failed", 1),
    ],
)
def test_a_run_that_is_over_is_told_at_once(
    run: Path, watched: Watch, phases: tuple[str, str], state: str, status: int
) -> None:
    for rank, phase in enumerate(phases):
        say(run, rank, (400, "training"), (400, phase))
    began_s = time.monotonic()
    got, told = watched(run, "--once")
    assert (got, time.monotonic() - began_s < 5) == (status, True) and f": {state}, step 400 of 1,000 (40%)" in told
    assert ("(while training)" in told) == (state in ("stalled", "failed"))
    assert ("without reporting it: rank 1 on " in told) == ("training" in phases)
    assert watched(run)[0] == status  # following it ends, too


@pytest.mark.parametrize("train", [{"steps": 40}, {"steps": 1000, "stop_at_step": 40}])
def test_a_run_past_the_last_step_of_its_config(run: Path, watched: Watch, train: dict[str, int]) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({"train": train}))
    rank = say(run, 0, (400, "loading"))
    with beating(rank):
        assert f"{run}: running, step 400 (the config's last step is 40), 0 s to go\n" in watched(run, "--once")[1]
    say(run, 0, (400, "ended"))
    assert f"{run}: ended, step 400 (the config's last step is 40)\n" in watched(run, "--once")[1]


def test_who_is_late_and_in_which_phase(run: Path, watched: Watch) -> None:
    late = say(run, 1, (400, "training"), (400, "loading"))
    late._progress_s -= 63
    with beating(say(run, 0, (401, "training")), late):
        told = watched(run, "--once")[1]
    assert re.search(r"late: rank 1 on \S+ \(step 400, loading for 6\d s\)", told)


def test_a_silent_rank_is_a_stall_and_all_silent_a_failure(run: Path, watched: Watch) -> None:
    alive, frozen = say(run, 0, (401, "training")), say(run, 1, (401, "training"))
    with beating(alive):
        status, told = watched(run, "--once", "--patience", "3")
    assert status == 76 and ": stalled, " in told and "silent, so killed, frozen or cut off: rank 1 on " in told
    frozen.write()
    status, told = watched(run, "--once", "--patience", "1")
    assert status == 1 and ": failed, " in told and "rank 0 on " in told and "rank 1 on " in told


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_clocks_that_jump_change_nothing(
    run: Path, watched: Watch, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Of the ranks' hosts, of the file server's, and of the watcher's own."""
    real = time.time
    rank = say(run, 0, (401, "training"))
    with beating(rank):
        os.utime(run / "checkpoints/step-00000300/manifest.json", (real() - 120, real() - 120))
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        status, told = watched(run, "--once", "--patience", "5")
    assert status == 0 and ": running, " in told and "checkpoint step-00000300, 2 min old" in told


def test_a_log_gets_plain_lines_until_the_end(run: Path, watched: Watch) -> None:
    rank = say(run, 0, (401, "training"))

    def end() -> None:
        rank.note(1000, "ended")
        rank.write()

    timer = threading.Timer(0.5, end)
    timer.start()
    status, told = watched(run, "--interval", "0.2")
    timer.join()
    lines = told.splitlines()
    assert status == 0 and len(lines) >= 3 and "\x1b" not in told
    assert all("  running, step 401 of 1,000 (40%), 60 min to go  loss 3.6000" in line for line in lines[:-1])
    assert "  ended, step 1,000 of 1,000 (100%)  loss" in lines[-1]


def test_many_ranks_show_those_that_are_late(run: Path, watched: Watch) -> None:
    for rank in range(40):
        say(run, rank, (400 if rank == 17 else 401, "training"), (401, "stalled") if rank != 17 else (400, "stalled"))
    late = Heartbeat(run / "heartbeat", 17)
    late.note(400, "training")
    late.note(400, "stalled")
    late._progress_s -= 900
    late.write()
    status, told = watched(run, "--once")
    assert status == 76 and "late: rank 17 on " in told and "39 more of 40 ranks are not late" in told


@pytest.mark.parametrize(("every_s", "silent_after_s"), [(2.0, 4), (16.0, 48)])
def test_of_thousands_of_ranks_three_heartbeats_may_be_missed(
    run: Path, monkeypatch: pytest.MonkeyPatch, every_s: float, silent_after_s: int
) -> None:
    """With a patience of 4 s, by a stopwatch of ours."""
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    heartbeat = Heartbeat(run / "heartbeat", 0)
    heartbeat.every_s = every_s
    heartbeat.write()
    looks = watch.Watch(run, 4.0)
    assert not looks.look().silent
    now_s[0] += silent_after_s
    assert not looks.look().silent
    now_s[0] += 0.5
    assert looks.look().silent == {0}


def test_before_the_first_heartbeat(run: Path, watched: Watch) -> None:
    assert state_of([], set(), waited=False) == "starting"
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints/step-00000300/manifest.json").unlink()
    status, told = watched(run, "--once", "--patience", "0.2")
    assert (
        status == 1 and "failed, step 0 of 1,000 (0%)" in told and "no heartbeat yet: it is starting, or died" in told
    )


@pytest.mark.parametrize(
    ("phase", "state"),
    [("starting", "starting"), ("loading", "running"), ("evaluating", "evaluating"), ("saving", "saving")],
)
def test_what_it_does_is_its_state(phase: str, state: str) -> None:
    assert state_of([Beat(0, "node", 1, 1, 5, phase, "", 0.0, 0.0)], set(), waited=True) == state


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: run.rename(run.with_name("moved")), "is not a run (there is no such folder); give the folder"),
        (lambda run: (run / "config.yaml").unlink(), "is not a run (it has no config.yaml); give the folder"),
        (lambda run: (run / "config.yaml").write_text("train: 3"), "names no train.steps, so it is not the config"),
    ],
)
def test_a_mistake_is_one_sentence(run: Path, watched: Watch, spoil: Callable[[Path], object], sentence: str) -> None:
    spoil(run)
    status, told = watched(run)
    assert status == 1 and told.startswith("error: ") and sentence in told and told.count("\n") == 1


def test_a_folder_of_runs_is_told_with_the_runs_in_it(run: Path, watched: Watch) -> None:
    assert watched(run.parent)[1].endswith(f", such as runs/demo; {run.parent} holds run\n")


@pytest.mark.parametrize("option", ["--interval", "--patience"])
@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan"])
def test_a_time_is_above_zero_and_at_most_a_day(option: str, seconds: str, run: Path, watched: Watch) -> None:
    status, told = watched(run, f"{option}={seconds}")
    assert status == 2 and f"argument {option}: must be a number above 0, at most 86400, got '{seconds}'" in told
