"""Learning rates: known values, bounds, no jumps, and the same at every stop and start."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from trainer.config_blocks import ScheduleConfig
from trainer.schedules import lr_ratio

STEPS = 100
KINDS = ("cosine", "warmup_stable_decay", "inverse_sqrt", "constant")


def _curve(steps: int = STEPS, **fields: Any) -> list[float]:
    schedule = ScheduleConfig.model_validate(fields)
    return [lr_ratio(schedule, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_a_line_from_one_share_to_the_peak(kind: str) -> None:
    curve = _curve(kind=kind, warmup_steps=10, inverse_sqrt_from=20)
    assert curve[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert curve[10] == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_at_the_peak(kind: str) -> None:
    assert _curve(kind=kind)[0] == 1.0


@pytest.mark.parametrize(
    ("fields", "last"),
    [
        ({"kind": "cosine", "final_ratio": 0.25}, 0.25),
        ({"kind": "cosine", "final_ratio": 0.0}, 0.0),
        ({"kind": "warmup_stable_decay", "final_ratio": 0.25}, 0.25),
        ({"kind": "warmup_stable_decay", "final_ratio": 0.0}, 0.0),
        ({"kind": "inverse_sqrt", "inverse_sqrt_from": 25}, 0.5),
        ({"kind": "inverse_sqrt", "inverse_sqrt_from": 1000}, 1.0),
        ({"kind": "constant"}, 1.0),
    ],
)
def test_the_last_step_has_the_final_value(fields: dict[str, Any], last: float) -> None:
    assert _curve(warmup_steps=5, **fields)[-1] == pytest.approx(last, abs=1e-12)


def test_values_on_the_way() -> None:
    cosine = _curve(steps=101, kind="cosine", final_ratio=0.2)
    assert cosine[50] == pytest.approx(0.6)
    assert cosine[25] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    stable = _curve(kind="warmup_stable_decay", decay_share=0.2, final_ratio=0.0)
    assert stable[:80] == [1.0] * 80
    assert stable[80:] == pytest.approx([left / 20 for left in range(19, -1, -1)])
    root = _curve(kind="inverse_sqrt", inverse_sqrt_from=16)
    assert root[:16] == [1.0] * 16 and root[63] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 7, 90, 100])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_never_negative_never_above_the_peak_never_a_jump(kind: str, warmup: int, final: float) -> None:
    """Also where the warm-up reaches into the decay."""
    curve = _curve(kind=kind, warmup_steps=warmup, final_ratio=final, inverse_sqrt_from=16)
    assert all(0.0 <= ratio <= 1.0 for ratio in curve)
    # Up by at most one step of the warm-up; down by at most the steepest slope: 20 steps of decay, a cosine over what
    # the warm-up leaves, 1 / sqrt(17 / 16).
    cosine = math.pi / 2 / max(STEPS - 1 - warmup, 1)
    down = {"cosine": cosine, "warmup_stable_decay": 1 / 20, "inverse_sqrt": 1 - math.sqrt(16 / 17)}
    for before, after in itertools.pairwise(curve):
        assert after - before <= 1 / max(warmup, 1) + 1e-12
        assert before - after <= down.get(kind, 0.0) + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_steps_beyond_the_end_and_runs_of_one_step_stay_in_bounds(kind: str) -> None:
    schedule = ScheduleConfig.model_validate({"kind": kind, "warmup_steps": 1, "final_ratio": 0.1})
    assert 0.0 < lr_ratio(schedule, 0, 1) <= 1.0
    assert 0.0 < lr_ratio(schedule, 150, STEPS) <= 1.0


def test_a_decay_in_steps_does_not_move_with_the_run() -> None:
    fields = {"kind": "warmup_stable_decay", "decay_steps": 20, "end_step": 50, "final_ratio": 0.2}
    short, long = _curve(steps=60, **fields), _curve(steps=100, **fields)
    assert long[:60] == short and long[50:] == [0.2] * 50
    assert long[:30] == [1.0] * 30 and long[39] == pytest.approx(0.2 + 0.8 / 2)
    cosine = _curve(steps=100, kind="cosine", end_step=51, final_ratio=0.0)
    assert cosine[:51] == _curve(steps=51, kind="cosine", final_ratio=0.0) and cosine[51:] == [0.0] * 49
