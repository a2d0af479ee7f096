"""The budget: a price that is the penalty's gradient, and controllers that hold the density."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.budget import Budget
from model.flops import site_shares
from tests.model.tiny import config

KINDS = pytest.mark.parametrize("kind", ["per_layer", "global"])
TARGET = 0.4


def budget(kind: str = "per_layer", controller: str = "fixed", **fields: float) -> Budget:
    block = {"kind": kind, "controller": controller, "adaptive_rate": 0.01, **fields}
    return Budget(config(density=TARGET, granularity="module", budget=block), sequence_tokens=33)


def formula(kind: str, density: Tensor, coefficient: float) -> Tensor:
    """The regulariser as written: c sum (r_s - P)^2, or c S (sum f_s r_s - P)^2."""
    if kind == "per_layer":
        return coefficient * (density - TARGET).square().sum()
    shares = torch.tensor(site_shares(config(granularity="module"), 33))
    return coefficient * len(density) * ((shares * density).sum() - TARGET).square()


@KINDS
@pytest.mark.parametrize("coefficient", [0.1, 2.0])
def test_price_is_the_gradient_of_the_formula(kind: str, coefficient: float) -> None:
    density = torch.tensor([0.9, 0.1, 0.5, 0.4, 0.7, 0.2], requires_grad=True)
    held = budget(kind, coefficient=coefficient)
    penalty = formula(kind, density, coefficient)
    (gradient,) = torch.autograd.grad(penalty, density)
    held.observe(density, 1.0)
    torch.testing.assert_close(held.prices(), gradient)
    torch.testing.assert_close(held.penalty(density.detach(), 1.0), penalty.detach())
    assert not held.prices().requires_grad


@KINDS
@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_first_step_is_free(kind: str, controller: str) -> None:
    assert torch.equal(budget(kind, controller).prices(), torch.zeros(6))


def settle(held: Budget, gains: Tensor, steps: int = 3000) -> Tensor:
    """Densities that a toy router ends at, where executing is worth ``gains`` nats per unit of density."""
    logits = torch.full_like(gains, 2.0)
    for _ in range(steps):
        density = torch.sigmoid(logits)
        logits = logits - 2.0 * (held.prices() - gains) * density * (1 - density)
        held.observe(density, 1.0)
    return torch.sigmoid(logits)


def test_adaptive_meets_the_target_where_fixed_has_an_offset() -> None:
    gains = torch.tensor([0.05, -0.02, 0.1, 0.0, 0.03, 0.08])
    fixed = settle(budget(coefficient=0.2), gains)
    torch.testing.assert_close(fixed, TARGET + gains / 0.4, rtol=0, atol=1e-3)
    adaptive = settle(budget(controller="adaptive", coefficient=0.2), gains)
    torch.testing.assert_close(adaptive, torch.full_like(gains, TARGET), rtol=0, atol=1e-3)


def test_global_holds_only_the_weighted_mean() -> None:
    shares = torch.tensor(site_shares(config(granularity="module"), 33))
    gains = shares * 6 * torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1]) + torch.tensor([0.005, -0.005] * 3)
    density = settle(budget("global", "adaptive", coefficient=0.5), gains, steps=300)
    assert abs(float((shares * density).sum()) - TARGET) < 0.02
    assert float(density.max() - density.min()) > 0.1


def test_target_schedule() -> None:
    held = budget(dense_until=0.2, reach_by=0.6)
    for progress, target in {0.0: 1, 0.19: 1, 0.2: 1, 0.3: 0.85, 0.4: 0.7, 0.6: TARGET, 1.0: TARGET}.items():
        assert held.target(progress) == pytest.approx(target), progress
    held.observe(torch.full((6,), 0.7), 0.4)
    torch.testing.assert_close(held.prices(), torch.zeros(6), rtol=0, atol=1e-6)
    assert budget().target(0.0) == TARGET  # no warm-up unless asked
    step_like = budget(dense_until=0.5, reach_by=0.5)
    assert (step_like.target(0.49), step_like.target(0.5)) == (1.0, TARGET)
    assert Budget(config("dense"), 33).target(0.5) == 1.0


@KINDS
@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_state_round_trip(kind: str, controller: str) -> None:
    first, second = budget(kind, controller), budget(kind, controller)
    for step in range(3):
        first.observe(torch.linspace(0.1, 0.9, 6) + 0.01 * step, 1.0)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second.load_state_dict(state)
    for _ in range(2):
        assert first.prices().any() and torch.equal(first.prices(), second.prices())
        first.observe(torch.full((6,), 0.3), 1.0)
        second.observe(torch.full((6,), 0.3), 1.0)


def test_wrong_number_of_sites_is_refused() -> None:
    other = Budget(config(), 33)
    with pytest.raises(ValueError, match=r"has 6 routed sites, this model has 3; resume with the router block"):
        other.load_state_dict(budget().state_dict())
    assert torch.equal(other.prices(), torch.zeros(3))


@pytest.mark.parametrize("kind", ["dense", "random", "stride", "expert_choice"])
def test_inactive_without_learned_routers(kind: str) -> None:
    held = Budget(config(kind, **({} if kind == "dense" else {"budget": {"controller": "adaptive"}})), 33)
    density = torch.ones(held.sites)
    held.observe(density, 1.0)
    assert not held.active
    assert held.prices().shape == (held.sites,) and not held.prices().any()
    assert held.penalty(density, 1.0) == 0
    assert held.target(0.0) == (1.0 if kind == "dense" else 0.5)
