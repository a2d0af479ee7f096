"""The hash behind routing noise: uniform, independent, and a function of the token's place alone."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from model import noise

SAMPLES, POSITIONS = torch.arange(200), torch.arange(1000)


def draw(seed: int = 0, first_sample: int = 0, site: int = 0, first_position: int = 0) -> Tensor:
    return noise.uniform(seed, SAMPLES + first_sample, site, POSITIONS + first_position)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


@pytest.mark.parametrize("seed", [0, 1, 2**40, -3])
def test_uniform(seed: int) -> None:
    u = draw(seed)
    assert u.shape == (200, 1000) and u.dtype == torch.float32
    assert u.min() > 0 and u.max() < 1
    deviation = 1 / math.sqrt(12 * u.numel())
    assert abs(float(u.double().mean()) - 0.5) < 4 * deviation
    assert abs(float(u.double().var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / u.numel())
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())  # mean 63, standard deviation 11
    assert 63 - 4 * 11.3 < chi_square < 63 + 5 * 11.3


def test_logistic_moments() -> None:
    """The difference of two Gumbels is logistic: mean 0, variance pi^2 / 3."""
    logistic = torch.logit(draw().double())
    assert abs(float(logistic.mean())) < 4 * math.sqrt(math.pi**2 / 3 / logistic.numel())
    assert float(logistic.var()) == pytest.approx(math.pi**2 / 3, rel=0.02)


OTHERS = {
    "seed": {"seed": 1},
    "sample": {"first_sample": 1},
    "site": {"site": 1},
    "position": {"first_position": 1},
    "far sample": {"first_sample": 10**12},
    "far position": {"first_position": 2**20},
}


@pytest.mark.parametrize("name", OTHERS)
def test_independent_over(name: str) -> None:
    u, other = draw(), draw(**OTHERS[name])
    limit = 4 / math.sqrt(u.numel())
    assert abs(correlation(u, other)) < limit
    assert abs(correlation((u - 0.5).abs(), (other - 0.5).abs())) < limit  # and not mirrored either


def test_no_two_steps_lead_to_the_same_place() -> None:
    """One sample on is not one site on, nor one position or one seed."""
    draws = [draw(**other) for other in OTHERS.values()]
    for first, second in combinations(draws, 2):
        assert abs(correlation(first, second)) < 4 / math.sqrt(first.numel())


@pytest.mark.parametrize("lag", [1, 2, 64])
def test_no_correlation_along_a_row_or_a_column(lag: int) -> None:
    u = draw()
    assert abs(correlation(u[:, lag:], u[:, :-lag])) < 4 / math.sqrt(u.numel())
    assert abs(correlation(u[lag:], u[:-lag])) < 4 / math.sqrt(u.numel())
    assert abs(float(u.mean(0).var()) / (1 / 12 / 200) - 1) < 0.2  # column means vary as independent rows' do
    assert abs(float(u.mean(1).var()) / (1 / 12 / 1000) - 1) < 0.4


def test_no_dependence_on_batch_composition() -> None:
    u = draw()
    assert torch.equal(noise.uniform(0, torch.tensor([7, 3, 7]), 0, POSITIONS), u[[7, 3, 7]])
    assert torch.equal(noise.uniform(0, SAMPLES[5:6], 0, POSITIONS[40:41]), u[5:6, 40:41])


@pytest.mark.parametrize("bits", [0, -1, 2**63 - 1, -(2**63)])
def test_extreme_hashes_stay_inside_the_interval(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0 or 1 the logistic would be infinite, and infinity times a noise scale of 0 is NaN."""
    monkeypatch.setattr(noise, "_mix", lambda z: torch.full_like(z, bits))
    u = noise.uniform(0, SAMPLES, 0, POSITIONS)
    assert (u > 0).all() and (u < 1).all()
    assert torch.isfinite(torch.logit(u)).all() and torch.logit(u).abs().max() < 20


def test_tails_reach_far_enough() -> None:
    """0.2 million logistics should reach about ln(200 000) = 12 on both sides."""
    logistic = torch.logit(draw())
    assert 9 < float(logistic.max()) < 17 and -17 < float(logistic.min()) < -9
