"""Invariant 3: gathering the executed tokens equals computing everything and masking, in outputs and in gradients."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.block import Decision, _weigh
from model.config import RouterConfig
from model.decoder import Decoder, DecoderOutput
from model.router import ROUTERS, Gate, RoutingInputs
from model.selection import Selection
from tests.model.tiny import (
    LENGTH,
    VARIANTS,
    assert_close,
    config,
    decoder,
    documents_of,
    force,
    gradients,
    random_targets,
    random_tokens,
)

BATCH = 3


@dataclass(eq=False)
class Saved:
    """A tensor that autograd keeps."""

    tensor: Tensor


KINDS = ["learned", "random", "stride", "expert_choice"]
granular = pytest.mark.parametrize("granularity", ["layer", "module"])
EXECUTIONS = ["rounded", "reference"]
executions = pytest.mark.parametrize("execution", EXECUTIONS)


def step(model: Decoder, confined: bool = False) -> tuple[DecoderOutput, dict[str, Tensor]]:
    """One forward and backward pass with a price on density, as the trainer does it."""
    documents, positions = documents_of(9, 16, 8) if confined else (None, None)
    out = model(
        random_tokens(),
        random_targets(),
        sample_ids=torch.tensor([11, 5, 2]),
        documents=documents,
        positions=positions,
        noise_scale=0.7,
        temperature=0.8,
        z_coefficient=1e-3,
    )
    prices = torch.linspace(-3, 5, len(out.routing.density))
    loss = out.loss.loss + (prices * out.routing.density).sum()
    loss.backward()
    return out, gradients(model)


def masks(name: str, sites: int) -> Tensor:
    """bool [S, B, T] of a named pattern."""
    found = torch.rand(sites, BATCH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5
    if name == "empty row":
        found[:, 1] = False
    elif name == "empty layer":
        found[sites // 2] = False
    elif name == "all empty":
        found[:] = False
    elif name == "all executed":
        found[:] = True
    elif name == "one token":
        found[:] = False
        found[:, 2, 20] = True
    return found


def assert_same_step(first: Decoder, second: Decoder, confined: bool = False) -> None:
    (a, a_gradients), (b, b_gradients) = step(first, confined), step(second, confined)
    assert torch.equal(a.routing.executed, b.routing.executed)
    for name in ("loss", "nll", "z"):
        assert_close(getattr(a.loss, name), getattr(b.loss, name))
    assert_close(a.routing.density, b.routing.density)
    for name in ("executed_tokens", "attended_keys", "visible_keys"):
        assert torch.equal(getattr(a.routing, name), getattr(b.routing, name))
    for name, gradient in b_gradients.items():
        assert_close(a_gradients[name], gradient)


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


def last_gate(model: Decoder) -> list[Gate]:
    """Where the last layer's gate will be found, its value keeping its gradient."""
    kept: list[Gate] = []

    def keep(module: torch.nn.Module, args: object, gate: Gate) -> None:
        gate.value.retain_grad()
        kept.append(gate)

    model.layers[-1].router.register_forward_hook(keep)
    return kept


def added_by_last_layer(model: Decoder) -> tuple[list[Tensor], list[Tensor]]:
    """Where the last layer's output, keeping its gradient, and its modules' outputs will be found."""
    outputs: list[Tensor] = []
    updates: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, out: tuple[Tensor, list[Gate]]) -> None:
        out[0].retain_grad()
        outputs.append(out[0])

    model.layers[-1].register_forward_hook(keep)
    for module in (model.layers[-1].self_attn, model.layers[-1].mlp):
        module.register_forward_hook(lambda module, args, out: updates.append(out.detach()))
    return outputs, updates


@pytest.mark.parametrize("explore", [0.0, 0.4, 1.0])
@executions
def test_gates_learn_what_their_layer_adds(explore: float, execution: str) -> None:
    """d loss / d gate is <what the layer adds to the token, d loss / d output> + the price, of executed and explored
    tokens. Where none are explored, skipped tokens' gates learn the price alone.

    Only the last layer is routed, so the loss's gradient at its output is always the same.
    """
    whole = decoder(config("learned", always_on_first=2, execution="reference"))
    outputs, updates = added_by_last_layer(whole)
    step(whole)
    textbook = ((updates[0] + updates[1]).view_as(outputs[0]) * outputs[0].grad).sum(-1) - 3 / (BATCH * LENGTH)

    model = decoder(config("learned", always_on_first=2, explore=explore, execution=execution))
    gates = last_gate(model)
    out, _ = step(model)
    gate = gates[0]
    explored = torch.zeros_like(gate.executed) if gate.explored is None else gate.explored
    assert not (explored & gate.executed).any()
    assert explored.sum() == out.routing.explored_tokens.sum()
    share = explored.sum() / (~gate.executed).sum()
    assert share == explore if explore in (0, 1) else abs(share - explore) < 0.15
    learned = gate.value.grad
    assert_close(learned[gate.executed], textbook[gate.executed])
    others = ~gate.executed & ~explored
    if explore == 0:
        assert torch.equal(learned[others], torch.full_like(learned[others], -3 / learned.numel()))
        return
    assert_close(learned[explored], textbook[explored])
    assert (textbook[explored] + 3 / learned.numel()).abs().max() > 1e-3


def test_explored_gates_stand_for_those_that_are_not() -> None:
    """Explored gates' gradients count 1 / explore times: on average the router's gradient is that with all explored."""
    x = torch.randn(1, 400, 8, generator=torch.Generator().manual_seed(0))

    def gradient(explore: float, seed: int) -> tuple[Gate, Tensor]:
        made = ROUTERS["learned"](RouterConfig(density=0.5, explore=explore), 8, 0)
        torch.nn.init.normal_(made.weight, std=0.3, generator=torch.Generator().manual_seed(1))
        sharp = torch.tensor(0.0), torch.tensor(1.0)
        gate = made(x, RoutingInputs(torch.tensor([3]), torch.arange(400), *sharp, seed))
        (gate.value * x[..., 0]).sum().backward()
        return gate, made.weight.grad

    every, exact = gradient(1.0, 0)
    assert torch.equal(every.explored, ~every.executed)
    estimates = [gradient(0.25, seed) for seed in range(100)]
    assert all(torch.equal(gate.executed, every.executed) for gate, _ in estimates)
    shares = [gate.explored.sum() / every.explored.sum() for gate, _ in estimates]
    assert 0.23 < torch.stack(shares).mean() < 0.27
    mean = torch.stack([found for _, found in estimates]).mean(0)
    assert (mean - exact).norm() < 0.1 * exact.norm()


@granular
@pytest.mark.parametrize("recompute", [False, True])
def test_a_modules_last_call_is_the_one_with_a_gradient(granularity: str, recompute: bool) -> None:
    """Under ZeRO 3 a last call without one would keep the module's weights gathered through the backward pass."""
    model, calls = decoder(config("learned", granularity=granularity, explore=0.5), recompute=recompute), []
    for module in (model.layers[1].mlp, model.layers[1].self_attn.o_proj):
        module.register_forward_pre_hook(lambda module, args: calls.append((module, torch.is_grad_enabled())))
    model(random_tokens(), random_targets(), noise_scale=0.7)
    for module in (model.layers[1].mlp, model.layers[1].self_attn.o_proj):
        assert [graded for called, graded in calls if called is module] == [False, True]


@pytest.mark.parametrize("mode", ["evaluation", "no gradient", "nothing skipped"])
def test_nothing_is_explored_without_a_gradient(mode: str) -> None:
    model = decoder(config("learned", explore=1.0))
    if mode == "nothing skipped":
        force(model, masks("all executed", 3))
    calls = []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(mode == "nothing skipped"):
        out = model.train(mode != "evaluation")(random_tokens(), random_targets())
    assert out.routing.explored_tokens.sum() == 0
    assert len(calls) == len(model.layers) or mode == "nothing skipped"


@granular
@pytest.mark.parametrize("confined", [False, True])
def test_exploration_is_the_same_in_both_executions(granularity: str, confined: bool) -> None:
    pair = [decoder(config("learned", granularity=granularity, explore=0.5, execution=e)) for e in EXECUTIONS]
    assert_same_step(*pair, confined=confined)


@granular
def test_exploration_changes_no_output(granularity: str) -> None:
    plain, exploring = (step(decoder(config("learned", granularity=granularity, explore=e)))[0] for e in (0.0, 0.7))
    assert torch.equal(plain.loss.token_nll, exploring.loss.token_nll)
    assert torch.equal(plain.routing.executed, exploring.routing.executed)
    assert exploring.routing.explored_tokens.min() > 0 and plain.routing.explored_tokens.max() == 0


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


@pytest.mark.parametrize("kind", ["dense", *KINDS])
@granular
@executions
def test_recomputation_changes_no_bit(kind: str, granularity: str, execution: str) -> None:
    found = []
    for recompute in (False, True):
        explore = 0.3 if kind == "learned" else 0.0
        model = decoder(
            config(kind, granularity=granularity, execution=execution, explore=explore), recompute=recompute
        )
        calls = []
        model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append(step(model))
        assert len(calls) == 1 + recompute + (explore > 0)
    (a, a_gradients), (b, b_gradients) = found
    assert torch.equal(a.loss.loss, b.loss.loss) and torch.equal(a.routing.executed, b.routing.executed)
    for name in a_gradients:
        assert torch.equal(a_gradients[name], b_gradients[name]), name


@granular
def test_recomputation_keeps_one_residual_stream_a_site(granularity: str) -> None:
    """Neither its norm nor an update; the final norm and the head keep one tensor each."""
    model = decoder(config("learned", granularity=granularity), recompute=True)
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()  # what is dropped on the way leaves it

    def pack(tensor: Tensor) -> Saved:
        alive.add(saved := Saved(tensor.detach()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        out = model(random_tokens(), random_targets(), noise_scale=0.7)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    streams = {s.tensor.untyped_storage().data_ptr() for s in alive if s.tensor.numel() >= BATCH * LENGTH * 64}
    assert len(streams - weights) == len(model.config.sites) + 2
    assert out.loss is not None


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
