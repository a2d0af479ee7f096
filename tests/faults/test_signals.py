"""SIGTERM at bad moments, and clocks that jump."""

from __future__ import annotations

import math
import re
import subprocess
import time
from pathlib import Path

from tests.faults.breakage import signal_in_evaluation, signal_in_save
from tests.faults.test_kills import exact, lines
from tests.launching import start
from tests.programs import needs
from tests.ranks import Ranks
from trainer.exit_status import EXIT_PREEMPTED
from trainer.heartbeat import BEAT_EVERY_S, read_beats


def test_sigterm_in_an_evaluation_and_in_a_save(tiny, write_config) -> None:
    """Agreed on after the evaluation or the next step, saved once, gone on from: it ends as an undisturbed run."""
    tiny["train"] |= {"steps": 16, "evaluation": {"every_steps": 4, "samples": 2}}
    tiny["train"]["checkpoint"] |= {"every_steps": 4, "keep": 9}
    config, run = write_config(tiny), Path(tiny["train"]["run_dir"])
    for first, reached in ((signal_in_evaluation, (4,)), (signal_in_save, range(8, 14))):
        with Ranks(config, first=first) as ranks:
            assert ranks.end() == [EXIT_PREEMPTED] * 2, ranks.output
            step = max(line["step"] for line in lines(run))
            assert step in reached
            assert ranks.output.count(f"saved {run / 'checkpoints' / f'step-{step:08d}'} in") == 1
            assert re.search(
                f"asked to stop: step {step} is saved; go on with: .* train.checkpoint.resume=auto\n", ranks.output
            )
    assert not list(run.glob("checkpoints/*.partial"))
    with Ranks(config) as ranks:
        assert ranks.end() == [0, 0]
        assert f"at step {step}" in ranks.output
    with Ranks(config, f"train.run_dir={run}-undisturbed") as ranks:
        assert ranks.end() == [0, 0]
    assert exact(run) == exact(Path(f"{run}-undisturbed"))


@needs("faketime")
def test_a_clock_that_jumps_by_hours_does_nothing(tiny, write_config, monkeypatch, tmp_path: Path) -> None:
    """The host's clock goes 5 hours forwards, then 3 back; only the monotonic one is the machine's own."""
    tiny["train"] |= {"stall_timeout_s": 60.0}
    config, run = write_config(tiny), Path(tiny["train"]["run_dir"])
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    own = {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    preload = ["faketime", "-m", "-f", "+0", "printenv", "LD_PRELOAD"]  # its library for programs with threads
    own["LD_PRELOAD"] = subprocess.run(preload, check=True, capture_output=True, text=True).stdout.strip()
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with start("pretrain.train", config) as process:
        for jump, more in (("+5h", 6), ("-3h", 14)):
            deadline = time.monotonic() + 120
            while len(lines(run)) < more:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            clock.write_text(f"{jump}\n")
            (before,), seen = read_beats(run / "heartbeat"), len(lines(run))
            time.sleep(2.5 * BEAT_EVERY_S)
            (after,) = read_beats(run / "heartbeat")
            assert after.beat > before.beat and after.still_s < 60 and len(lines(run)) > seen
        process.terminate()
        output, _ = process.communicate(timeout=120)
    monkeypatch.undo()
    assert process.returncode == EXIT_PREEMPTED, output
    jumps = {text[:13] for text in (run / "logs/rank-0.log").read_text().splitlines() if text[:2] == "20"}
    assert len(jumps) >= 3, "the clock did not jump"
    for line in lines(run):
        if "speed/step_s" in line:
            assert 0 < line["speed/step_s"] < 60 and math.isfinite(line["speed/tokens_per_s"])
    steps = max(exact(run))
    with Ranks(config, f"train.run_dir={run}-undisturbed", count=1) as ranks:
        ranks.wait_until(lambda: len(exact(Path(f"{run}-undisturbed"))) > steps)
    undisturbed = exact(Path(f"{run}-undisturbed"))
    assert all(undisturbed[step]["train/loss"] == line["train/loss"] for step, line in exact(run).items() if step)
