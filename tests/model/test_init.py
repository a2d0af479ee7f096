"""Initialisation: the table, and values that depend on nothing but seed and name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.init import initialise
from tests.model.tiny import VARIANTS, config


def drawn(cfg: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    model = Decoder(cfg)
    initialise(model, cfg, seed)
    return dict(model.named_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_table(variant: str, granularity: str) -> None:
    cfg = config("learned", variant, granularity=granularity)
    for name, weight in drawn(cfg).items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = cfg.init_std / math.sqrt(2 * cfg.layers) if into_residual else cfg.init_std
        error = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
        assert float(weight.detach().std()) == pytest.approx(std, rel=error), name
        assert abs(float(weight.detach().mean())) < 5 * std / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_routers_change_no_other_weight(granularity: str) -> None:
    """Dense and skip runs with one seed start from the same backbone, bit for bit."""
    dense, skip = drawn(config("dense")), drawn(config("learned", granularity=granularity, always_on_last=1))
    assert all("router" in name for name in set(skip) - set(dense))
    for name, weight in dense.items():
        assert torch.equal(weight, skip[name]), name


def test_seed_and_name_decide() -> None:
    first, again, other = drawn(config(), 0), drawn(config(), 0), drawn(config(), 1)
    weights = [name for name in first if "norm" not in name]
    for name in weights:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]), name
    same_shape = [first[name] for name in weights if first[name].shape == first[weights[1]].shape]
    assert len(same_shape) > 2
    assert all(not torch.equal(same_shape[0], weight) for weight in same_shape[1:])


def test_order_of_construction_does_not_matter() -> None:
    cfg = config()
    model = Decoder(cfg)
    expected = drawn(cfg)
    backwards = nn.Module()
    for name, child in reversed(list(model.named_children())):
        backwards.add_module(name, child)
    torch.manual_seed(123)
    torch.randn(7)
    initialise(backwards, cfg, 0)
    names = [name for name, _ in backwards.named_parameters()]
    assert names != list(expected)
    for name, weight in backwards.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_global_generator_is_left_alone() -> None:
    model = Decoder(config())
    before = torch.random.get_rng_state()
    initialise(model, config(), 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dtype_of_the_parameter_does_not_change_the_draw() -> None:
    rounded = Decoder(config()).bfloat16()
    initialise(rounded, config(), 0)
    for name, weight in drawn(config()).items():
        assert torch.equal(rounded.get_parameter(name), weight.bfloat16()), name
