"""Losses that are no numbers, and native code that crashes, on one rank.

Hangs: ``tests/trainer/monitor/test_watchdog.py``.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.faults.breakage import bad_loss_on_rank_1
from tests.launching import run
from tests.ranks import Ranks
from trainer.exit_status import EXIT_MISTAKE, EXIT_STALLED


@pytest.mark.quick
@pytest.mark.parametrize("launcher", [None, pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_losses_that_are_no_numbers_on_one_rank_end_the_run_and_name_it(tiny, write_config, launcher) -> None:
    """Nothing of them reaches the weights: the checkpoint of step 2 is followed by none."""
    tiny["train"] |= {"max_bad_steps": 3, "checkpoint": {"every_steps": 2}}
    config = write_config(tiny)
    if launcher is None:
        with Ranks(config, first=bad_loss_on_rank_1) as ranks:
            error, output = ranks.error(), ranks.output
    else:
        done = run("tests.faults.breakage", "bad_loss_on_rank_1", config, processes=2, launcher=launcher)
        assert done.returncode == EXIT_MISTAKE
        output = done.stdout
        (error,) = re.findall("^error: .*", output, re.MULTILINE)
    for step, first in ((4, 24), (5, 32), (6, 40)):
        samples = ", ".join(str(first + i) for i in (2, 3, 6, 7))
        assert f"step {step}: the loss was not finite on rank 1 (its samples {samples}); the update was" in output
    assert "rank 0 (its samples" not in output and "Traceback" not in output
    assert "3 steps in a row up to step 6 had a loss or gradient that is not finite (train.max_bad_steps)" in error
    assert error.endswith("the newest checkpoint is step-00000004")


@pytest.mark.slow
def test_native_code_that_crashes_leaves_its_stack_in_the_log(tiny, write_config) -> None:
    log = Path(tiny["train"]["run_dir"]) / "logs/rank-1.log"
    with Ranks(write_config(tiny)) as ranks:
        ranks.wait_until(lambda: "step      1" in ranks.output)
        os.kill(int(ranks.processes[1].pid or 0), signal.SIGBUS)
        assert ranks.end() == [EXIT_STALLED, -signal.SIGBUS]
        assert "another rank or its host is gone" in ranks.output and "Traceback" not in ranks.output
    assert "Fatal Python error: Bus error" in log.read_text() and "in train_step" in log.read_text()
