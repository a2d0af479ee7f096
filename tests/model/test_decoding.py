"""Invariant 2: training mode without noise, a full forward pass, prefill and decoding agree."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.cache import KVCache
from model.decoder import Decoder, DecoderOutput
from model.generate import generate
from tests.model.routed_steps import executions, granular
from tests.model.tiny import LENGTH, VARIANTS, assert_close, config, decoder, documents_of, random_tokens

KINDS = ["dense", "learned", "random", "stride"]
CHUNKS = {"prefill": [LENGTH], "chunked": [14, 1, 18], "token-by-token": [1] * LENGTH}
kinds = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def in_chunks(
    model: Decoder, tokens: Tensor, chunks: list[int], documents: Tensor | None, positions: Tensor | None
) -> list[DecoderOutput]:
    cache = KVCache(model.config, len(tokens), sum(chunks), tokens.device, torch.float32)
    outputs, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        own = {} if documents is None else {"documents": documents[:, part], "positions": positions[:, part]}
        outputs.append(model(tokens[:, part], cache=cache, **own))
        start += size
        assert cache.length == start
    return outputs


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_ranks_in_lockstep_run_every_module_and_find_the_same(granularity: str) -> None:
    """At ZeRO 3 a site that nothing executes may not be left out, because other ranks wait to gather its weights."""
    model = decoder(config("learned", granularity=granularity)).eval()
    model.thresholds = torch.full((len(model.config.sites),), math.inf)
    called: list[int] = []
    model.layers[0].mlp.register_forward_hook(lambda *_: called.append(1))
    found = []
    for model.lockstep in (False, True):
        called.clear()
        with torch.no_grad():
            found.append(in_chunks(model, random_tokens(), [30, 1, 1, 1], None, None)[-1].logits)
        assert len(called) == (4 if model.lockstep else 0)
    assert torch.equal(*found)


def assert_chunks_agree(
    model: Decoder, chunks: list[int], documents: Tensor | None = None, positions: Tensor | None = None
) -> None:
    tokens = random_tokens()
    with torch.no_grad():
        full = model(tokens, documents=documents, positions=positions)
    outputs = in_chunks(model, tokens, chunks, documents, positions)
    assert_close(torch.cat([out.logits for out in outputs], dim=1), full.logits)
    assert torch.equal(torch.cat([out.routing.executed for out in outputs], dim=2), full.routing.executed)
    for name in ("executed_tokens", "attended_keys", "visible_keys"):
        assert torch.equal(sum(getattr(out.routing, name) for out in outputs), getattr(full.routing, name)), name


@kinds
@granular
@executions
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("confined", [False, True], ids=["one-document", "documents"])
def test_cache_agrees_with_full_forward(
    kind: str, granularity: str, execution: str, chunks: str, confined: bool
) -> None:
    model = decoder(config(kind, granularity=granularity, execution=execution)).eval()
    documents, positions = documents_of(9, 16, 8) if confined else (None, None)
    assert_chunks_agree(model, CHUNKS[chunks], documents, positions)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("input_kind", ["normed", "raw"])
def test_cache_agrees_in_every_variant(variant: str, input_kind: str) -> None:
    model = decoder(config("learned", variant, input=input_kind)).eval()
    assert_chunks_agree(model, CHUNKS["token-by-token"])


@kinds
@granular
@executions
def test_greedy_generation_is_the_argmax_of_the_full_forward(kind: str, granularity: str, execution: str) -> None:
    model = decoder(config(kind, granularity=granularity, execution=execution)).eval()
    prompt = random_tokens(length=7)
    expected = prompt
    with torch.no_grad():
        for _ in range(9):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    produced = generate(model, prompt, 9)
    assert torch.equal(produced, expected)
    assert len(produced[:, 7:].unique()) > 3  # not one token over and over


def left_padded(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, documents (1 for the text, 0 for padding) and positions of rows that end together."""
    longest = max(lengths)
    tokens = random_tokens(len(lengths), longest)
    documents = torch.ones_like(tokens)
    positions = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        tokens[row, : longest - length] = 0
        documents[row, : longest - length] = 0
        positions[row, longest - length :] = torch.arange(length)
    return tokens, documents, positions


@pytest.mark.parametrize("kind", ["dense", "learned"])
@granular
@executions
def test_left_padded_batch_equals_single_rows(kind: str, granularity: str, execution: str) -> None:
    model = decoder(config(kind, granularity=granularity, execution=execution)).eval()
    lengths = [17, 5, 11]
    tokens, documents, positions = left_padded(lengths)
    with torch.no_grad():
        batch = model(tokens, documents=documents, positions=positions)
        for chunks in ([17], [8, 9], [13, 1, 1, 1, 1]):
            cached = in_chunks(model, tokens, chunks, documents, positions)
            assert_close(torch.cat([out.logits for out in cached], dim=1), batch.logits)
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, -length:])
            assert_close(batch.logits[row, -length:], alone.logits[0])
            assert torch.equal(batch.routing.executed[:, row, -length:], alone.routing.executed[:, 0])


@granular
@executions
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_mode_without_noise_is_evaluation(granularity: str, execution: str, variant: str) -> None:
    model = decoder(config("learned", variant, granularity=granularity, execution=execution))
    tokens = random_tokens()
    with torch.no_grad():
        noisy = model.train()(tokens, noise_scale=1.0, temperature=0.3)
        quiet = model(tokens, noise_scale=0.0, temperature=0.3)
        evaluated = model.eval()(tokens, noise_scale=1.0)
    assert torch.equal(quiet.logits, evaluated.logits)
    assert torch.equal(quiet.routing.executed, evaluated.routing.executed)
    assert not torch.equal(noisy.routing.executed, evaluated.routing.executed)


def test_full_cache_is_refused_before_anything_is_written() -> None:
    model = decoder(config()).eval()
    cache = KVCache(model.config, 3, 10, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model(random_tokens(length=8), cache=cache)
        kept = cache.keys.clone()
        with pytest.raises(ValueError, match="holds 10 tokens, 8 are used and 3 more do not fit"):
            model(random_tokens(length=3), cache=cache)
    assert cache.length == 8 and torch.equal(cache.keys, kept)


def test_cache_wants_documents_always_or_never() -> None:
    model = decoder(config()).eval()
    tokens, documents = random_tokens(length=4), torch.zeros(3, 4, dtype=torch.int64)
    without = KVCache(model.config, 3, 10, torch.device("cpu"), torch.float32)
    model(tokens, cache=without)
    with pytest.raises(ValueError, match="started without documents"):
        model(tokens, cache=without, documents=documents)
    having = KVCache(model.config, 3, 10, torch.device("cpu"), torch.float32)
    model(tokens, cache=having, documents=documents)
    with pytest.raises(ValueError, match="started with documents"):
        model(tokens, cache=having)


def test_keys_and_values_wait_for_a_token_that_executes() -> None:
    """One token of four executes: the projections run then, for the tokens before it, too, and give the same."""
    model = decoder(config("stride", density=0.25)).eval()
    cache = KVCache(model.config, 1, LENGTH, torch.device("cpu"), torch.float32)
    rows: list[list[int]] = [[] for _ in model.layers]
    for layer, block in enumerate(model.layers):
        block.self_attn.k_proj.register_forward_hook(
            lambda _, given, __, layer=layer: rows[layer].append(given[0].shape[1])
        )
    tokens = random_tokens()[:1]
    with torch.no_grad():
        executed = torch.cat([model(token, cache=cache).routing.executed[:, 0] for token in tokens.split(1, dim=1)], 1)
        for layer, own in enumerate(executed):
            ends = [0, *(own.nonzero().flatten() + 1).tolist()]
            assert rows[layer] == [end - start for start, end in pairwise(ends)]
        cache.write_all()
        assert [sum(each) for each in rows] == [LENGTH] * len(rows)
        at_once = KVCache(model.config, 1, LENGTH, torch.device("cpu"), torch.float32)
        model(tokens, cache=at_once)
        at_once.write_all()
    assert_close(cache.keys, at_once.keys)
    assert_close(cache.values, at_once.values)


def test_no_more_than_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.cache._MOST_WAITING", 5)
    model = decoder(config("learned")).eval()
    model.thresholds = torch.full((len(model.config.sites),), math.inf)
    cache = KVCache(model.config, 3, LENGTH, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for count, token in enumerate(random_tokens()[:, :12].split(1, dim=1), start=1):
            model(token, cache=cache)
            assert bool((cache.keys[:, :, : count - count % 5].abs().sum(-1) > 0).all())
            assert bool((cache.keys[:, :, count - count % 5 :] == 0).all())


def test_a_truncated_or_repeated_cache_has_what_waited() -> None:
    model = decoder(config("learned")).eval()
    tokens, device = random_tokens(), torch.device("cpu")
    skips = torch.full((len(model.config.sites),), math.inf)
    plain, waited = (KVCache(model.config, 3, LENGTH, device, torch.float32) for _ in range(2))
    with torch.no_grad():
        model(tokens[:, :6], cache=plain, thresholds=skips)
        plain.write_all()
        model(tokens[:, :8], cache=waited, thresholds=skips)
        waited.truncate(6)
        own = KVCache(model.config, 3, LENGTH, device, torch.float32)
        own.repeat(waited, torch.ones(3, dtype=torch.int64))
        found = [model(tokens[:, 6:9], cache=cache, thresholds=-skips).logits for cache in (plain, waited, own)]
    assert_close(found[1], found[0])
    assert torch.equal(found[2], found[1])


def test_skipped_tokens_keys_and_values_are_cached() -> None:
    """Zeng et al.: a skipped token is still attended to, so every place of the cache is filled in every layer."""
    model = decoder(config("stride", density=0.25)).eval()
    cache = KVCache(model.config, 3, LENGTH, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        out = model(random_tokens(), cache=cache)
    assert out.routing.executed.float().mean() < 0.3
    cache.write_all()
    assert (cache.keys.abs().sum(-1) > 0).all() and (cache.values.abs().sum(-1) > 0).all()
