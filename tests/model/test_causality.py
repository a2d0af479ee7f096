"""Invariant 1: nothing that comes later, and nothing of another document, reaches a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.cache import KVCache
from model.chunks import IGNORE_INDEX
from model.config import Capacity
from model.decoder import Decoder, DecoderOutput
from model.generate import generate
from tests.model.routed_steps import executions, granular
from tests.model.tiny import (
    LENGTH,
    VARIANTS,
    VOCABULARY,
    assert_close,
    config,
    decoder,
    documents_of,
    random_targets,
    random_tokens,
)

SAMPLES = torch.tensor([11, 5, 2])
CAUSAL = ["learned", "random", "stride"]
routed = pytest.mark.parametrize("kind", CAUSAL)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def changed(tokens: Tensor, where: Tensor | slice) -> Tensor:
    """``tokens`` [B, T] with other ids in the columns ``where``."""
    other = tokens.clone()
    other[:, where] = (other[:, where] + 1 + torch.arange(other[:, where].shape[1])) % VOCABULARY
    return other


def run(model: Decoder, tokens: Tensor, **arguments: Tensor | int | None) -> DecoderOutput:
    with torch.no_grad():
        return model(tokens, sample_ids=SAMPLES, noise_scale=0.7, **arguments)


def assert_past_untouched(model: Decoder, cut: int, **arguments: Tensor | int | None) -> None:
    """Change tokens from ``cut`` on: logits, decisions and loss before it stay, and something after it moves."""
    tokens, targets = random_tokens(), random_targets()
    targets[:, cut:] = IGNORE_INDEX
    other = changed(tokens, slice(cut, None))
    before, after = run(model, tokens, **arguments), run(model, other, **arguments)
    assert_close(after.logits[:, :cut], before.logits[:, :cut])
    assert torch.equal(after.routing.executed[:, :, :cut], before.routing.executed[:, :, :cut])
    assert (after.logits[:, cut:] - before.logits[:, cut:]).abs().max() > 0.1
    losses = [run(model, t, targets=targets, **arguments).loss.loss for t in (tokens, other)]
    assert losses[0] > 0
    assert_close(losses[1], losses[0], 1e-6)
    if len(before.routing.executed):
        assert 0.2 < before.routing.executed.float().mean() < 0.8  # a test without decisions would show nothing


@routed
@granular
@executions
@modes
@pytest.mark.parametrize("confined", [False, True], ids=["one-document", "documents"])
def test_future_reaches_nothing(kind: str, granularity: str, execution: str, training: bool, confined: bool) -> None:
    model = decoder(config(kind, granularity=granularity, execution=execution)).train(training)
    documents, positions = documents_of(9, 20, 4) if confined else (None, None)
    for cut in (1, 16, LENGTH - 1):
        assert_past_untouched(model, cut, documents=documents, positions=positions)


@routed
@granular
def test_future_reaches_nothing_under_a_capacity(kind: str, granularity: str) -> None:
    model = decoder(config(kind, granularity=granularity))
    assert run(model, random_tokens(), capacity=Capacity(10)).routing.overflow_tokens.sum() > 0
    for cut in (1, 16, LENGTH - 1):
        assert_past_untouched(model, cut, capacity=Capacity(10))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dense", "learned"])
def test_future_reaches_nothing_in_every_variant(kind: str, variant: str) -> None:
    assert_past_untouched(decoder(config(kind, variant)), 13)


@routed
@granular
def test_same_noise_same_decisions(kind: str, granularity: str) -> None:
    """The training-mode tests above rest on this: the noise belongs to the sample, not to the draw."""
    model = decoder(config(kind, granularity=granularity))
    first, second = run(model, random_tokens()), run(model, random_tokens())
    assert torch.equal(first.routing.executed, second.routing.executed)
    with torch.no_grad():
        elsewhere = model(random_tokens(), sample_ids=SAMPLES + 1, noise_scale=0.7)
    assert torch.equal(first.routing.executed, elsewhere.routing.executed) == (kind == "stride")


@pytest.mark.parametrize("kind", ["dense", *CAUSAL])
@granular
@executions
@modes
def test_documents_do_not_see_each_other(kind: str, granularity: str, execution: str, training: bool) -> None:
    model = decoder(config(kind, granularity=granularity, execution=execution)).train(training)
    documents, positions = documents_of(9, 16, 8)
    tokens, inside = random_tokens(), documents[0] == 1
    other = changed(tokens, inside)
    before = run(model, tokens, documents=documents, positions=positions)
    after = run(model, other, documents=documents, positions=positions)
    assert_close(after.logits[:, ~inside], before.logits[:, ~inside])
    assert torch.equal(after.routing.executed[:, :, ~inside], before.routing.executed[:, :, ~inside])
    assert (after.logits[:, inside] - before.logits[:, inside]).abs().max() > 0.1

    free = [run(model, t, positions=positions).logits[:, 25:] for t in (tokens, other)]
    assert (free[0] - free[1]).abs().max() > 1e-2, "without documents the last one must see the one before it"


@pytest.mark.parametrize("kind", ["dense", "learned"])
@granular
def test_a_packed_document_equals_the_document_alone(kind: str, granularity: str) -> None:
    """Restarted positions: where a document stands in the window does not matter."""
    model = decoder(config(kind, granularity=granularity)).eval()
    documents, positions = documents_of(9, 16, 8)
    tokens = random_tokens()
    packed = run(model, tokens, documents=documents, positions=positions)
    for start, end in ((0, 9), (9, 25), (25, 33)):
        alone = run(model, tokens[:, start:end])
        assert_close(packed.logits[:, start:end], alone.logits)
        assert torch.equal(packed.routing.executed[:, :, start:end], alone.routing.executed)


@routed
@granular
def test_later_chunks_reach_nothing_with_a_cache(kind: str, granularity: str) -> None:
    """Generation: within a chunk that is decoded against the cache, later tokens change no earlier logit."""
    model = decoder(config(kind, granularity=granularity)).eval()
    tokens = random_tokens()
    outputs = []
    for rest in (tokens, changed(tokens, slice(25, None))):
        cache = KVCache(model.config, 3, LENGTH, tokens.device, torch.float32)
        run(model, rest[:, :14], cache=cache)
        outputs.append(run(model, rest[:, 14:], cache=cache))
    assert_close(outputs[1].logits[:, :11], outputs[0].logits[:, :11])
    assert torch.equal(outputs[1].routing.executed[:, :, :11], outputs[0].routing.executed[:, :, :11])
    assert (outputs[1].logits[:, 11:] - outputs[0].logits[:, 11:]).abs().max() > 0.1


@granular
def test_expert_choice_is_not_causal(granularity: str) -> None:
    """The detector detects: top-k over the sequence flips past decisions and moves past logits."""
    model = decoder(config("expert_choice", granularity=granularity)).eval()
    tokens = random_tokens()
    before, after = run(model, tokens), run(model, changed(tokens, slice(16, None)))
    assert (after.routing.executed[:, :, :16] != before.routing.executed[:, :, :16]).any()
    assert (after.logits[:, :16] - before.logits[:, :16]).abs().max() > 0.1
    with pytest.raises(AssertionError):
        assert_past_untouched(model, 16)


def test_expert_choice_is_refused_for_generation() -> None:
    model = decoder(config("expert_choice")).eval()
    with pytest.raises(ValueError, match=r"expert_choice.*later ones.*learned, random or stride"):
        generate(model, random_tokens(), 2)
    cache = KVCache(model.config, 3, LENGTH, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="expert_choice"):
        model(random_tokens(), cache=cache)
    assert cache.length == 0
