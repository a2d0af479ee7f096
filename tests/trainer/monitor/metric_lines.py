"""Mixtures, steps and evaluations whose metrics are written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from model.flops import Routed
from trainer.evaluate import Evaluation
from trainer.tally import StepResult, Tally

Train = Callable[..., int]


def in_stages(data: dict[str, Any]) -> dict[str, Any]:
    """With a second stage, without ``code``, from within the third step of the tiny run on."""
    stages = [
        {"name": "main", "from_tokens": 0, "weights": {"code": 3, "few": 1}},
        {"name": "end", "from_share": 20 / 32, "weights": {"few": 1}},
    ]
    return data | {"stages": stages}


def evaluation_of(density: list[float]) -> Evaluation:
    """An evaluation of ``code``: ten tokens, a loss of 2 and these densities, a site each."""
    routed = Routed(10, 55, [10 * d for d in density], [20.0] * len(density))
    return Evaluation(
        "code",
        Tally(20.0, 0.0, 10, 0, routed, 0, [0.0] * len(density)),
        None,
        torch.ones(len(density), 8, dtype=torch.bool),
    )


def step_result(stop: int = 0) -> StepResult:
    """A step with the tally of such an evaluation."""
    return StepResult(replace(evaluation_of([0.5] * 3).greedy, stop=stop), 0.0, 1.0, True, [])
