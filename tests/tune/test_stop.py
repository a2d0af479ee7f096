"""Stop requests in stage two's evaluations: results are whole or absent, and the next start makes up for the rest."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tune.tuner
from tests.faults.test_kills import exact
from tests.ranks import Processes
from trainer.exit_status import EXIT_PREEMPTED


def _signal_at(number: int) -> None:
    """SIGTERM to rank 1 while it evaluates for that time: two sets before the first step, after step 2 and 4; tests."""
    evaluate, calls = tune.tuner.evaluate_examples, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    tune.tuner.evaluate_examples = interrupted


def signal_in_validation() -> None:
    """In the first set after step 2."""
    _signal_at(3)


def signal_in_test() -> None:
    """In the first test set, of a start that went on from step 2, which it evaluates first."""
    _signal_at(5)


def test_what_a_stop_leaves_out_is_made_up_for(tuning: dict[str, Any], write_config: Callable[..., str]) -> None:
    config, run = copy.deepcopy(tuning), Path(f"{tuning['train']['run_dir']}-stopped")
    for group in ("validation", "test"):
        config["data"][group].append({**config["data"][group][0], "name": "again"})
    config["train"]["checkpoint"] = {"every_steps": 100, "resume": "auto"}
    path = write_config(config)

    def train(folder: Path, first: Callable[[], None] | None = None) -> tuple[list[int], str]:
        with Processes("tune.train", path, f"train.run_dir={folder}", count=2, first=first) as ranks:
            return ranks.end(), ranks.output

    statuses, output = train(run, signal_in_validation)
    assert statuses == [EXIT_PREEMPTED] * 2 and "asked to stop: step 2 is saved" in output, output
    cut = exact(run)[2]
    assert "validation/parity/loss/ensemble" in cut and "validation/parity/loss" not in cut
    assert not [name for name in cut if name.startswith("validation/again")]

    statuses, output = train(run, signal_in_test)
    assert statuses == [EXIT_PREEMPTED] * 2 and "asked to stop: step 4 is saved" in output, output
    assert [path.name for path in run.glob("answers-*")] == ["answers-parity.json"]
    assert not [name for name in exact(run)[4] if name.startswith("test/again")]
    assert json.loads((run / "heartbeat/rank-0.json").read_text())["phase"] == "stopped"

    undisturbed = Path(f"{run}-not")
    for folder in (run, undisturbed):
        statuses, output = train(folder)
        assert statuses == [0, 0], output
    assert exact(run) == exact(undisturbed)
    for name in ("answers-parity.json", "answers-again.json"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
