"""Contestants take turns, warm-up is left out, and ratios are taken within rounds."""

from __future__ import annotations

import pytest
import torch

from bench.common.timing import WARM_UP_ROUNDS, Spread, ratios, take_turns


def test_contestants_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    seconds = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * (WARM_UP_ROUNDS + 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_slow_round_cancels_out() -> None:
    assert ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0]) == Spread(0.5, 0.5, 0.5)
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_spread() -> None:
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(2.0, 3.0, 4.0)
