"""Token-by-token generation with the KV cache.

Dimension letters: B batch, T prompt tokens, S routed sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from model.cache import KVCache
from model.decoder import Decoder
from model.record import RoutingRecord


def generate(
    decoder: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """Continue ``prompt``.

    Args:
        decoder: put into evaluation mode by the caller.
        prompt: int64 [B, T], T at least 1, all rows of equal length.
        max_new_tokens: stop after this many.
        temperature: 0 takes the most likely token, else logits are divided by it and sampled.
        top_p: sample only from the most likely tokens that together hold this probability.
        eos_id: a row that produced it is continued with it; generation ends when all rows have.
        generator: of the sampling.
        thresholds: fp32 [S], the compute dial: see :class:`model.decoder.Decoder`.

    Returns:
        int64 [B, T + new], the prompt and its continuation.

    Raises:
        ValueError: for an empty prompt, or a router kind that is not causal.
    """
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, for example the BOS id")
    with torch.inference_mode():
        tokens = _continue(decoder, prompt, max_new_tokens, temperature, top_p, eos_id, generator, thresholds)
    return tokens.clone()  # outside, so that it is an ordinary tensor


def _continue(
    decoder: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_id: int | None,
    generator: torch.Generator | None,
    thresholds: Tensor | None,
) -> Tensor:
    weight = decoder.embed_tokens.weight
    cache = KVCache(decoder.config, len(prompt), prompt.shape[1] + max_new_tokens, weight.device, weight.dtype)
    tokens, step = prompt, prompt
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        logits = decoder(step, cache=cache, thresholds=thresholds).logits
        assert logits is not None
        step = pick(logits[:, -1].float(), temperature, top_p, generator)
        if eos_id is not None:
            step = torch.where(ended, eos_id, step)
            ended |= step == eos_id
        step = step[:, None]
        tokens = torch.cat((tokens, step), dim=1)
        if eos_id is not None and bool(ended.all()):
            break
    return tokens


@torch.no_grad()
def stream(
    decoder: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    thresholds: Tensor | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[int, RoutingRecord]]:
    """The tokens that :func:`generate` would append to one row, each as soon as it is known, with the pass before it.

    Args:
        decoder: in evaluation mode; or an engine around one.
        prompt: T ids, at least one.
        max_new_tokens: stop after this many, or after ``eos_id``, which is the last one given then.
        temperature, top_p, eos_id, generator, thresholds: as of :func:`generate`.
        device: where ``decoder`` computes; where its embedding lies unless given.
    """
    module: Decoder = getattr(decoder, "module", decoder)
    weight = module.embed_tokens.weight
    device = weight.device if device is None else device
    cache = KVCache(module.config, 1, len(prompt) + max_new_tokens, device, weight.dtype)
    step = torch.tensor([list(prompt)], device=device)
    for _ in range(max_new_tokens):
        output = decoder(step, cache=cache, thresholds=thresholds)
        step = pick(output.logits[:, -1].float(), temperature, top_p, generator)[:, None]
        token = int(step)
        yield token, output.routing
        if token == eos_id:
            return


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits [B, V] -> chosen ids [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0  # the first token always stays
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
