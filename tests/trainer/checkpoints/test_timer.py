"""When a save is due by the clock."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from trainer.checkpoints.timer import SaveTimer
from trainer.config_blocks import CheckpointConfig


def test_a_save_is_due_when_its_minutes_have_passed_since_the_last_one_began() -> None:
    now_s = 1000.0
    timer = SaveTimer(2.5, lambda: now_s)
    never = SaveTimer(None, lambda: now_s)
    due_at = []
    for now_s in range(1000, 2000, 10):
        if timer.due:
            due_at.append(now_s)
            timer.restart()
        if now_s == 1400:  # for another reason, as every so many steps
            timer.restart()
    assert due_at == [1150, 1300, 1550, 1700, 1850] and not never.due


@pytest.mark.parametrize("minutes", [0, -5, 0.05, float("inf"), float("nan"), "often"])
def test_nonsense_is_refused(minutes: object) -> None:
    with pytest.raises(ValidationError, match="every_minutes"):
        CheckpointConfig.model_validate({"every_minutes": minutes})
