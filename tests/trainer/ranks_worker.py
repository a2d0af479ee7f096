"""Run by tests/trainer/test_ranks.py under a launcher: several engines in one process, results as JSON.

One start of two ranks costs ten seconds, so each checks many cases. ``python -m tests.trainer.ranks_worker`` is one
rank, the reference.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trainer.step
from data.batches import TrainingData
from model.budget import Budget
from model.router import Gate, LearnedRouter, RoutingInputs
from settings import load
from trainer.config import PretrainConfig
from trainer.distributed import World, join, leave
from trainer.engine import build_engine, set_learning_rate
from trainer.loop import micro_batches
from trainer.step import train_step
from trainer.tally import StepResult

STEPS = 4
_decide = LearnedRouter.forward
_forward = trainer.step.forward_at


def main() -> None:
    """Run the cases of a JSON file: a list of {name, overrides, rule}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--local_rank")
    arguments = parser.parse_args()
    world = join(60.0)
    results = {}
    for case in json.loads(arguments.cases.read_text()):
        config = load(arguments.config, case["overrides"], PretrainConfig)
        results[case["name"]] = RULES[case["rule"]](config, world.sharing_windows(config.deepspeed, 60.0))
        LearnedRouter.forward = _decide  # type: ignore[method-assign]
        trainer.step.forward_at = _forward
    if world.is_main:
        arguments.out.write_text(json.dumps(results))
    world.barrier()
    leave()
    from deepspeed.utils import groups

    assert groups._WORLD_GROUP is None  # its threads could abort the process at its end


def plain(config: PretrainConfig, world: World) -> dict[str, Any]:
    """Four steps as they are."""
    return _train(config, world)


def starved(config: PretrainConfig, world: World) -> dict[str, Any]:
    """The second half of every batch (rank 1's, if there are two) executes nothing at site 1; in step 1 nobody does."""
    batch = config.train.global_batch_samples

    def forward(self: LearnedRouter, x: Tensor, inputs: RoutingInputs) -> Gate:
        gate = _decide(self, x, inputs)
        if self.site != 1:
            return gate
        keep = (inputs.sample_ids % batch < batch // 2) & (inputs.sample_ids // batch != 1)
        keep = keep[:, None]
        explored = None if gate.explored is None else gate.explored & keep
        return Gate(gate.executed & keep, gate.value * keep, explored=explored)

    LearnedRouter.forward = forward  # type: ignore[method-assign]
    return _train(config, world)


def uneven(config: PretrainConfig, world: World) -> dict[str, Any]:
    """The first two windows of each four execute everything, the others (rank 1's, by twos) every fourth token."""
    own: list[list[Any]] = []

    def decide(self: LearnedRouter, x: Tensor, inputs: RoutingInputs) -> Gate:
        gate = _decide(self, x, inputs)
        every = torch.where(inputs.sample_ids % 4 < 2, 1, 4)[:, None]
        keep = torch.arange(x.shape[1]) % every == 0
        return Gate(keep, gate.value * 0 + keep)

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = _forward(*args, **kwargs)
        routing = output.routing
        own.append([routing.executed_tokens.tolist(), routing.attended_keys.tolist()])
        return output

    seen: dict[str, Any] = {"largest": [], "ranks": []}

    def after(step: int, engine: Any, result: StepResult) -> None:
        seen["ranks"].append(world.all_gather_objects(own.copy()))
        own.clear()
        most = result.largest
        seen["largest"].append(most and [most.flops, most.routed.executed_tokens, most.routed.attended_keys])

    LearnedRouter.forward = decide  # type: ignore[method-assign]
    trainer.step.forward_at = forward
    return _train(config, world, after) | seen


def bad_loss(config: PretrainConfig, world: World) -> dict[str, Any]:
    """In step 1 the last rank's loss is not a number."""

    def poison(loss: Tensor) -> Tensor:
        return loss * (math.nan if world.rank == world.size - 1 else 1.0)

    return _train_with_bad_step(config, world, poison)


def bad_gradient(config: PretrainConfig, world: World) -> dict[str, Any]:
    """In step 1 every loss is fine, but the last rank's gradient is not."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * (math.inf if world.rank == world.size - 1 else 1.0)

    return _train_with_bad_step(config, world, Spoil.apply)


RULES: dict[str, Callable[[PretrainConfig, World], dict[str, Any]]] = {
    "plain": plain,
    "starved": starved,
    "uneven": uneven,
    "bad_loss": bad_loss,
    "bad_gradient": bad_gradient,
}


def _train(
    config: PretrainConfig, world: World, after: Callable[[int, Any, StepResult], None] | None = None
) -> dict[str, Any]:
    engine = build_engine(config, world)
    budget = Budget(config.model, config.data.sequence_tokens, world.device)
    data = TrainingData(config.data)
    losses, norms, densities = [], [], []
    start = _weights(engine)
    for step, batches in zip(range(STEPS), micro_batches(data, config, world, 0, 0), strict=False):
        set_learning_rate(engine, 1.0)
        result = train_step(engine, batches, budget, config, world, step)
        losses.append(result.tally.loss)
        norms.append(result.grad_norm)
        densities.append(result.tally.density)
        if after is not None:
            after(step, engine, result)
    outcome = {
        "losses": losses,
        "norms": norms,
        "densities": densities,
        "start": _sums(start),
        "end": _sums(_weights(engine)),
    }
    engine.destroy()
    return outcome


def _train_with_bad_step(config: PretrainConfig, world: World, spoil: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    seen: dict[str, Any] = {"applied": []}
    weights: list[dict[str, Tensor]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = _forward(*args, **kwargs)
        if len(weights) == 1:  # step 0 is behind us
            sums = output.loss._replace(loss=spoil(output.loss.loss))
            return type(output)(output.logits, sums, output.routing)
        return output

    def after(step: int, engine: Any, result: StepResult) -> None:
        weights.append(_weights(engine))
        seen["applied"].append(result.applied)
        if step == 1:
            seen["bad_ranks"] = result.bad_ranks

    trainer.step.forward_at = forward
    outcome = _train(config, world, after)
    seen["unchanged"] = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    seen["moved_after"] = any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    seen["finite"] = all(bool(torch.isfinite(w).all()) for w in weights[-1].values())
    return outcome | seen


def _weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter, whole, in fp32 where a master copy exists."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = engine.zero_optimization()
    return {
        name: (safe_get_full_fp32_param(p) if masters else p.detach()).float().clone()
        for name, p in engine.module.named_parameters()
    }


def _sums(weights: dict[str, Tensor]) -> dict[str, list[float]]:
    """Two numbers per parameter that change when it does."""
    ramp = {n: torch.linspace(-1, 1, w.numel(), dtype=torch.float64) for n, w in weights.items()}
    return {n: [float(w.double().norm()), float((w.double().flatten() * ramp[n]).sum())] for n, w in weights.items()}


if __name__ == "__main__":
    main()
    assert not dist.is_initialized()
