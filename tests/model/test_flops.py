"""Counted FLOPs against what torch counts while the model runs, and parameter counts against the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.decoder import Decoder, DecoderOutput
from model.flops import (
    EVERYTHING,
    Routed,
    Trained,
    dense_flops,
    executed_flops,
    full_windows,
    parameter_counts,
    site_shares,
    training_flops,
)
from tests.model.tiny import LENGTH, VARIANTS, config, decoder, documents_of, random_tokens

BATCH = 3
TOKENS = BATCH * LENGTH
granular = pytest.mark.parametrize("granularity", ["layer", "module"])


def measure(model: Decoder, **arguments: Any) -> tuple[DecoderOutput, int, int]:
    """The output, and FLOPs that torch counted in projections and in the attention's two products.

    The MATH backend is the one whose products torch counts; it computes all T x S pairs, seen or not.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(random_tokens(), **arguments)
    by_operation = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = by_operation.pop("aten.bmm", 0)
    return out, sum(by_operation.values()), attention


def routed(out: DecoderOutput) -> Routed:
    routing = out.routing
    return Routed(TOKENS, float(routing.visible_keys), routing.executed_tokens.tolist(), routing.attended_keys.tolist())


@pytest.mark.parametrize("kind", ["dense", "learned", "random", "stride", "expert_choice"])
@pytest.mark.parametrize("variant", VARIANTS)
@granular
def test_projections_equal_torchs_count(kind: str, variant: str, granularity: str) -> None:
    """Head, K/V for every token, router, and the executed tokens' projections and feed-forward, to the FLOP."""
    cfg = config(kind, variant, granularity=granularity, **({} if kind == "dense" else {"always_on_first": 1}))
    out, projections, _ = measure(decoder(cfg).eval())
    counts = routed(out)
    without_attention = Routed(TOKENS, 0, counts.executed_tokens, [0.0] * len(cfg.sites))
    assert executed_flops(cfg, without_attention) == projections


@granular
def test_exploration_equals_torchs_count(granularity: str) -> None:
    """One forward pass of explored tokens, less the keys and values, on top of three of what executed."""
    cfg = config("learned", granularity=granularity, explore=0.5, always_on_first=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        routing = decoder(cfg)(random_tokens()).routing
    by_operation = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    del by_operation["aten.bmm"]
    nothing = [0.0] * len(cfg.sites)
    executed, explored = routing.executed_tokens.tolist(), routing.explored_tokens.tolist()
    counts = Routed(TOKENS, 0, executed, nothing, None, explored, nothing)
    assert min(explored) > 0
    assert training_flops(cfg, counts) - 2 * executed_flops(cfg, counts) == sum(by_operation.values())


@pytest.mark.parametrize("first_layer", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_backward_pass_equals_torchs_count(variant: str, first_layer: int | None) -> None:
    """All weights; the norms from a layer on, whose gradients pass through frozen matrices; the final norm alone."""
    cfg = config("dense", variant, execution="reference")
    model = decoder(cfg).double()  # in which norms have no products of their own
    if first_layer is not None:
        model.requires_grad_(False)
        model.norm.requires_grad_(True)
        for layer in model.layers[first_layer:]:
            layer.input_layernorm.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(random_tokens(), targets=random_tokens()).loss.loss.backward()
    measured = sum(counter.get_flop_counts()["Global"].values())
    trained = EVERYTHING if first_layer is None else Trained(matrices=False, first_layer=first_layer)
    pairs = TOKENS * LENGTH  # what the reference computes
    assert measured == training_flops(cfg, Routed(TOKENS, pairs, [], []), trained)


def test_layers_whose_states_are_read_cost_nothing() -> None:
    cfg = config("dense")
    counts = Routed(TOKENS, 50, [], [])
    computed, read = (training_flops(cfg, counts, Trained(False, 2, layers)) for layers in (0, 2))
    assert computed - read == 2 / 3 * (executed_flops(cfg, counts) - TOKENS * 2 * cfg.width * cfg.vocab_size)


def test_planned_exploration_follows_the_density() -> None:
    cfg = config("learned", explore=0.5)
    counts = full_windows(cfg, 40, 20, 0.2)
    assert counts.executed_tokens == [8] * 3 and counts.explored_tokens == [16] * 3
    assert counts.visible_keys == 420 and counts.explored_keys == [168] * 3
    plain = full_windows(config("learned"), 40, 20, 0.2)
    assert training_flops(config("learned"), plain) == 3 * executed_flops(cfg, counts) < training_flops(cfg, counts)


@pytest.mark.parametrize("variant", VARIANTS)
@granular
def test_attention_equals_torchs_count_when_every_key_is_counted(variant: str, granularity: str) -> None:
    cfg = config("learned", variant, granularity=granularity, execution="reference", always_on_last=1)
    _, projections, attention = measure(decoder(cfg).eval())
    pairs = TOKENS * LENGTH  # what the reference computes: no causal saving, no skipping
    keys = [0.0 if site.startswith("ffn") else float(pairs) for site in cfg.sites]
    everything = Routed(TOKENS, pairs, [float(TOKENS)] * len(cfg.sites), keys)
    assert executed_flops(cfg, everything) == projections + attention
    assert attention > 0


@granular
def test_attention_follows_the_keys_that_were_seen(granularity: str) -> None:
    """Two FLOPs x two products x head width x heads a pair, for the routed and the always-on layers alike."""
    cfg = config("random", granularity=granularity, always_on_first=1)
    documents, _ = documents_of(9, 16, 8)
    out, *_ = measure(decoder(cfg).eval(), documents=documents)
    counts = routed(out)
    seen = counts.visible_keys + sum(
        int((executed * torch.cat([torch.arange(1, n + 1) for n in (9, 16, 8)])).sum())
        for site, executed in zip(cfg.sites, out.routing.executed, strict=True)
        if not site.startswith("ffn")
    )
    blind = Routed(TOKENS, 0, counts.executed_tokens, [0.0] * len(cfg.sites))
    assert executed_flops(cfg, counts) - executed_flops(cfg, blind) == 4 * cfg.heads * cfg.head_dim * seen


@granular
def test_monotone_in_density(granularity: str) -> None:
    costs = []
    for density in (0.1, 0.3, 0.6, 1.0):
        cfg = config("random", granularity=granularity, density=density)
        costs.append(executed_flops(cfg, routed(measure(decoder(cfg).eval())[0])))
    assert costs == sorted(set(costs))
    assert costs[0] < 0.75 * costs[-1]


@granular
def test_everything_executed_costs_the_dense_model_and_its_routers(granularity: str) -> None:
    baseline = config("random", density=1.0, granularity=granularity)
    counts = routed(measure(decoder(baseline).eval())[0])
    dense = dense_flops(baseline, TOKENS, counts.visible_keys)
    assert executed_flops(baseline, counts) == dense  # baselines have no router weights
    learned = config("learned", granularity=granularity)
    assert executed_flops(learned, counts) == dense + TOKENS * len(learned.sites) * 2 * 2 * learned.width
    assert dense == dense_flops(config("dense"), TOKENS, counts.visible_keys)


@pytest.mark.parametrize("kind", ["dense", "learned", "random", "expert_choice"])
@pytest.mark.parametrize("variant", VARIANTS)
@granular
def test_parameter_counts(kind: str, variant: str, granularity: str) -> None:
    cfg = config(kind, variant, granularity=granularity, **({} if kind == "dense" else {"always_on_first": 1}))
    model, counts = Decoder(cfg), parameter_counts(cfg)
    named = dict(model.named_parameters())
    assert counts["total"] == sum(p.numel() for p in named.values())
    assert counts["routers"] == sum(p.numel() for name, p in named.items() if "router" in name)
    assert counts["norms"] == sum(p.numel() for name, p in named.items() if "norm" in name)
    assert counts["head"] == (0 if cfg.tied_head else cfg.vocab_size * cfg.width)
    assert counts["embedding"] == named["embed_tokens.weight"].numel()


def skippable(cfg: ModelConfig, site: int) -> float:
    """FLOPs that a site's executing every token of a full window adds."""
    window = [0.0] * len(cfg.sites)
    nothing = executed_flops(cfg, Routed(LENGTH, 0, window, window))
    executed, keys = list(window), list(window)
    executed[site], keys[site] = LENGTH, LENGTH * (LENGTH + 1) / 2
    return executed_flops(cfg, Routed(LENGTH, 0, executed, keys)) - nothing


@granular
def test_site_shares(granularity: str) -> None:
    cfg = config("learned", granularity=granularity, always_on_first=1)
    shares = site_shares(cfg, LENGTH)
    assert len(shares) == len(cfg.sites) and sum(shares) == pytest.approx(1)
    costs = [skippable(cfg, site) for site in range(len(cfg.sites))]
    assert shares == pytest.approx([cost / sum(costs) for cost in costs])
    longer = site_shares(cfg, 100 * LENGTH)  # attention weighs more in longer windows
    assert (longer[0] > shares[0]) == (granularity == "module")
