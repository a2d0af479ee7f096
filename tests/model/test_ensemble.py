"""The late-layer ensemble: the base model at step 0, one head for k, gradients only where they belong."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import KVCache
from model.chunks import IGNORE_INDEX
from model.config import EnsembleConfig
from model.decoder import Decoder
from model.ensemble import Balance, vote_sums
from model.generate import generate
from model.head import LossSums
from model.schedules import Progress
from tests.model.tiny import assert_close, config, decoder, documents_of, random_targets, random_tokens

BACKBONES = ("dense", "learned", "stride")
K = 3


def tuned(kind: str = "learned", **ensemble: Any) -> Decoder:
    """A decoder whose late norms and router are far from their start."""
    model = decoder(config(kind))
    model.add_ensemble(EnsembleConfig(**{"layers": K, "final_weight": 0.5} | ensemble))
    assert model.ensemble is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.ensemble.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def few_targets() -> tuple[Tensor, int]:
    """Targets on the last third of each row, and how many those are."""
    targets = random_targets()
    targets[:, : 2 * targets.shape[1] // 3] = IGNORE_INDEX
    return targets, int((targets != IGNORE_INDEX).sum())


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("layers", [1, 2, K])
def test_at_step_0_it_is_the_base_model(kind: str, layers: int) -> None:
    model, tokens = decoder(config(kind)).eval(), random_tokens()
    with torch.no_grad():
        before = model(tokens).logits
        model.add_ensemble(EnsembleConfig(layers=layers, final_weight=1.0))
        assert_close(model(tokens).logits, before, 1e-5)


@pytest.mark.parametrize("weight", [0.4, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_final_layer_begins_with_its_weight(weight: float, temperature: float) -> None:
    model = decoder(config())
    model.add_ensemble(EnsembleConfig(layers=K, final_weight=weight, temperature=temperature))
    weights = model(random_tokens()).vote.weights
    rest = (1 - weight) / (K - 1)
    torch.testing.assert_close(weights, torch.tensor([rest, rest, weight]).expand_as(weights), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_vote_opens(temperature: float, top: int | None) -> None:
    """From the base model at step 0 to what the router says at ``open_by``, never back; and settled it stays."""
    model = tuned("learned", temperature=temperature, top=top, open_by=0.25).eval()
    late, tokens = model.ensemble, random_tokens()
    assert late is not None
    with torch.no_grad():
        free, shares = model(tokens).logits, []
        for step in (0, 2, 4, 5, 20):
            late.open(Progress(step, 20))
            output = model(tokens)
            shares.append(float(output.vote.weights[..., -1].mean()))
        assert shares == sorted(shares, reverse=True) and shares[-2] == shares[-1] < shares[0] - 0.01
        assert torch.equal(output.logits, free)
        late.open(Progress(0, 20))
        late.router.weight.zero_()  # as it is at step 0
        closed, model.ensemble = model(tokens).logits, None
        assert_close(closed, model(tokens).logits, 1e-4)
        model.ensemble = late
        late.open(Progress(3, 20))
        half = model(tokens).logits
        late.fold_closing_bias()
        assert late.router.closing_bias == 0.0
        assert_close(model(tokens).logits, half, 1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
def test_one_head_is_k_heads(kind: str) -> None:
    model = tuned(kind).eval()
    with torch.no_grad():
        output = model(random_tokens())
        heads = torch.stack([model.lm_head(n) for n in output.vote.normed])
        mixed = torch.einsum("kbtv,btk->btv", heads, output.vote.weights)
    assert_close(output.logits, mixed, 1e-5)
    assert output.vote.weights.std(dim=(0, 1)).min() > 0.01  # a vote that differs from token to token


def test_the_late_states_are_those_of_the_last_layers() -> None:
    model, seen = tuned().eval(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    vote = model(random_tokens()).vote
    assert model.ensemble is not None
    for norm, x, normed in zip((*model.ensemble.norms, model.norm), seen[-K:], vote.normed, strict=True):
        assert_close(norm(x), normed)


def test_only_the_top_layers_vote() -> None:
    top = 2
    every, some = tuned(), tuned(top=top)
    full, kept = (model(random_tokens()).vote.weights for model in (every, some))
    assert ((kept > 0).sum(-1) == top).all()
    torch.testing.assert_close(kept.sum(-1), torch.ones(kept.shape[:-1]))
    largest = full.topk(top, dim=-1)
    assert_close(kept.gather(-1, largest.indices), largest.values / largest.values.sum(-1, keepdim=True))


def test_a_tie_lets_no_more_layers_in() -> None:
    model = decoder(config())
    model.add_ensemble(EnsembleConfig(layers=K, top=2, final_weight=0.6))  # the early two begin alike
    weights = model(random_tokens()).vote.weights
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights[..., -1], torch.full(weights.shape[:-1], 0.75))


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_cross_entropy_and_distillation(scored: bool, temperature: float) -> None:
    model = tuned(distillation=0.7, distillation_temperature=temperature)
    targets, count = few_targets()
    tokens = random_tokens()
    output = model(tokens, targets, z_coefficient=0.01, scored_targets=count if scored else None)
    full = model(tokens)
    chosen = targets.flatten() != IGNORE_INDEX
    logits = full.logits.flatten(0, 1)[chosen]
    nll = F.cross_entropy(logits, targets.flatten()[chosen], reduction="sum")
    z = logits.logsumexp(-1).square().sum()
    *late, final = (model.lm_head(n).flatten(0, 1)[chosen] / temperature for n in full.vote.normed)
    kl = sum(
        F.kl_div(layer.log_softmax(-1), final.detach().log_softmax(-1), reduction="sum", log_target=True)
        for layer in late
    )
    wanted = nll + 0.01 * z + 0.7 * temperature**2 * kl
    torch.testing.assert_close(output.loss.loss, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(output.loss.distillation, temperature**2 * kl, rtol=1e-5, atol=1e-4)
    ours, theirs = (
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (output.loss.loss, wanted)
    )
    for (name, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5, msg=name)


def test_distillation_does_not_reach_the_teacher() -> None:
    """Neither what only the final layer's distribution goes through, nor the router, which has no part in it."""
    model = tuned("dense")
    output = model(random_tokens(), random_targets())
    output.loss.distillation.backward()
    last = len(model.layers) - 1
    for name, parameter in model.named_parameters():
        teacher = name.startswith((f"layers.{last}.", "norm.", "ensemble.router."))
        assert (parameter.grad is None) == teacher, name
    # The head is shared: what reaches it is the students' part.
    *students, teacher_logits = (model.lm_head(n.detach()) for n in output.vote.normed)
    p = teacher_logits.detach().log_softmax(-1)
    kl = sum(F.kl_div(s.log_softmax(-1), p, reduction="none", log_target=True).sum(-1) for s in students)
    (wanted,) = torch.autograd.grad((kl * (random_targets() != IGNORE_INDEX)).sum(), model.lm_head.weight)
    torch.testing.assert_close(model.lm_head.weight.grad, wanted, rtol=1e-4, atol=1e-5)


def test_scores_are_of_every_layer_and_of_the_ensemble() -> None:
    model = tuned().eval()
    targets, count = few_targets()
    tokens, chosen = random_tokens(), targets.flatten() != IGNORE_INDEX
    with torch.no_grad():
        scores = model(tokens, targets, scored_targets=count, score=True).scores
        full = model(tokens)
        logits = [model.lm_head(n) for n in full.vote.normed] + [full.logits]
    assert scores.nll.shape == scores.hit.shape == (K + 1, count)
    for nll, hit, one in zip(scores.nll, scores.hit, logits, strict=True):
        rows = one.flatten(0, 1)[chosen]
        torch.testing.assert_close(nll, F.cross_entropy(rows, targets.flatten()[chosen], reduction="none"))
        assert torch.equal(hit, rows.argmax(-1) == targets.flatten()[chosen])


def test_without_an_ensemble_there_is_one_score() -> None:
    model, (targets, count) = decoder(config()).eval(), few_targets()
    output = model(random_tokens(), targets, scored_targets=count, score=True)
    torch.testing.assert_close(output.scores.nll.sum(), model(random_tokens(), targets).loss.nll)
    assert output.scores.nll.shape == (1, count) and output.vote is None


@pytest.mark.parametrize("ensemble", [False, True])
def test_the_head_on_scored_tokens_only_gives_the_same_loss_and_gradients(ensemble: bool) -> None:
    model = tuned() if ensemble else decoder(config())
    targets, count = few_targets()
    found = []
    for scored in (None, count):
        model.zero_grad()
        output = model(random_tokens(), targets, scored_targets=scored)
        output.loss.loss.backward()
        found.append((output.loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, grads), (other_loss, other_grads) = found
    loss = loss._replace(token_nll=loss.token_nll[targets.flatten() != IGNORE_INDEX])
    for one, other in zip(loss, other_loss, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_batch_without_a_target_gives_zero_gradients() -> None:
    """ZeRO needs a gradient for every parameter on every rank, whatever its batch holds."""
    model, targets = tuned(), torch.full_like(random_targets(), IGNORE_INDEX)
    output = model(random_tokens(), targets, scored_targets=0)
    assert isinstance(output.loss, LossSums) and not output.loss.loss.detach().any()
    output.loss.loss.backward()
    for name, parameter in model.named_parameters():
        if "router" not in name or name.startswith("ensemble."):
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("kind", BACKBONES)
def test_decoding_with_the_cache_gives_the_same_logits(kind: str) -> None:
    model, tokens = tuned(kind, top=2).eval(), random_tokens(length=24)
    with torch.no_grad():
        full = model(tokens).logits
        cache = KVCache(model.config, len(tokens), 24, torch.device("cpu"), torch.float32)
        parts = [model(tokens[:, :10], cache=cache).logits]
        parts += [model(tokens[:, n : n + 1], cache=cache).logits for n in range(10, 24)]
    assert_close(torch.cat(parts, dim=1), full, 1e-4)
    prompt = tokens[:, :10]
    made = generate(model, prompt, 6)
    for step in range(6):
        assert torch.equal(made[:, 10 + step], model(made[:, : 10 + step]).logits[:, -1].argmax(-1))


def test_the_vote_is_causal_and_stays_in_its_document() -> None:
    model = tuned().eval()
    tokens = random_tokens()
    documents, positions = documents_of(10, tokens.shape[1] - 10)
    before = model(tokens, documents=documents, positions=positions).vote.weights
    changed = tokens.clone()
    changed[:, :10] = (changed[:, :10] + 1) % model.config.vocab_size
    after = model(changed, documents=documents, positions=positions).vote.weights
    assert_close(after[:, 10:], before[:, 10:])
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % model.config.vocab_size
    assert_close(model(changed).vote.weights[:, :20], model(tokens).vote.weights[:, :20])


def test_sums_of_the_vote() -> None:
    weights = torch.tensor([[[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]]], requires_grad=True)
    sums = vote_sums(weights, torch.tensor([[4, 0, IGNORE_INDEX]]))
    torch.testing.assert_close(sums.weights, torch.tensor([0.9, 1.1]))
    assert sums.largest.tolist() == [1, 1]
    wanted = -sum(w * torch.tensor(w).log() for w in (0.7, 0.3, 0.2, 0.8))
    torch.testing.assert_close(sums.entropy, torch.as_tensor(wanted, dtype=torch.float32))
    sums.weights[0].backward()
    assert weights.grad is not None and weights.grad.tolist() == [[[1, 0], [1, 0], [0, 0]]]


def test_balance_asks_more_of_the_layer_that_wins_more_often() -> None:
    balance = Balance(EnsembleConfig(layers=K, balance=0.1))
    assert balance.prices().tolist() == pytest.approx([0.1] * K)  # the same for all: no gradient through a softmax
    balance.observe(torch.tensor([2.0, 0.0, 6.0]))
    assert balance.prices().tolist() == pytest.approx([0.075, 0.0, 0.225])
    other = Balance(EnsembleConfig(layers=K, balance=0.1))
    other.load_state_dict(balance.state_dict())
    assert torch.equal(other.prices(), balance.prices())
    with pytest.raises(ValueError, match="the checkpoint's ensemble has 3 layers, this one has 2; resume with"):
        Balance(EnsembleConfig(layers=2)).load_state_dict(balance.state_dict())
    assert Balance(None).prices().tolist() == []


def test_balancing_spreads_the_votes() -> None:
    model = tuned("dense")
    assert model.ensemble is not None
    block, largest = EnsembleConfig(layers=K, balance=1.0), []
    balance = Balance(block)
    optimizer = torch.optim.Adam(model.ensemble.router.parameters(), lr=0.05)
    for _ in range(60):
        sums = model(random_tokens(), random_targets()).vote_sums
        loss = (balance.prices() * sums.weights).sum() / sums.largest.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        balance.observe(sums.largest)
        largest.append(sums.largest / sums.largest.sum())
    first, last = largest[0], torch.stack(largest[-20:]).mean(0)
    assert (last - 1 / K).abs().max() < 0.6 * (first - 1 / K).abs().max()


def test_more_layers_than_there_are_is_refused() -> None:
    model = decoder(config())
    with pytest.raises(ValueError, match=r"ensemble.layers \(9\) must not exceed the decoder's \d layers; lower it"):
        model.add_ensemble(EnsembleConfig(layers=9))
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        EnsembleConfig(layers=3, top=1)  # would be a constant, and its router learn nothing
    with pytest.raises(ValueError, match=r"ensemble.top \(4\) must not exceed ensemble.layers \(3\); lower top"):
        EnsembleConfig(layers=3, top=4)


def test_the_base_keeps_its_names() -> None:
    """A tuned state dict is the base's and the ensemble's: nothing is renamed."""
    model = decoder(config())
    before = set(model.state_dict())
    model.add_ensemble(EnsembleConfig(layers=K))
    added = {f"ensemble.norms.{n}.weight" for n in range(K - 1)} | {"ensemble.router.weight", "ensemble.router.bias"}
    assert set(model.state_dict()) == before | added
    assert not any(n.data_ptr() == m.data_ptr() for n, m in itertools.combinations(model.parameters(), 2))
