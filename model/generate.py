"""Token-by-token generation with the KV cache.

Dimension letters: B batch, T prompt tokens, S routed sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.cache import KVCache
from model.decoder import Decoder, DecoderOutput


class Pass(NamedTuple):
    """One pass of the decoder, and the token chosen after it."""

    chosen: Tensor
    """int64 [B]."""
    output: DecoderOutput
    """Over the prompt [B, T] in the first pass, over the previous token in the others."""

    @property
    def finite(self) -> Tensor:
        """Whether the logits behind ``chosen`` are finite, bool [B]; where not, ``chosen`` is meaningless."""
        assert self.output.logits is not None
        return self.output.logits[:, -1].isfinite().all(-1)


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
    """Continue ``prompt``; everything but the result is as for :func:`passes`.

    Returns:
        int64 [B, T + new], the prompt and its continuation.
    """
    made = passes(decoder, prompt, max_new_tokens, temperature, top_p, eos_id, generator, thresholds)
    return torch.cat((prompt, *[one.chosen[:, None] for one in made]), dim=1)


def passes(
    decoder: Any,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    thresholds: Tensor | None = None,
    padding: Tensor | None = None,
) -> Iterator[Pass]:
    """Continue ``prompt``, yielding each pass as soon as it is done; stop iterating to stop it.

    Args:
        decoder: put into evaluation mode by the caller; or a DeepSpeed engine around one.
        prompt: int64 [B, T], T at least 1, all rows of equal length, on the decoder's device.
        max_new_tokens: stop after this many.
        temperature: 0 takes the most likely token, else logits are divided by it and sampled.
        top_p: sample only from the most likely tokens that together hold this probability.
        eos_id: a row that produced it is continued with it; generation ends when all rows have.
        generator: of the sampling.
        thresholds: fp32 [S], the compute dial: see :class:`model.decoder.Decoder`.
        padding: int64 [B], how many tokens at the beginning of each row are padding, with any ids: rows of different
            length end together. Padding is a document of its own, so that no other token sees it.

    Raises:
        ValueError: for an empty prompt, or a router kind that is not causal.
    """
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, for example the BOS id")
    module: Decoder = getattr(decoder, "module", decoder)
    # An engine goes on training, which tensors made by its collectives in inference mode would not allow.
    mode = torch.inference_mode if module is decoder else torch.no_grad
    size, dtype = prompt.shape[1] + max_new_tokens, module.embed_tokens.weight.dtype
    cache = KVCache(module.config, len(prompt), size, prompt.device, dtype)
    step, ended = prompt, torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    rows: dict[str, Tensor] = {}
    if padding is not None and bool(padding.any()):
        places = torch.arange(prompt.shape[1], device=prompt.device) - padding[:, None]
        rows = {"documents": (places >= 0).long(), "positions": places.clamp(min=0), "padding": padding}
    for _ in range(max_new_tokens):
        with mode():  # not around the yield: the caller chooses its own mode
            output = decoder(step, cache=cache, thresholds=thresholds, **rows)
            assert output.logits is not None
            chosen = pick(output.logits[:, -1].float(), temperature, top_p, generator)
            if eos_id is not None:
                chosen = torch.where(ended, eos_id, chosen)
                ended = ended | (chosen == eos_id)
            step = chosen[:, None]
            if rows:
                rows |= {"documents": torch.ones_like(step), "positions": rows["positions"][:, -1:] + 1}
        yield Pass(chosen, output)
        if eos_id is not None and bool(ended.all()):
            return


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits [B, V] -> chosen ids [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.nan_to_num()  # what is drawn from such rows is discarded: see Pass.finite
    # Subtract the largest first: divided by a tiny temperature, all would be infinite.
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0  # the first token always stays
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
