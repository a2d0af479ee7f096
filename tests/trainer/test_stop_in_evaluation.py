"""A stop request cuts an evaluation short between its parts; the step is saved, and a resume evaluates it again."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pretrain.train as stage_one
from tests.faults.breakage import signal_in_tasks
from tests.faults.test_kills import exact, lines
from tests.ranks import Ranks
from tests.trainer.tasks.questions import write_questions
from tests.trainer.tasks.test_live import OWN_TASK
from trainer import trainer as trainers
from trainer.exit_status import EXIT_PREEMPTED


def _figures(run: Path) -> dict[int, dict[str, Any]]:
    return {
        step: {n: v for n, v in line.items() if n not in ("tasks/seconds", "tasks/share_of_time")}
        for step, line in exact(run).items()
    }


@pytest.mark.parametrize(("stage", "harness"), [(2, False), (3, False), (3, True)])
def test_between_two_batches_of_tasks(
    tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path, stage: int, harness: bool
) -> None:
    """Evaluated more often than saved: what was trained since the last save is saved before the run ends."""
    files = write_questions(tmp_path / "tasks")
    questions = [str(path) for path in files.values()]
    if harness:
        pytest.importorskip("lm_eval")
        (tmp_path / "own.yaml").write_text(OWN_TASK.format(data=files["go_on"]))
        questions = [str(tmp_path / "own.yaml")]
    tiny["train"]["evaluation"] = {"every_steps": 3, "samples": 2, "tasks": questions}
    tiny["train"] |= {"steps": 6, "checkpoint": {"every_steps": 100, "resume": "auto"}}
    tiny["deepspeed"]["zero_stage"] = stage
    config, run = write_config(tiny), Path(tiny["train"]["run_dir"])
    with Ranks(config, first=signal_in_tasks) as ranks:
        assert ranks.end() == [EXIT_PREEMPTED] * 2, ranks.output
        assert "asked to stop: step 3 is saved; go on with:" in ranks.output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    cut = exact(run)[3]
    assert "train/loss" in cut and not [name for name in cut if name.startswith(("tasks/", "validation/"))]
    for folder in (run, Path(f"{run}-undisturbed")):
        with Ranks(config, f"train.run_dir={folder}") as ranks:
            assert ranks.end() == [0, 0], ranks.output
    assert _figures(run) == _figures(Path(f"{run}-undisturbed"))
    assert len(lines(run)) == len(exact(run))  # each step once


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Two validation sets, and SIGTERM while the first is evaluated after that step."""
    evaluate, open_data, steps = trainers.evaluate, stage_one.open_data, list[int | None]()

    def opened(*arguments: Any) -> Any:
        data, (first,) = open_data(*arguments)
        second = copy.copy(first)
        second.name = "again"
        return data, [first, second]

    def interrupted(*arguments: Any) -> Any:
        if arguments[-1] == steps[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(stage_one, "open_data", opened)
    monkeypatch.setattr(trainers, "evaluate", interrupted)
    return steps.append


def test_between_two_validation_sets_at_any_step(
    tiny: dict[str, Any],
    train_here: Callable[..., int],
    stop_at: Callable[[int | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny["train"]["checkpoint"] = {"every_steps": 3, "resume": "auto", "keep": 9}
    run = Path(tiny["train"]["run_dir"])
    for step, said in (
        (0, " before the first step"),
        (2, ": step 2 is saved"),
        (2, ": step 2 is saved"),
        (4, ": step 4"),
    ):
        stop_at(step)
        assert train_here(tiny) == EXIT_PREEMPTED
        assert f"asked to stop{said}" in capsys.readouterr().out
        assert not [name for name in exact(run).get(step, {}) if name.startswith("validation/")]
        assert json.loads((run / "heartbeat/rank-0.json").read_text())["phase"] == "stopped"
    saved = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert saved == ["step-00000002", "step-00000003", "step-00000004"]  # once each, and none of step 0
    stop_at(None)
    assert train_here(tiny) == 0
    assert json.loads((run / "heartbeat/rank-0.json").read_text())["phase"] == "ended"
    assert train_here(tiny, f"train.run_dir={run}-undisturbed") == 0
    assert exact(run) == exact(Path(f"{run}-undisturbed"))
    assert all(f"validation/{name}/loss" in exact(run)[step] for name in ("code", "again") for step in (0, 2, 4))


def test_what_is_no_longer_on_the_disk_is_saved_again(
    tiny: dict[str, Any],
    train_here: Callable[..., int],
    stop_at: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run folder may be removed in an evaluation, which is a reason to stop."""
    checkpoint = Path(tiny["train"]["run_dir"]) / "checkpoints/step-00000002"
    interrupted = trainers.evaluate

    def removed(*arguments: Any) -> Any:
        if arguments[-1] == 2:
            checkpoint.rename(checkpoint.with_name("moved"))
        return interrupted(*arguments)

    monkeypatch.setattr(trainers, "evaluate", removed)
    stop_at(2)
    assert train_here(tiny, "train.checkpoint.background=false") == EXIT_PREEMPTED
    assert (checkpoint / "manifest.json").is_file()
