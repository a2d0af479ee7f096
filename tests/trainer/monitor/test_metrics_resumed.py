"""One line a step, and the same means, after any stop, kill or refused start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.budget import Budget
from tests.logged import OF_TIME, lines_of
from tests.trainer.monitor.metric_lines import Train, evaluation_of, step_result
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.exit_status import EXIT_PREEMPTED
from trainer.monitor.metrics import Metrics
from trainer.monitor.stop import StopRequest
from trainer.run_folder import RunFolder


@pytest.mark.parametrize(("resumed_at", "kept"), [(3, [1, 2, 3]), (2, [1, 2]), (0, []), (None, [])])
def test_a_resume_keeps_the_lines_up_to_its_step(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder, resumed_at: int | None, kept: list[int]
) -> None:
    made = Metrics(configure(), folder, world, resumed_at, 1e12)
    assert made.has_evaluation(2) == (2 in kept) and not made.has_evaluation(4) and not made.has_evaluation(3)
    made.log_evaluation(9, [evaluation_of([0.5, 0.5, 0.5])])
    made.close()
    assert [line["step"] for line in lines_of(folder.path)] == [*kept, 9]


def test_a_refused_start_leaves_the_line_of_its_step(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder
) -> None:
    """What an evaluation found after the last save is nowhere else."""
    folder.metrics.write_text('{"step": 1}\n{"step": 2, "validation/code/loss": 3.5}\n{"step": 3}\n')
    for _ in range(2):  # the first is refused before it trains
        made = Metrics(configure(), folder, world, 2, 1e12)
        assert [line["step"] for line in lines_of(folder.path)] == [1, 2]
    made.log_scalars(2, {"more": 1.0})
    made.log_scalars(3, {"more": 2.0})
    made.close()
    assert lines_of(folder.path) == [
        {"step": 1}, {"step": 2, "validation/code/loss": 3.5, "more": 1.0}, {"step": 3, "more": 2.0},
    ]  # fmt: skip


def test_a_stop_between_two_lines_moves_no_mean(tiny: dict[str, Any], train_here: Train, tmp_path: Path) -> None:
    """Stopped after every step; lines are of three."""
    tiny["train"]["log"]["every_steps"] = 3
    tiny["train"]["checkpoint"] = {"every_steps": 2}
    assert train_here(tiny, f"train.run_dir={tmp_path / 'whole'}") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "__init__", lambda self, **_: setattr(self, "requested", True))
        while train_here(tiny, "train.checkpoint.resume=auto") == EXIT_PREEMPTED:
            pass
    lines, whole = (lines_of(folder) for folder in (tiny["train"]["run_dir"], tmp_path / "whole"))
    assert [line["step"] for line in lines] == [line["step"] for line in whole] == [0, 2, 3, 4]
    for own, other in zip(lines, whole, strict=True):
        assert {n: v for n, v in own.items() if not n.startswith(OF_TIME)} == {
            n: v for n, v in other.items() if not n.startswith(OF_TIME)
        }
        assert own.keys() == other.keys()


def test_the_line_of_a_killed_evaluation_is_in_the_checkpoint(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder
) -> None:
    config = configure("train.log.every_steps=2", "train.steps=1000")
    killed = Metrics(config, folder, world, None, 1e12)
    for step in (1, 2):
        killed.log_step(step, 8 * step, step_result(), 0.1, Budget(config.model, 32), 0.25 * step)
    state = killed.state_dict()
    assert not folder.metrics.read_text()
    made = Metrics(config, folder, world, 2, 1e12)
    made.load_state_dict(state)
    assert not made.has_evaluation(2)
    made.log_evaluation(2, [evaluation_of([0.7, 0.6, 0.5])])
    made.write_line()
    (line,) = lines_of(folder.path)
    assert (line["step"], line["train/tokens"]) == (2, 2 * 8 * 32) and line["validation/code/loss"] == 2.0
    again = Metrics(config, folder, world, 2, 1e12)  # killed behind its line: nothing twice
    again.load_state_dict(state)
    assert again.has_evaluation(2)
    again.close()
    assert lines_of(folder.path) == [line]


def test_steps_on_other_sources_are_not_taken_over(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder
) -> None:
    """A fork may have more of them, or others, and a line tells their losses apart."""
    config = configure("train.log.every_steps=2")
    parent = Metrics(config, folder, world, None, 1e12)
    parent.log_step(1, 8, step_result(), 0.1, Budget(config.model, 32), 0.25)
    state = parent.state_dict()
    made = Metrics(config, folder, world, 1, 1e12)
    made.load_state_dict(state | {"sources": ["another"]})
    made.log_step(2, 16, step_result(), 0.1, Budget(config.model, 32), 0.5)
    made.close()
    assert lines_of(folder.path)[-1]["step"] == 2 and state["sources"] == ["code"]
    assert len(made._since_log) == 0 and made.state_dict()["since_log"] == []
    again = Metrics(config, folder, world, 1, 1e12)
    again.load_state_dict(state | {"sources": ["another"]})
    assert again.state_dict()["since_log"] == []
    again.load_state_dict(state)
    assert len(again.state_dict()["since_log"]) == 1
