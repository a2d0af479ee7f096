"""Static execution: a capacity drops what comes late, counts it, and changes nothing where there is room."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model import selection
from model.config import Capacity, RouterConfig
from model.decoder import Decoder, DecoderOutput
from model.flops import Routed, executed_flops
from model.router import Gate, LearnedRouter, RoutingInputs
from tests.model.routed_steps import granular
from tests.model.tiny import (
    LENGTH,
    assert_close,
    config,
    decoder,
    documents_of,
    force,
    gradients,
    random_targets,
    random_tokens,
)


def step(model: Decoder, capacity: Capacity | None, confined: bool = False) -> DecoderOutput:
    documents, positions = documents_of(9, 16, 8) if confined else (None, None)
    out = model(
        random_tokens(), random_targets(), sample_ids=torch.tensor([11, 5, 2]), noise_scale=0.7,
        documents=documents, positions=positions, capacity=capacity,
    )  # fmt: skip
    (out.loss.loss + (torch.linspace(-3, 5, len(out.routing.density)) * out.routing.density).sum()).backward()
    return out


@granular
@pytest.mark.parametrize("kind", ["learned", "random", "stride", "expert_choice"])
@pytest.mark.parametrize("confined", [False, True], ids=["one-document", "documents"])
def test_with_room_for_all_it_is_the_rounded_execution(kind: str, granularity: str, confined: bool) -> None:
    models = [decoder(config(kind, granularity=granularity)) for _ in range(2)]
    rounded, capped = step(models[0], None, confined), step(models[1], Capacity(LENGTH - 3), confined)
    assert torch.equal(rounded.routing.executed, capped.routing.executed)
    assert capped.routing.overflow_tokens.sum() == 0
    assert_close(capped.loss.loss, rounded.loss.loss)
    truths = gradients(models[0])
    for name, gradient in gradients(models[1]).items():
        assert_close(gradient, truths[name])


@granular
def test_overflow_is_the_model_in_which_those_tokens_skip(granularity: str) -> None:
    """Outputs as if the gate had said skip; the density that is priced counts what the gate really said."""
    capped = decoder(config("learned", granularity=granularity))
    out = step(capped, Capacity(12))
    executed, routing = out.routing.executed, out.routing
    assert executed.sum(-1).max() == 12 and routing.overflow_tokens.sum() > 0
    wanted = routing.density * random_tokens().numel()
    assert_close(wanted, (routing.executed_tokens + routing.overflow_tokens).float(), 1e-4)

    skipping = force(decoder(config("learned", granularity=granularity)), executed)
    same = step(skipping, None)
    assert_close(out.loss.loss, same.loss.loss)
    truths = {name.replace(".router.weight", ".weight"): g for name, g in gradients(skipping).items()}
    for name, gradient in gradients(capped).items():
        if "router" not in name:
            continue
        assert gradient.any(), name
    for name in ("lm_head.weight", "layers.2.mlp.up_proj.weight", "layers.2.self_attn.q_proj.weight"):
        assert_close(capped.get_parameter(name).grad, truths[name])


@granular
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("confined", [False, True], ids=["one-document", "documents"])
def test_exploration_with_room_is_the_reference_that_explores_the_same_tokens(
    granularity: str, recompute: bool, confined: bool
) -> None:
    models = [
        decoder(config("learned", granularity=granularity, explore=0.5, execution=execution), recompute=recompute)
        for execution in ("reference", "capacity")
    ]
    reference, capped = (step(model, Capacity(LENGTH - 3, explored=5), confined) for model in models)
    assert torch.equal(reference.routing.executed, capped.routing.executed)
    assert capped.routing.overflow_tokens.sum() == 0
    assert capped.routing.explored_tokens.tolist() == [5 * 3] * len(models[1].config.sites)
    assert torch.equal(capped.routing.explored_tokens, reference.routing.explored_tokens)
    assert_close(capped.loss.token_nll, reference.loss.token_nll)
    truths = gradients(models[0])
    for name, gradient in gradients(models[1]).items():
        assert_close(gradient, truths[name])


def test_explored_windows_have_their_number_and_stand_for_all_skipped_tokens() -> None:
    """On average over seeds the router's gradient is the one with all explored, whatever a window's density."""
    x = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0))
    x[1, 20:, 0] = 40.0  # executed by far: 20 tokens of this window at most are skipped

    def gradient(number: int | None, seed: int) -> tuple[Gate, Tensor]:
        made = LearnedRouter(RouterConfig(density=0.5, explore=1.0), 8, 0)
        with torch.no_grad():
            made.weight.copy_(torch.linspace(-0.3, 0.3, 16).view(2, 8))
        scales = torch.tensor(0.0), torch.tensor(1.0)
        inputs = RoutingInputs(torch.tensor([3, 4]), torch.arange(300), *scales, seed, explored_tokens=number)
        gate = made(x, inputs)
        (gate.value * x[..., 1]).sum().backward()
        assert made.weight.grad is not None
        return gate, made.weight.grad

    every, exact = gradient(None, 0)
    skipped = (~every.executed).sum(1).tolist()
    assert skipped[0] > 100 and 0 < skipped[1] < 20
    drawn = [gradient(30, seed) for seed in range(100)]
    for gate, _ in drawn:
        assert torch.equal(gate.executed, every.executed) and not (gate.explored & gate.executed).any()
        assert gate.explored.sum(1).tolist() == [30, skipped[1]]
    times = torch.stack([gate.explored[0] for gate, _ in drawn]).float().mean(0)[~every.executed[0]]
    assert times.min() > 0 and times.mean() == pytest.approx(30 / skipped[0]) and times.max() < 2.5 * times.mean()
    mean = torch.stack([found for _, found in drawn]).mean(0)
    assert (mean - exact).norm() < 0.1 * exact.norm()


def test_tokens_without_room_are_not_added_as_fillers_of_exploration() -> None:
    """More room for exploration than skipped tokens: fillers are tokens that wanted to execute and found none."""
    models = [decoder(config("learned", explore=1.0)) for _ in range(2)]
    few, many = (step(m, Capacity(4, explored=e)) for m, e in zip(models, (0, LENGTH), strict=True))
    assert few.routing.overflow_tokens.min() > 0
    assert torch.equal(few.loss.token_nll, many.loss.token_nll)
    assert few.routing.explored_tokens.max() == 0 < many.routing.explored_tokens.min()


def test_evaluation_never_drops() -> None:
    model = decoder(config("learned")).eval()
    with torch.no_grad():
        free, capped = model(random_tokens()), model(random_tokens(), capacity=Capacity(3))
    assert torch.equal(free.logits, capped.logits) and capped.routing.overflow_tokens.sum() == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_follow_the_executed_tokens(recompute: bool) -> None:
    """Counted by torch, and recomputation pays for executed tokens only: four forward passes' worth, not more."""
    counted = {}
    for density in (1.0, 0.25):
        cfg = config("stride", density=density)
        model = decoder(cfg, recompute=recompute)
        with FlopCounterMode(display=False) as counter:
            out = model(random_tokens(), random_targets())
            out.loss.loss.backward()
        routing = out.routing
        ours = Routed(
            random_tokens().numel(), float(routing.visible_keys), routing.executed_tokens.tolist(),
            routing.attended_keys.tolist(),
        )  # fmt: skip
        counted[density] = (counter.get_total_flops(), executed_flops(cfg, ours))
    ratio, bound = (counted[0.25][i] / counted[1.0][i] for i in (0, 1))
    assert ratio == pytest.approx(bound, abs=0.06)


def test_thresholds_move_the_density_of_evaluation() -> None:
    model = decoder(config("learned")).eval()
    with torch.no_grad():
        plain = model(random_tokens()).routing
        zero = model(random_tokens(), thresholds=torch.zeros(3)).routing
        every = model(random_tokens(), thresholds=torch.full((3,), -torch.inf))
        median = plain.margins[0].median()
        half = model(random_tokens(), thresholds=torch.tensor([float(median), torch.inf, 0.0])).routing
        dense = decoder(config("dense")).eval()(random_tokens())
    assert torch.equal(plain.executed, zero.executed) and torch.equal(plain.executed, plain.margins >= 0)
    assert_close(every.logits, dense.logits)
    count = random_tokens().numel()
    assert half.executed_tokens[:2].tolist() == [count // 2 + 1, 0]
    assert model.train()(random_tokens(), random_targets()).routing.margins is None


def test_thresholds_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one number for each of the 3 routed sites, got a tensor of shape \[2\]"):
        decoder(config("learned"))(random_tokens(), thresholds=torch.zeros(2))


def test_what_a_capacity_dropped_is_not_added_as_a_filler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks share a window, shapes follow the decisions and are filled up, as on a GPU to 128, with any token."""
    group = SimpleNamespace(
        size=1, rank=0, local_part=lambda x: x, all_gather=lambda x: x,
        positions=lambda t, device="cpu": torch.arange(t),
        keys_values=lambda keys, values: lambda: (keys, values),
    )  # fmt: skip
    model = decoder(config("learned", execution="capacity"))
    found = []
    for sequence, rounding in ((None, 1), (group, 1), (group, 128)):
        monkeypatch.setitem(selection._ROUND_TO, "cpu", rounding)
        model.zero_grad()
        wide = {"capacity": Capacity(8, 0), "thresholds": torch.full((3,), -1e9)}  # all want to execute
        out = model(random_tokens(), random_targets(), sequence=sequence, **wide)
        out.loss.loss.backward()
        found.append(model.layers[0].mlp.up_proj.weight.grad.clone())
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
