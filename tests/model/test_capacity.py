"""Static execution: a capacity drops what comes late, counts it, and changes nothing where there is room."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.decoder import Decoder, DecoderOutput
from model.flops import Routed, executed_flops
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

granular = pytest.mark.parametrize("granularity", ["layer", "module"])


def step(model: Decoder, capacity_tokens: int | None, confined: bool = False) -> DecoderOutput:
    documents, positions = documents_of(9, 16, 8) if confined else (None, None)
    out = model(
        random_tokens(), random_targets(), sample_ids=torch.tensor([11, 5, 2]), noise_scale=0.7,
        documents=documents, positions=positions, capacity_tokens=capacity_tokens,
    )  # fmt: skip
    (out.loss.loss + (torch.linspace(-3, 5, len(out.routing.density)) * out.routing.density).sum()).backward()
    return out


@granular
@pytest.mark.parametrize("kind", ["learned", "random", "stride", "expert_choice"])
@pytest.mark.parametrize("confined", [False, True], ids=["one-document", "documents"])
def test_with_room_for_all_it_is_the_rounded_execution(kind: str, granularity: str, confined: bool) -> None:
    models = [decoder(config(kind, granularity=granularity)) for _ in range(2)]
    rounded, capped = step(models[0], None, confined), step(models[1], LENGTH - 3, confined)
    assert torch.equal(rounded.routing.executed, capped.routing.executed)
    assert capped.routing.overflow_tokens.sum() == 0
    assert_close(capped.loss.loss, rounded.loss.loss)
    truths = gradients(models[0])
    for name, gradient in gradients(models[1]).items():
        assert_close(gradient, truths[name])


@granular
def test_overflow_is_the_model_in_which_those_tokens_skip(granularity: str) -> None:
    """Outputs as if the gate had said skip; the density that is priced counts what the gate really said."""
    capacity = 12
    capped = decoder(config("learned", granularity=granularity))
    out = step(capped, capacity)
    executed, routing = out.routing.executed, out.routing
    assert executed.sum(-1).max() == capacity and routing.overflow_tokens.sum() > 0
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


def test_evaluation_never_drops() -> None:
    model = decoder(config("learned")).eval()
    with torch.no_grad():
        free, capped = model(random_tokens()), model(random_tokens(), capacity_tokens=3)
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
