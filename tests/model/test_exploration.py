"""Exploration: gates learn what a layer would add to skipped tokens, and no output changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import RouterConfig
from model.decoder import Decoder
from model.router import ROUTERS, Gate, RoutingInputs
from tests.model.routed_steps import BATCH, EXECUTIONS, assert_same_step, executions, granular, masks, step
from tests.model.tiny import LENGTH, assert_close, config, decoder, force, random_targets, random_tokens


def last_gate(model: Decoder) -> list[Gate]:
    """Where the last layer's gate will be found, its value keeping its gradient."""
    kept: list[Gate] = []

    def keep(module: torch.nn.Module, args: object, gate: Gate) -> None:
        gate.value.retain_grad()
        kept.append(gate)

    model.layers[-1].router.register_forward_hook(keep)
    return kept


def added_by_last_layer(model: Decoder) -> tuple[list[Tensor], list[Tensor]]:
    """Where the last layer's output, keeping its gradient, and its modules' outputs will be found."""
    outputs: list[Tensor] = []
    updates: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, out: tuple[Tensor, list[Gate]]) -> None:
        out[0].retain_grad()
        outputs.append(out[0])

    model.layers[-1].register_forward_hook(keep)
    for module in (model.layers[-1].self_attn, model.layers[-1].mlp):
        module.register_forward_hook(lambda module, args, out: updates.append(out.detach()))
    return outputs, updates


@pytest.mark.parametrize("explore", [0.0, 0.4, 1.0])
@executions
def test_gates_learn_what_their_layer_adds(explore: float, execution: str) -> None:
    """d loss / d gate is <what the layer adds to the token, d loss / d output> + the price, of executed and explored
    tokens. Where none are explored, skipped tokens' gates learn the price alone.

    Only the last layer is routed, so the loss's gradient at its output is always the same.
    """
    whole = decoder(config("learned", always_on_first=2, execution="reference"))
    outputs, updates = added_by_last_layer(whole)
    step(whole)
    textbook = ((updates[0] + updates[1]).view_as(outputs[0]) * outputs[0].grad).sum(-1) - 3 / (BATCH * LENGTH)

    model = decoder(config("learned", always_on_first=2, explore=explore, execution=execution))
    gates = last_gate(model)
    out, _ = step(model)
    gate = gates[0]
    explored = torch.zeros_like(gate.executed) if gate.explored is None else gate.explored
    assert not (explored & gate.executed).any()
    assert explored.sum() == out.routing.explored_tokens.sum()
    share = explored.sum() / (~gate.executed).sum()
    assert share == explore if explore in (0, 1) else abs(share - explore) < 0.15
    learned = gate.value.grad
    assert_close(learned[gate.executed], textbook[gate.executed])
    others = ~gate.executed & ~explored
    if explore == 0:
        assert torch.equal(learned[others], torch.full_like(learned[others], -3 / learned.numel()))
        return
    assert_close(learned[explored], textbook[explored])
    assert (textbook[explored] + 3 / learned.numel()).abs().max() > 1e-3


def test_explored_gates_stand_for_those_that_are_not() -> None:
    """Explored gates' gradients count 1 / explore times: on average the router's gradient is that with all explored."""
    x = torch.randn(1, 400, 8, generator=torch.Generator().manual_seed(0))

    def gradient(explore: float, seed: int) -> tuple[Gate, Tensor]:
        made = ROUTERS["learned"](RouterConfig(density=0.5, explore=explore), 8, 0)
        torch.nn.init.normal_(made.weight, std=0.3, generator=torch.Generator().manual_seed(1))
        sharp = torch.tensor(0.0), torch.tensor(1.0)
        gate = made(x, RoutingInputs(torch.tensor([3]), torch.arange(400), *sharp, seed))
        (gate.value * x[..., 0]).sum().backward()
        return gate, made.weight.grad

    every, exact = gradient(1.0, 0)
    assert torch.equal(every.explored, ~every.executed)
    estimates = [gradient(0.25, seed) for seed in range(100)]
    assert all(torch.equal(gate.executed, every.executed) for gate, _ in estimates)
    shares = [gate.explored.sum() / every.explored.sum() for gate, _ in estimates]
    assert 0.23 < torch.stack(shares).mean() < 0.27
    mean = torch.stack([found for _, found in estimates]).mean(0)
    assert (mean - exact).norm() < 0.1 * exact.norm()


@granular
@pytest.mark.parametrize("recompute", [False, True])
def test_a_modules_last_call_is_the_one_with_a_gradient(granularity: str, recompute: bool) -> None:
    """Under ZeRO 3 a last call without one would keep the module's weights gathered through the backward pass."""
    model, calls = decoder(config("learned", granularity=granularity, explore=0.5), recompute=recompute), []
    for module in (model.layers[1].mlp, model.layers[1].self_attn.o_proj):
        module.register_forward_pre_hook(lambda module, args: calls.append((module, torch.is_grad_enabled())))
    model(random_tokens(), random_targets(), noise_scale=0.7)
    for module in (model.layers[1].mlp, model.layers[1].self_attn.o_proj):
        assert [graded for called, graded in calls if called is module] == [False, True]


@pytest.mark.parametrize("mode", ["evaluation", "no gradient", "nothing skipped"])
def test_nothing_is_explored_without_a_gradient(mode: str) -> None:
    model = decoder(config("learned", explore=1.0))
    if mode == "nothing skipped":
        force(model, masks("all executed", 3))
    calls = []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(mode == "nothing skipped"):
        out = model.train(mode != "evaluation")(random_tokens(), random_targets())
    assert out.routing.explored_tokens.sum() == 0
    assert len(calls) == len(model.layers) or mode == "nothing skipped"


@granular
@pytest.mark.parametrize("confined", [False, True])
def test_exploration_is_the_same_in_both_executions(granularity: str, confined: bool) -> None:
    pair = [decoder(config("learned", granularity=granularity, explore=0.5, execution=e)) for e in EXECUTIONS]
    assert_same_step(*pair, confined=confined)


@granular
def test_exploration_changes_no_output(granularity: str) -> None:
    plain, exploring = (step(decoder(config("learned", granularity=granularity, explore=e)))[0] for e in (0.0, 0.7))
    assert torch.equal(plain.loss.token_nll, exploring.loss.token_nll)
    assert torch.equal(plain.routing.executed, exploring.routing.executed)
    assert exploring.routing.explored_tokens.min() > 0 and plain.routing.explored_tokens.max() == 0
