"""Validation: every window once however it is batched, greedy and noisy apart, and nothing of the training touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from data.batches import ValidationSet
from tests.trainer.one_rank import engine_for, weights
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.evaluate import Evaluation, evaluate

Configure = Callable[..., PretrainConfig]


def _evaluate(config: PretrainConfig, world: World, step: int = 1) -> Evaluation:
    with engine_for(config, world) as engine:
        (result,) = evaluate(engine, [ValidationSet(config.data, "code")], config, world, step)
    return result


def test_filling_rows_do_not_count(configure: Configure, world: World) -> None:
    """Five windows in batches of 1, 2 (a filled-up last one) and 8."""
    results = [_evaluate(configure(f"train.micro_batch_samples={size}"), world) for size in (1, 2, 8)]
    for result in results:
        assert result.name == "code" and result.greedy.targets == result.greedy.routed.tokens == 5 * 32
        assert result.greedy.loss == pytest.approx(results[0].greedy.loss, rel=1e-6)
        assert result.greedy.density == results[0].greedy.density
        assert result.noisy is not None and results[0].noisy is not None
        assert result.noisy.density == results[0].noisy.density
        assert result.executed is not None and result.executed.shape == (3, 32)
        assert result.executed.dtype == torch.bool and result.executed.device.type == "cpu"


def test_noise_is_that_of_the_step_and_greedy_has_none(configure: Configure, world: World) -> None:
    """Noise goes from 1 to 0 over the first 60 % of 100 steps."""
    config = configure("train.steps=100")
    early, late = _evaluate(config, world, 1), _evaluate(config, world, 90)
    assert early.noisy is not None and late.noisy is not None
    assert early.greedy == late.greedy
    assert early.noisy.density != early.greedy.density
    assert late.noisy.loss == pytest.approx(late.greedy.loss, rel=1e-6) and late.noisy.density == late.greedy.density


@pytest.mark.parametrize(
    "override", ["model.router.kind=random", "model.router=null", "train.evaluation.with_noise=false"]
)
def test_no_noisy_loss_where_there_is_no_noise_or_none_is_wanted(
    configure: Configure, world: World, override: str
) -> None:
    result = _evaluate(configure(override), world)
    assert result.noisy is None
    assert (result.executed is None) == (override == "model.router=null") == (result.greedy.density == [])


@pytest.mark.parametrize("with_noise", ["true", "false"])
def test_an_evaluation_leaves_the_engine_as_it_was(configure: Configure, world: World, with_noise: str) -> None:
    config = configure(f"train.evaluation.with_noise={with_noise}")
    sets = [ValidationSet(config.data, "code")]
    with engine_for(config, world) as engine:
        before: dict[str, Any] = weights(engine)
        first = evaluate(engine, sets, config, world, 1)
        assert engine.module.training
        assert all(p.grad is None for p in engine.module.parameters())
        assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
        again = evaluate(engine, sets, config, world, 1)
    assert (again[0].greedy, again[0].noisy) == (first[0].greedy, first[0].noisy)
