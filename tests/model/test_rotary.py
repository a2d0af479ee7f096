"""Rotary angles by their formulas; agreement with transformers is in test_decoder.py."""

from __future__ import annotations

import math

import pytest
import torch

from model.config import ModelConfig
from model.rotary import inverse_frequencies, rotate, rotation
from tests.model.tiny import SIZES, assert_close


def test_rotation_turns_pairs_half_a_head_apart() -> None:
    cfg = ModelConfig.model_validate(SIZES)
    positions = torch.tensor([[0, 1, 7]])
    cos, sin = rotation(cfg, positions, torch.float32)
    x = torch.randn(1, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[:, 0], x[:, 0])
    for i in range(8):
        angle = 7 * cfg.rope_theta ** (-2 * i / 16)
        a, b = x[0, 2, 1, i], x[0, 2, 1, i + 8]
        assert_close(turned[0, 2, 1, i], a * math.cos(angle) - b * math.sin(angle))
        assert_close(turned[0, 2, 1, i + 8], b * math.cos(angle) + a * math.sin(angle))


def test_products_depend_on_distance_only() -> None:
    cfg = ModelConfig.model_validate(SIZES)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 16, generator=generator)
    cos, sin = rotation(cfg, torch.tensor([[3, 8, 103, 108]]), torch.float32)
    at = [(cos[0, i], sin[0, i]) for i in range(4)]
    near, far = (float((rotate(q, *at[i]) * rotate(k, *at[i + 1])).sum()) for i in (0, 2))
    assert near == pytest.approx(far, abs=1e-4)
    assert near != pytest.approx(float((q * k).sum()), abs=1e-2)


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    scaling = {"kind": "llama3", "factor": 8.0, "original_positions": 256}
    plain = inverse_frequencies(ModelConfig.model_validate(SIZES), torch.device("cpu"))
    scaled = inverse_frequencies(ModelConfig.model_validate(SIZES | {"rope_scaling": scaling}), torch.device("cpu"))
    waves = 2 * math.pi / plain
    short, long = waves < 256 / 4, waves > 256 / 1
    assert short.any() and long.any() and (~short & ~long).any()
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()
