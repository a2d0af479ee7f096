"""Token-by-token generation with the KV cache.

Dimension letters: B batch, T prompt tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import KVCache
from model.decoder import Decoder


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
