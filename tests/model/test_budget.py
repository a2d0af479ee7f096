"""The budget: a price that is the penalty's gradient, and controllers that hold the density."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model.budget import Budget, MarginStatistics
from model.config import BudgetConfig
from model.flops import site_shares
from model.schedules import Progress
from tests.model.tiny import config, share

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
    held.observe(density, share(1.0))
    torch.testing.assert_close(held.prices(), gradient)
    torch.testing.assert_close(held.penalty(density.detach(), share(1.0)), penalty.detach())
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
        held.observe(density, share(1.0))
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
        assert held.target(share(progress)) == pytest.approx(target), progress
    held.observe(torch.full((6,), 0.7), share(0.4))
    torch.testing.assert_close(held.prices(), torch.zeros(6), rtol=0, atol=1e-6)
    assert budget().target(share(0.0)) == TARGET  # no warm-up unless asked
    step_like = budget(dense_until=0.5, reach_by=0.5)
    assert (step_like.target(share(0.49)), step_like.target(share(0.5))) == (1.0, TARGET)
    assert Budget(config("dense"), 33).target(share(0.5)) == 1.0


@KINDS
@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_state_round_trip(kind: str, controller: str) -> None:
    first, second = budget(kind, controller), budget(kind, controller)
    for step in range(3):
        first.observe(torch.linspace(0.1, 0.9, 6) + 0.01 * step, share(1.0))
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    for _ in range(2):
        assert first.prices().any() and torch.equal(first.prices(), second.prices())
        first.observe(torch.full((6,), 0.3), share(1.0))
        second.observe(torch.full((6,), 0.3), share(1.0))


def test_wrong_number_of_sites_is_refused() -> None:
    other = Budget(config(), 33)
    with pytest.raises(ValueError, match=r"has 6 routed sites, but this model has 3; resume with the router block"):
        other.load_state_dict(budget().state_dict())
    assert torch.equal(other.prices(), torch.zeros(3))


@pytest.mark.parametrize("controller", ["fixed", "adaptive", "quantile"])
def test_another_controllers_integral_is_left(controller: str) -> None:
    """It is a price in nats, or deviations of margins; a fork may have another controller."""
    others = {"fixed", "adaptive", "quantile"} - {controller}
    for other in others:
        held = Budget(config(budget={"controller": other}), 33)
        state = held.state_dict() | {"integral": torch.tensor([1.2, -0.7, 0.1]), "error": torch.zeros(3)}
        made = Budget(config(budget={"controller": controller}), 33)
        made.load_state_dict(state)
        assert not made.prices().any() and not made._integral.any()
    made.load_state_dict(state | {"controller": controller})
    assert made._integral.tolist() == pytest.approx([1.2, -0.7, 0.1])


@pytest.mark.parametrize("kind", ["dense", "random", "stride", "expert_choice"])
def test_inactive_without_learned_routers(kind: str) -> None:
    held = Budget(config(kind, **({} if kind == "dense" else {"budget": {"controller": "adaptive"}})), 33)
    density = torch.ones(held.sites)
    held.observe(density, share(1.0))
    assert not held.active
    assert held.prices().shape == (held.sites,) and not held.prices().any()
    assert held.penalty(density, share(1.0)) == 0
    assert held.target(share(0.0)) == (1.0 if kind == "dense" else 0.5)


def seen(mean: Tensor, square: Tensor) -> MarginStatistics:
    """Moments of margins, with inputs of which nothing is asked."""
    return MarginStatistics(torch.stack((mean, square)).double(), torch.zeros((len(mean), 4), dtype=torch.float64))


def follow(margins: Tensor, steps: int, target: float = TARGET, drift: float = 0.0) -> tuple[Budget, Tensor]:
    """A quantile controller on the same ``margins`` [S, N] at every step, moved by ``drift``; densities at the end."""
    held = Budget(config(density=target, budget={"controller": "quantile"}), 33)
    density = torch.zeros(3)
    for step in range(steps):
        thresholds, _ = held.thresholds(share(1.0))
        assert thresholds is not None
        moved = margins.double() + drift * step
        density = (moved.float() >= thresholds[:, None]).float().mean(1)
        held.observe(density, share(1.0), seen(moved.mean(1), moved.square().mean(1)))
    return held, density


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_a_threshold_finds_the_quantile_of_any_margins(target: float) -> None:
    """Of a normal distribution at once, of a skewed one and of two bundles soon; and where they drift, nearly."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=generator)
    bundles = torch.where(torch.rand(20_000, generator=generator) < 0.7, normal * 0.1 - 2, normal * 0.1 + 3)
    margins = torch.stack((5 + 2 * normal, normal.exp(), bundles))
    _, density = follow(margins, 2, target)
    assert float(density[0]) == pytest.approx(target, abs=0.01)
    held, density = follow(margins, 60, target)
    torch.testing.assert_close(density, torch.full((3,), target), rtol=0, atol=0.02)
    assert not held.prices().any() and held.penalty(density, share(1.0)) == 0
    _, density = follow(margins[:2].repeat(2, 1)[:3], 60, target, drift=0.05)
    torch.testing.assert_close(density, torch.full((3,), target), rtol=0, atol=0.05)


def test_a_quantile_at_a_target_of_one_is_below_everything_and_gates_still_learn() -> None:
    held = Budget(config(density=TARGET, budget={"controller": "quantile", "dense_until": 0.5, "reach_by": 1.0}), 33)
    for _ in range(2):
        thresholds, centres = held.thresholds(share(0.2))
        assert thresholds is not None and centres is not None
        assert torch.isneginf(thresholds).all() and torch.isfinite(centres.margin).all()
        assert (centres.input is None) == (not held.seen_margins)
        held.observe(torch.ones(3), share(0.2), seen(torch.full((3,), 2.0), torch.full((3,), 5.0)))
    assert centres.margin.tolist() == [1.0] * 3  # a deviation below the mean
    thresholds, _ = held.thresholds(share(0.75))
    assert thresholds is not None and bool((thresholds > 0).all())
    # Before any margins, whatever the target: everything executes.
    first, _ = Budget(config(density=TARGET, budget={"controller": "quantile"}), 33).thresholds(share(1.0))
    assert first is not None and torch.isneginf(first).all()


def test_a_quantile_goes_on_where_it_was_saved() -> None:
    margins = torch.randn((3, 1000), generator=torch.Generator().manual_seed(1))
    first, _ = follow(margins, 5)
    second = Budget(config(density=TARGET, budget={"controller": "quantile"}), 33)
    second.load_state_dict(first.state_dict())
    (one, one_centres), (other, other_centres) = (held.thresholds(share(1.0)) for held in (first, second))
    assert one is not None and other is not None and one_centres is not None and other_centres is not None
    assert torch.equal(one, other) and torch.equal(one_centres.margin, other_centres.margin)
    assert one_centres.input is not None and other_centres.input is not None
    assert torch.equal(one_centres.input, other_centres.input)
    older = {name: value for name, value in first.state_dict().items() if name != "input_mean"}
    with pytest.raises(
        ValueError, match=r"budget state lacks input_mean, .*: an older version saved it; continue with the commit"
    ):
        second.load_state_dict(older)


def test_a_ramp_in_steps_does_not_move_with_the_run() -> None:
    held = budget(dense_until_step=10, reach_by_step=30)
    for steps in (20, 40, 1000):
        asked = [held.target(Progress(step, steps)) for step in (0, 9, 20, 30, 50)]
        assert asked == pytest.approx([1.0, 1.0, 0.7, TARGET, TARGET])
    for wrong, sentence in (
        ({"dense_until": 0.1, "reach_by_step": 5}, "both in shares of the run .* and in steps .*; use only one"),
        (
            {"dense_until_step": 5, "reach_by_step": 4},
            r"reach_by_step \(4\) must not be less than budget.dense_until_step \(5",
        ),
    ):
        with pytest.raises(ValidationError, match=sentence):
            BudgetConfig.model_validate(wrong)
    with pytest.raises(
        ValidationError, match=r"'quantile' holds every site at the target, but budget.kind 'global' lets"
    ):
        BudgetConfig(controller="quantile", kind="global")
