"""Every parameter of a decoder has a role, whatever is put into it."""

from __future__ import annotations

import pytest

from model.config import EnsembleConfig
from model.decoder import Decoder
from model.roles import role_of
from tests.model import tiny
from tests.tune.test_adapters import tuned


def roles(decoder: Decoder) -> dict[str, set[str]]:
    """Last parts of the parameters' names, by role."""
    found: dict[str, set[str]] = {}
    for name, _ in decoder.named_parameters():
        found.setdefault(role_of(name), set()).add(".".join(name.split(".")[-2:]))
    return found


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_of_a_decoder_with_an_ensemble(granularity: str) -> None:
    decoder = tiny.decoder(tiny.config(variant="mha-qk-norm", granularity=granularity))
    decoder.add_ensemble(EnsembleConfig(layers=2))
    found = roles(decoder)
    projections = {f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    skip = {"router.weight"} if granularity == "layer" else {"attention_router.weight", "ffn_router.weight"}
    assert found.pop("norm") >= {"q_norm.weight", "k_norm.weight", "input_layernorm.weight", "norm.weight", "0.weight"}
    assert found == {
        "embedding": {"embed_tokens.weight"},
        "head": {"lm_head.weight"},
        "matrix": projections,
        "router": {*skip, "router.bias"},
        "vote": {"router.weight"},
    }


def test_adapters_are_matrices_and_doras_magnitudes_are_not() -> None:
    found = roles(tuned("dora"))
    assert {"default.weight", "base_layer.weight"} <= found["matrix"]
    assert found["magnitude"] == {"default.weight"}
    assert found["router"] == {"router.weight", "router.bias"} and found["vote"] == {"router.weight"}
