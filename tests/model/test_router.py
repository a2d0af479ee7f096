"""Router kinds one by one: decisions, gate values and the straight-through gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model import noise
from model.config import RouterConfig
from model.router import ROUTERS, Centres, Gate, RoutingInputs, _difference, _logits

BATCH, TOKENS, WIDTH, SITE = 4, 50, 16, 3
SEED = 9


def router(kind: str, density: float = 0.3, site: int = SITE) -> torch.nn.Module:
    made = ROUTERS[kind](RouterConfig(kind=kind, density=density), WIDTH, site)
    if hasattr(made, "weight"):
        with torch.no_grad():
            made.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return made


def inputs(scale: float = 1.0, temperature: float = 1.0, tokens: int = TOKENS) -> RoutingInputs:
    samples = torch.tensor([4, 9, 2, 0])
    return RoutingInputs(samples, torch.arange(tokens), torch.tensor(scale), torch.tensor(temperature), SEED)


def hidden(tokens: int = TOKENS) -> Tensor:
    return torch.randn(BATCH, tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def margin(x: Tensor, weight: Tensor) -> Tensor:
    skip, execute = (x @ weight.T).unbind(-1)
    return execute - skip


def test_evaluation_takes_the_larger_logit() -> None:
    learned = router("learned").eval()
    gate = learned(hidden(), inputs())
    assert torch.equal(gate.executed, (hidden() @ learned.weight.T).argmax(-1) == 1)
    assert torch.equal(gate.value, gate.executed.float()) and not gate.value.requires_grad
    assert 0.2 < gate.executed.float().mean() < 0.8


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_straight_through(scale: float, temperature: float) -> None:
    """Forward the hard decision, exactly 0 or 1; backward the gradient of the sigmoid of noisy margin / temperature."""
    learned, x = router("learned"), hidden().requires_grad_()
    gate = learned(x, inputs(scale, temperature))
    u = noise.uniform(SEED, inputs().sample_ids, SITE, torch.arange(TOKENS))
    logistic = torch.log(u) - torch.log1p(-u)
    noisy = margin(x, learned.weight) + scale * logistic
    assert torch.equal(gate.executed, noisy >= 0)
    assert torch.equal(gate.value, gate.executed.float())

    weights = torch.linspace(-1, 1, BATCH * TOKENS).view(BATCH, TOKENS)
    at_x, found = torch.autograd.grad((gate.value * weights).sum(), (x, learned.weight), allow_unused=True)
    soft = torch.sigmoid(noisy / temperature)
    (expected,) = torch.autograd.grad((soft * weights).sum(), learned.weight)
    assert at_x is None and expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_noise_decides_as_two_gumbels_would() -> None:
    """P(execute) under noise is the softmax's second entry."""
    learned = router("learned")
    x = hidden(1).expand(BATCH, 20_000, WIDTH)
    frequency = learned(x, inputs(tokens=20_000)).executed.float().mean(dim=1)
    torch.testing.assert_close(frequency, torch.sigmoid(margin(hidden(1), learned.weight))[:, 0], rtol=0, atol=0.015)
    halved = learned(x, inputs(0.5, tokens=20_000)).executed.float().mean(dim=1)
    torch.testing.assert_close(halved, torch.sigmoid(2 * margin(hidden(1), learned.weight))[:, 0], rtol=0, atol=0.015)


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_fp32_whatever_the_input(autocast: bool) -> None:
    learned = router("learned").eval().bfloat16()
    x = hidden(2000).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        executed = learned(x, inputs(tokens=2000)).executed
    assert torch.equal(executed, margin(x.float(), learned.weight.float()) >= 0)
    rounded = (x @ learned.weight.T).float()
    assert not torch.equal(executed, rounded[..., 1] >= rounded[..., 0])  # in bf16 some tokens would flip


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_random_density(density: float) -> None:
    x = hidden(4000)
    gates = [router("random", density, site)(x, inputs(tokens=4000)) for site in (0, 1)]
    for gate in gates:
        assert abs(float(gate.executed.float().mean()) - density) < 4 * math.sqrt(density * (1 - density) / 16_000)
        assert torch.equal(gate.value, gate.executed.float())
    together = float((gates[0].executed & gates[1].executed).float().mean())
    assert together == pytest.approx(density**2, abs=0.02)  # sites choose independently


def test_random_is_the_same_in_training_and_evaluation() -> None:
    made = router("random")
    assert torch.equal(made.train()(hidden(), inputs(1.0)).executed, made.eval()(hidden(), inputs(0.0)).executed)


@pytest.mark.parametrize("density", [0.1, 0.25, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("site", [0, 1, 7])
def test_stride_is_even_and_exact(density: float, site: int) -> None:
    executed = router("stride", density, site)(hidden(400), inputs(tokens=400)).executed
    assert executed.shape == (BATCH, 400) and torch.equal(executed, executed[:1].expand(BATCH, -1))
    for window in (10, 100, 400):
        counts = executed[0].float().unfold(0, window, 1).sum(-1)
        assert counts.min() >= math.floor(density * window) - 1e-6 and counts.max() <= math.ceil(density * window)


def test_stride_phases_differ_between_sites() -> None:
    first, second = (router("stride", 0.25, site)(hidden(), inputs()).executed[0] for site in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("density", "count"), [(0.3, 15), (0.001, 1), (1.0, 50)])
def test_expert_choice_takes_the_best(density: float, count: int) -> None:
    made = router("expert_choice", density)
    gate: Gate = made(hidden(), inputs())
    scores = margin(hidden(), made.weight)
    assert (gate.executed.sum(1) == count).all()
    for row in range(BATCH):
        worst_in = scores[row][gate.executed[row]].min()
        assert not (~gate.executed[row]).any() or worst_in > scores[row][~gate.executed[row]].max()
    torch.testing.assert_close(gate.value, torch.sigmoid(scores) * gate.executed)
    assert gate.value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_margins_gradient_without_an_fp32_copy_of_the_input(dtype: torch.dtype) -> None:
    """Two rows of width 4: as many entries as the weight has, which must not be taken for the input."""
    x = torch.randn(1, 2, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 4, dtype=dtype, requires_grad=True)
    found = torch.autograd.grad(_difference(_logits(x, weight)).square().sum(), (x, weight))
    margin = x.float() @ (weight[1].float() - weight[0].float())
    expected = torch.autograd.grad(margin.square().sum(), (x, weight))
    for gradient, truth in zip(found, expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, truth, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_a_threshold_moves_the_decision_and_a_centre_the_gradient() -> None:
    learned, x = router("learned"), hidden().requires_grad_()
    thresholds = torch.full((SITE + 1,), 0.7)
    means = torch.zeros((SITE + 1, x.shape[-1]))
    given = replace(inputs(1.0), thresholds=thresholds, centres=Centres(torch.full((SITE + 1,), -0.4), means))
    gate = learned(x, given)
    u = noise.uniform(SEED, given.sample_ids, SITE, torch.arange(TOKENS))
    noisy = margin(x, learned.weight) + torch.logit(u)
    assert gate.noisy_margin is not None and not gate.noisy_margin.requires_grad
    torch.testing.assert_close(gate.noisy_margin, noisy.detach())
    assert torch.equal(gate.executed, gate.noisy_margin >= 0.7) and torch.equal(gate.value, gate.executed.float())
    (found,) = torch.autograd.grad(gate.value.sum(), learned.weight)
    (expected,) = torch.autograd.grad(torch.sigmoid(noisy + 0.4).sum(), learned.weight)
    torch.testing.assert_close(found, expected)
    assert gate.input_sum is not None
    torch.testing.assert_close(gate.input_sum, x.detach().sum((0, 1)))
    everything = replace(given, thresholds=torch.full((SITE + 1,), -math.inf))
    assert learned(x, everything).executed.all()
    assert torch.equal(learned.eval()(x, given).executed, margin(x, learned.weight) >= 0.7)


def test_a_threshold_follows_what_tokens_have_in_common_and_a_router_learns_the_rest() -> None:
    """The gradient is that of a router which reads its input less the mean; decisions are those of the input itself."""
    learned, x = router("learned"), hidden() + 3.0
    thresholds, margins = torch.full((SITE + 1,), 0.7), torch.zeros(SITE + 1)
    mean = x.mean((0, 1))
    means = torch.full((SITE + 1, x.shape[-1]), 50.0)
    means[SITE] = mean
    plain = replace(inputs(1.0), thresholds=thresholds)
    gate = learned(x, replace(plain, centres=Centres(margins, means)))
    assert torch.equal(gate.executed, learned(x, plain).executed)
    weights = torch.linspace(-1, 2, gate.value.numel()).view_as(gate.value)
    (found,) = torch.autograd.grad((gate.value * weights).sum(), learned.weight)
    assert gate.noisy_margin is not None
    slope = torch.sigmoid(gate.noisy_margin) * (1 - torch.sigmoid(gate.noisy_margin)) * weights
    execute = torch.einsum("bt,btd->d", slope, x - mean)
    torch.testing.assert_close(found, torch.stack((-execute, execute)), rtol=1e-4, atol=1e-4)
    # In the first step there is no mean yet.
    first = learned(x, replace(plain, centres=Centres(margins, None)))
    (nothing,) = torch.autograd.grad((first.value * weights).sum(), learned.weight)
    assert not nothing.any() and torch.equal(first.executed, gate.executed)
