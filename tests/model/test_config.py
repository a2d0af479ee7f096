"""The model block: cross-field rules with their values, ramps, sites, and a description for every field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from model.config import BudgetConfig, Capacity, ModelConfig, RopeScaling, RouterConfig
from model.decoder import Decoder
from model.schedules import Progress, Ramp
from tests.model.tiny import SIZES, config, share

ROUTER = {"density": 0.5}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "heads do not divide width": ({"heads": 5, "kv_heads": 5}, r"model.width \(64\).*divisible by model.heads \(5\)"),
    "odd width of a head": ({"head_width": 15}, r"head width \(15\) must be even"),
    "odd derived width of a head": ({"width": 20, "heads": 4}, r"head width \(5\) must be even"),
    "kv heads do not divide heads": ({"kv_heads": 3}, r"model.heads \(4\).*divisible by model.kv_heads \(3\)"),
    "more kv heads than heads": ({"kv_heads": 8}, r"model.heads \(4\).*divisible by model.kv_heads \(8\)"),
    "nothing left to route": (
        {"router": ROUTER | {"always_on_first": 1, "always_on_last": 2}},
        r"always_on_first \(1\) \+ always_on_last \(2\) leave none of the 3 layers",
    ),
    "falling numbers of layers": (
        {"router": ROUTER | {"layers": [2, 1]}},
        r"router.layers \[2, 1\] must be ascending numbers of layers that may have a router: 0 to 2 of this model's 3",
    ),
    "a layer that is always on": (
        {"router": ROUTER | {"layers": [0, 1], "always_on_first": 1}},
        r"router.layers \[0, 1\] must be ascending numbers of layers that may have a router: 1 to 2 of this model's 3",
    ),
    "no layer in between": (
        {"router": ROUTER | {"layers": "every_other", "always_on_first": 2}},
        r"\+ always_on_last \(0\) and layers every_other leave none of the 3 layers",
    ),
    "more always-on than layers": (
        {"router": ROUTER | {"always_on_first": 9}},
        r"always_on_first \(9\) \+ always_on_last \(0\) leave none of the 3 layers",
    ),
    "one capacity for sites that may differ": (
        {"router": ROUTER | {"execution": "capacity", "budget": {"kind": "global"}}},
        "execution 'capacity' gives every site the same capacity.*set execution: rounded, or budget.kind: per_layer",
    ),
    "budget reached before it begins": (
        {"router": ROUTER | {"budget": {"dense_until": 0.5, "reach_by": 0.25}}},
        r"budget.reach_by \(0.25\) must not be less than budget.dense_until \(0.5\)",
    ),
    "no band between the rope factors": (
        {"rope_scaling": {"kind": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        r"high_freq_factor \(4.0\) must be larger than low_freq_factor \(4.0\)",
    ),
    "negative noise": (
        {"router": ROUTER | {"noise": {"start": 1.0, "end": -0.5, "until": 1.0}}},
        r"router.noise must stay positive, got 1.0 to -0.5",
    ),
    "temperature of zero": (
        {"router": ROUTER | {"temperature": {"start": 1.0, "end": 0.0, "until": 1.0}}},
        r"router.temperature must stay positive, got 1.0 to 0.0",
    ),
}
OUT_OF_RANGE: dict[str, dict[str, Any]] = {
    "router.density": {"router": {"density": 0.0}},
    "router.density above": {"router": {"density": 1.01}},
    "router.budget.coefficient": {"router": ROUTER | {"budget": {"coefficient": -0.1}}},
    "router.budget.adaptive_rate": {"router": ROUTER | {"budget": {"adaptive_rate": 0}}},
    "router.noise.until": {"router": ROUTER | {"noise": {"start": 1, "end": 0, "until": 0}}},
    "rope_scaling.factor": {"rope_scaling": {"kind": "linear", "factor": 0}},
    "layers": {"layers": 0},
    "vocab_size": {"vocab_size": 1},
    "norm_epsilon": {"norm_epsilon": 0},
}


@pytest.mark.parametrize("name", BROKEN)
def test_cross_field_rules_tell_the_values(name: str) -> None:
    changes, message = BROKEN[name]
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(SIZES | changes)


def test_a_truth_is_no_number() -> None:
    with pytest.raises(ValidationError, match=r"must be a number, got True \(YAML reads true, yes and on as True"):
        ModelConfig.model_validate(SIZES | {"layers": True})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValidationError, match=r"model.width \(64\).*; model.heads \(5\)"):
        ModelConfig.model_validate(SIZES | {"heads": 5, "kv_heads": 2})


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_ranges(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(SIZES | OUT_OF_RANGE[name])
    (error,) = caught.value.errors()
    assert ".".join(error["loc"]) == name.split()[0]


def test_layouts() -> None:
    assert config(layers="every_other").sites == ["layer-01"]
    assert list(config(layers="every_other", always_on_first=1).routed_layers) == [2]
    listed = config(layers=[0, 2], granularity="module")
    assert listed.sites == ["attention-00", "ffn-00", "attention-02", "ffn-02"]
    routed = [hasattr(layer, "attention_router") for layer in Decoder(listed).layers]
    assert routed == [True, False, True]
    assert [int(layer.ffn_router.site) for layer in Decoder(listed).layers if layer.routed] == [1, 3]


def test_an_always_on_first_layer_may_leave_one() -> None:
    cfg = config(always_on_first=1, always_on_last=1)
    assert list(cfg.routed_layers) == [1] and cfg.sites == ["layer-01"]


def test_sites() -> None:
    assert config("dense").sites == [] and len(config("dense").routed_layers) == 0
    assert config().sites == ["layer-00", "layer-01", "layer-02"]
    cfg = config(granularity="module", always_on_first=1)
    assert cfg.sites == ["attention-01", "ffn-01", "attention-02", "ffn-02"]


def test_width_of_a_head() -> None:
    assert config().head_dim == 16
    assert config("dense", "mqa-tied-wide-head").head_dim == 24


def test_ramp() -> None:
    ramp = Ramp(start=1.0, end=0.2, until=0.5)
    for progress, value in {0.0: 1.0, 0.125: 0.8, 0.25: 0.6, 0.5: 0.2, 0.75: 0.2, 1.0: 0.2}.items():
        assert ramp.at(share(progress)) == pytest.approx(value), progress
    rising = Ramp(start=0.0, end=2.0, until=1.0)
    assert (rising.at(share(0.25)), rising.at(share(1.0))) == (0.5, 2.0)


def test_a_ramp_ends_at_a_share_or_at_a_step() -> None:
    ramp = Ramp(start=1.0, end=0.0, until_step=10)
    for steps in (5, 20, 400):
        assert [ramp.at(Progress(step, steps)) for step in (0, 5, 10, 15)] == [1.0, 0.5, 0.0, 0.0]
    for ends in ({}, {"until": 0.5, "until_step": 3}):
        with pytest.raises(ValidationError, match=r"exactly one of until, .* and until_step, got .*; give one"):
            Ramp.model_validate({"start": 1.0, "end": 0.0, **ends})


def test_capacity_in_whole_blocks() -> None:
    router = RouterConfig(density=0.5, execution="capacity")
    assert router.capacity(2048, 0.5) == Capacity(1280)  # 0.5 x 1.25 x 2048, whole blocks of 128
    assert router.capacity(2048, 0.51) == Capacity(1408)
    assert router.capacity(2048, 0.9) == router.capacity(2048, 1.0) == Capacity(2048)
    assert router.capacity(100, 0.25) == Capacity(100)
    exact = RouterConfig(density=0.5, execution="capacity", capacity_factor=1.0, explore=0.1)
    assert exact.capacity(2048, 0.5) == Capacity(1024, explored=112)  # 0.1 x 0.5 x 2048, whole blocks of 16
    assert exact.capacity(2048, 1.0) == Capacity(2048, explored=112)  # the same all along a density's ramp
    assert RouterConfig(density=0.5).capacity(2048, 0.5) is None


def test_defaults_are_the_papers_where_the_method_says_so() -> None:
    router = RouterConfig(density=0.5)
    assert (router.kind, router.granularity, router.execution) == ("learned", "layer", "rounded")
    assert (router.budget.kind, router.budget.coefficient, router.budget.controller) == ("per_layer", 0.1, "fixed")
    assert (router.noise.at(share(0.0)), router.noise.at(share(0.3)), router.noise.at(share(0.6))) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("block", [ModelConfig, RouterConfig, BudgetConfig, RopeScaling, Ramp])
def test_every_field_is_described(block: type) -> None:
    for name, field in block.model_fields.items():
        assert field.description and len(field.description) > 10, f"{block.__name__}.{name} has no description"


def test_blocks_are_frozen_and_strict() -> None:
    cfg = config()
    with pytest.raises(ValidationError, match="frozen"):
        cfg.layers = 5
    with pytest.raises(ValidationError, match="not permitted"):
        ModelConfig.model_validate(SIZES | {"layer": 5})
    with pytest.raises(ValidationError, match="finite"):
        ModelConfig.model_validate(SIZES | {"init_std": float("inf")})
