"""Parts end well, fail, hang, are cut short or are not reached; the others go on, and all of it is told."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.gpu import schedule, summary
from bench.gpu.schedule import Figures, Part, Schedule
from tests.launching import has_ended

# Starts a child that takes no notice of SIGTERM, says who it is, and hangs.
HANGS = """
import subprocess, sys, time
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
child.stdout.readline()
print("child", child.pid, flush=True)
time.sleep(600)
"""
FAULTS = {"PYTHONFAULTHANDLER": "1"}
# Ends well and leaves a child behind.
LEAVES = """
import subprocess, sys
print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
"""


def _part(name: str, code: str, *words: str, **more: Any) -> Part:
    values = {"weight": 1.0, "least_s": 0.2, "read": lambda found, log: Figures(f"found {found}", [{"x": found}])}
    return Part(name, f"part {name}", (sys.executable, "-c", code, *words), **(values | more))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Schedule]:
    """Run parts within ``seconds``, with a short grace."""
    monkeypatch.setattr(schedule, "_GRACE_S", 0.5)

    def start(
        parts: list[Part], seconds: float = 60.0, tell: Callable[[Schedule], object] = lambda _: None
    ) -> Schedule:
        found = Schedule(parts, tmp_path, time.monotonic() + seconds, dict(os.environ) | FAULTS, tmp_path, tell)
        found.run()
        return found

    return start


def _child(log: Path) -> psutil.Process | None:
    """The process that the log names, if it still lives."""
    pid = int(log.read_text().split()[1])
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
    end_s = time.monotonic() + 10
    while not has_ended(process) and time.monotonic() < end_s:
        time.sleep(0.02)
    return None if has_ended(process) else process


def test_a_part_that_fails_is_told_and_the_next_goes_on(run, tmp_path: Path) -> None:
    written = 'import json, sys; json.dump(7, open(sys.argv[1], "w"))'
    parts = [
        _part("bad", "print('first'); print('the end'); raise SystemExit(3)"),
        _part("good", written, str(tmp_path / "good.json")),
        _part("silent", "pass", str(tmp_path / "silent.json")),
        _part("judged", written + "; raise SystemExit(1)", str(tmp_path / "judged.json")),
        _part(
            "cut", 'import sys; open(sys.argv[1], "w").write("[1, "); raise SystemExit(2)', str(tmp_path / "cut.json")
        ),
        _part("plain", "print('a line')", read=lambda found, log: Figures(log.strip())),
    ]
    bad, good, silent, judged, cut, plain = (found := run(parts)).outcomes
    assert not found.passed
    assert (bad.status, bad.reason, bad.last_lines) == ("failed", "exit status 3", ["first", "the end"])
    assert (good.status, good.reason) == ("passed", "") and good.figures == Figures("found 7", [{"x": 7}])
    assert (silent.status, silent.reason) == ("failed", "ended without an error, but without silent.json")
    assert judged.status == "failed" and judged.figures == Figures("found 7", [{"x": 7}])  # a missed limit's figures
    assert cut.status == "failed" and cut.figures is None
    assert plain.status == "passed" and plain.figures == Figures("a line")


def test_all_passed_only_if_all_have(run) -> None:
    assert run([_part("one", "pass"), _part("two", "pass")]).passed
    assert not run([_part("one", "pass"), _part("two", "raise SystemExit(1)")]).passed


def test_a_part_that_hangs_is_killed_with_its_group_and_the_next_goes_on(run, tmp_path: Path) -> None:
    hung, after = run([_part("hangs", HANGS), _part("after", "pass")], seconds=5).outcomes
    assert hung.status == "out of time" and hung.last_lines[0].startswith("child ")
    assert hung.last_lines[-1] == '  File "<string>", line 7 in <module>'  # where it was
    assert hung.limit_s == pytest.approx(2.25, abs=0.2) and hung.limit_s <= hung.seconds < hung.limit_s + 2
    assert hung.reason == f"killed after {hung.limit_s:.0f} s"
    assert _child(tmp_path / "hangs.log") is None
    assert after.status == "passed"


def test_what_a_part_leaves_behind_is_ended(run, tmp_path: Path) -> None:
    (left,) = run([_part("leaves", LEAVES)]).outcomes
    assert left.status == "passed" and _child(tmp_path / "leaves.log") is None


def test_time_is_shared_by_weight_and_what_is_left_over_goes_to_the_others(run) -> None:
    parts = [_part("light", "pass"), _part("heavy", "pass", weight=3.0), _part("last", "pass")]
    light, heavy, last = run(parts, seconds=100.5).outcomes
    assert light.limit_s == pytest.approx(20, abs=1)
    assert heavy.limit_s == pytest.approx(75, abs=5)  # of nearly all that there was
    assert last.limit_s == pytest.approx(100, abs=10)


def test_a_part_is_not_started_without_the_time_that_it_takes(run) -> None:
    first, long, short = run(
        [_part("first", "pass"), _part("long", "pass", least_s=900), _part("short", "pass")]
    ).outcomes
    assert first.status == short.status == "passed"
    assert long.status == "not reached" and long.reason.startswith("takes 900 s at least, and ")
    assert long.limit_s == 0 and long.figures is None


def test_a_part_gets_the_time_that_it_takes_even_if_its_share_is_smaller(run) -> None:
    small, _ = run([_part("small", "pass", weight=0.01, least_s=30), _part("large", "pass")]).outcomes
    assert small.limit_s == 30


def test_nothing_is_started_after_what_all_need_has_failed(run) -> None:
    facts, other = run([_part("facts", "raise SystemExit(1)", needed=True), _part("other", "pass")]).outcomes
    assert facts.status == "failed" and (other.status, other.reason) == ("not reached", "needs facts")


def test_sigterm_ends_the_running_parts_whole_group(run, tmp_path: Path) -> None:
    log = tmp_path / "hangs.log"

    def stop() -> None:
        while not (log.exists() and "\n" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    found = run([_part("first", "pass"), _part("hangs", HANGS), _part("after", "pass")])
    first, hung, after = found.outcomes
    assert found.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert [first.status, hung.status, after.status] == ["passed", "stopped", "not reached"]
    assert hung.reason == after.reason == "stopped by SIGTERM" and hung.seconds < 30
    assert _child(log) is None


def test_the_summary_is_written_before_and_after_every_part(run, tmp_path: Path) -> None:
    """So that a cut leaves what was reached, and tells what was running."""
    seen = []

    def tell(found: Schedule) -> None:
        summary.write(tmp_path, found.outcomes, {"commit": "abc"})
        told = json.loads((tmp_path / summary.JSON).read_text())
        seen.append([part["status"] for part in told["parts"]])

    run([_part("one", "pass"), _part("two", "raise SystemExit(1)"), _part("late", "pass", least_s=900)], tell=tell)
    assert seen == [
        ["running", "waiting", "waiting"],
        ["passed", "waiting", "waiting"],
        ["passed", "running", "waiting"],
        ["passed", "failed", "waiting"],
        ["passed", "failed", "not reached"],
    ]
