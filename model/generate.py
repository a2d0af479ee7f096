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
    """One pass of the decoder, and what was taken after it."""

    chosen: Tensor
    """int64 [B]."""
    output: DecoderOutput
    """Over the prompt [B, T] in the first pass, over the token before in the others."""

    @property
    def finite(self) -> Tensor:
        """Whether the logits that ``chosen`` was taken from are, bool [B]; where not, it stands for nothing."""
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
    """Continue ``prompt``; everything but the result is as of :func:`passes`.

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
    """Continue ``prompt`` pass by pass, each as soon as it is done; whoever asks for no more stops it.

    Args:
        decoder: put into evaluation mode by the caller; or an engine around one.
        prompt: int64 [B, T], T at least 1, all rows of equal length, where the decoder computes.
        max_new_tokens: stop after this many.
        temperature: 0 takes the most likely token, else logits are divided by it and sampled.
        top_p: sample only from the most likely tokens that together hold this probability.
        eos_id: a row that produced it is continued with it; generation ends when all rows have.
        generator: of the sampling.
        thresholds: fp32 [S], the compute dial: see :class:`model.decoder.Decoder`.
        padding: int64 [B], how many tokens at the beginning of each row are padding, whatever they are: rows of unlike
            length end together. They are a document of their own, so that nothing sees them.

    Raises:
        ValueError: for an empty prompt, or a router kind that is not causal.
    """
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, for example the BOS id")
    module: Decoder = getattr(decoder, "module", decoder)
    # An engine trains on: what its collectives make inside an inference mode could not.
    mode = torch.inference_mode if module is decoder else torch.no_grad
    size, dtype = prompt.shape[1] + max_new_tokens, module.embed_tokens.weight.dtype
    cache = KVCache(module.config, len(prompt), size, prompt.device, dtype)
    step, ended = prompt, torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    rows: dict[str, Tensor] = {}
    if padding is not None and bool(padding.any()):
        places = torch.arange(prompt.shape[1], device=prompt.device) - padding[:, None]
        rows = {"documents": (places >= 0).long(), "positions": places.clamp(min=0), "padding": padding}
    for _ in range(max_new_tokens):
        with mode():  # not around what is done with a pass, which the caller decides
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
    logits = logits.nan_to_num()  # what is drawn then, nobody takes: see Pass.finite
    # Less the largest first: divided by next to nothing, all would be infinite.
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0  # the first token always stays
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
