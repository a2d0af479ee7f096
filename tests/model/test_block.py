"""Invariant 3: gathering the executed tokens equals computing everything and masking, in outputs and in gradients."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.block import Decision, _weigh
from model.config import RouterConfig
from model.router import Gate
from model.selection import Selection
from tests.model.routed_steps import BATCH, KINDS, assert_same_step, executions, granular, masks, step
from tests.model.tiny import (
    LENGTH,
    VARIANTS,
    assert_close,
    config,
    decoder,
    force,
    gradients,
    random_targets,
    random_tokens,
)


@pytest.mark.parametrize("kind", KINDS)
@granular
@pytest.mark.parametrize("confined", [False, True], ids=["one-document", "documents"])
def test_rounded_equals_reference(kind: str, granularity: str, confined: bool) -> None:
    pair = [decoder(config(kind, granularity=granularity, execution=e)) for e in ("rounded", "reference")]
    assert_same_step(*pair, confined=confined)
    with torch.no_grad():
        logits = [model.eval()(random_tokens()).logits for model in pair]
    assert_close(logits[0], logits[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("input_kind", ["normed", "raw"])
@granular
def test_rounded_equals_reference_in_every_variant(variant: str, input_kind: str, granularity: str) -> None:
    made = {"granularity": granularity, "input": input_kind, "always_on_first": 1}
    pair = [decoder(config("learned", variant, execution=e, **made)) for e in ("rounded", "reference")]
    assert_same_step(*pair)


@pytest.mark.parametrize("pattern", ["mixed", "empty row", "empty layer", "all empty", "all executed", "one token"])
@granular
@pytest.mark.parametrize("confined", [False, True], ids=["one-document", "documents"])
def test_rounded_equals_reference_whatever_is_executed(pattern: str, granularity: str, confined: bool) -> None:
    pair = []
    for execution in ("rounded", "reference"):
        cfg = config("learned", granularity=granularity, execution=execution)
        pair.append(force(decoder(cfg), masks(pattern, len(cfg.sites))))
    assert_same_step(*pair, confined=confined)


@torch.no_grad()
def test_a_row_that_is_computed_and_dropped_may_overflow() -> None:
    """Zero times infinity would be NaN."""
    executed = torch.tensor([[True], [False]])
    router = RouterConfig(density=0.5)
    decision = Decision(Gate(executed, executed.float()), Selection.everything(2, 1, exact=False))
    for bad in (math.inf, math.nan):
        update = torch.tensor([[1.0, 2.0], [bad, -bad]])
        assert _weigh(update, decision, router).tolist() == [[1, 2], [0, 0]]


@granular
@executions
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_executed_still_gives_every_parameter_a_gradient(
    granularity: str, execution: str, recompute: bool
) -> None:
    """Under ZeRO every rank must produce a gradient for every parameter, of zeros if need be."""
    cfg = config("learned", "mha-qk-norm", granularity=granularity, execution=execution)
    model = force(decoder(cfg, recompute=recompute), masks("all empty", len(cfg.sites)))
    out, found = step(model)
    assert out.routing.executed_tokens.sum() == 0
    for name, gradient in found.items():
        if "self_attn" in name or "mlp" in name:
            assert not gradient.any(), f"{name} of layers that ran no token must get zeros"
        if "router" in name or name.startswith(("embed", "norm", "lm_head")):
            assert gradient.any(), f"{name} learns from the price or the loss all the same"


@pytest.mark.parametrize("pattern", ["all executed"])
@granular
@executions
@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_executed_is_the_dense_model(pattern: str, granularity: str, execution: str, variant: str) -> None:
    cfg = config("learned", variant, granularity=granularity, execution=execution)
    routed = force(decoder(cfg), masks(pattern, len(cfg.sites)))
    dense = decoder(config("dense", variant))
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
        assert torch.equal(routed.get_parameter(f"layers.1.{name}"), dense.get_parameter(f"layers.1.{name}"))
    with torch.no_grad():
        assert_close(routed(random_tokens()).logits, dense(random_tokens()).logits)


@pytest.mark.parametrize("kind", ["random", "stride"])
def test_density_one_is_the_dense_model(kind: str) -> None:
    with torch.no_grad():
        logits = decoder(config(kind, density=1.0))(random_tokens()).logits
        assert_close(logits, decoder(config("dense"))(random_tokens()).logits)


def test_a_token_skipped_everywhere_keeps_its_embedding() -> None:
    """The skipped token passes unchanged: what the final norm sees of it is its embedding."""
    cfg = config("learned")
    model = force(decoder(cfg), masks("empty row", 3))
    seen = []
    model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = random_tokens()
    with torch.no_grad():
        model(tokens)
        assert torch.equal(seen[0][1], model.embed_tokens(tokens)[1])
        assert not torch.equal(seen[0][0], model.embed_tokens(tokens)[0])


def test_rounded_execution_computes_executed_tokens_only() -> None:
    cfg = config("learned")
    rows: list[tuple[str, int]] = []
    for execution in ("rounded", "reference"):
        model = decoder(cfg.model_copy(update={"router": cfg.router.model_copy(update={"execution": execution})}))
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "k_proj", "o_proj", "gate_proj")):
                key = (execution, name.split(".")[-1])
                module.register_forward_pre_hook(
                    lambda _, args, key=key: rows.append((*key, args[0].shape[:-1].numel()))
                )
        executed = model(random_tokens()).routing.executed_tokens.tolist()
    everything = [BATCH * LENGTH] * cfg.layers
    for name in ("q_proj", "o_proj", "gate_proj"):
        assert [n for e, p, n in rows if (e, p) == ("rounded", name)] == executed
        assert [n for e, p, n in rows if (e, p) == ("reference", name)] == everything
    assert [n for e, p, n in rows if (e, p) == ("rounded", "k_proj")] == everything


def test_routers_leave_the_residual_streams_gradient_alone() -> None:
    """Prices reach routers and nothing else: the layers below do not learn to please a router."""
    found = []
    for price in (0.0, 100.0):
        model = decoder(config("learned", explore=0.3))
        out = model(random_tokens(), random_targets(), noise_scale=0.7)
        (out.loss.loss + price * out.routing.density.sum()).backward()
        found.append(gradients(model))
    for name in found[0]:
        same = torch.equal(found[0][name], found[1][name])
        assert same != name.endswith("router.weight"), name


def test_record_counts_keys_by_hand() -> None:
    """Executed queries 1 and 4 of documents a a b b b see 2 and 3 keys; all five see 1 + 2 + 1 + 2 + 3."""
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    mask = torch.tensor([[[False, True, False, False, True]]])
    model = force(decoder(config("learned", always_on_first=2)), mask)
    with torch.no_grad():
        routing = model(random_tokens(1, 5), documents=documents).routing
        free = model(random_tokens(1, 5)).routing
    assert (routing.executed_tokens.item(), routing.attended_keys.item(), routing.visible_keys.item()) == (2, 5, 9)
    assert (free.executed_tokens.item(), free.attended_keys.item(), free.visible_keys.item()) == (2, 7, 15)
    assert routing.density.item() == pytest.approx(2 / 5)


def test_sites_are_numbered_apart() -> None:
    """Every routed site draws noise of its own, with always-on layers left out of the count."""
    model = decoder(config("random", granularity="module", always_on_first=1))
    routers = [r for layer in model.layers[1:] for r in (layer.attention_router, layer.ffn_router)]
    assert [router.site for router in routers] == [0, 1, 2, 3]
    executed = model(random_tokens()).routing.executed
    assert not any(torch.equal(a, b) for a, b in pairwise(executed))


@pytest.mark.parametrize("input_kind", ["normed", "raw"])
@granular
def test_what_the_router_reads(input_kind: str, granularity: str) -> None:
    """The site's RMS-normed input, or the residual stream itself."""
    model = decoder(config("learned", granularity=granularity, input=input_kind))
    layer, seen = model.layers[1], {}

    def note(name: str, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].detach()

    for name, module in layer.named_modules():
        if not name.endswith("_proj"):
            module.register_forward_pre_hook(partial(note, name))
    model(random_tokens())
    sites = {"router": "input_layernorm"}
    if granularity == "module":
        sites = {"attention_router": "input_layernorm", "ffn_router": "post_attention_layernorm"}
    for router, norm in sites.items():
        raw = seen[norm]
        expected = raw if input_kind == "raw" else layer.get_submodule(norm)(raw)
        assert torch.equal(seen[router], expected), router
    assert torch.equal(seen["input_layernorm"], seen[""])  # the layer's own input
