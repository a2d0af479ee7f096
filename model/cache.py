"""The KV cache of token-by-token decoding.

Every layer has keys and values of every token, skipped or not: a skipped token is still attended to by later ones
(Zeng et al. 2023), so the cache of a routed model is as full as a dense one's. They are computed when a later token
executes the layer and needs them, for all tokens since the last one that did, so that the projections' weights are
read once. A layer that all tokens of a step skip costs only its norm and its router:

    token         0 1 2 3 4
    executes      x . . x .
    computed at   0 3 3 3 later

Dimension letters: B batch, S capacity in tokens, T new tokens, W pending tokens, D width, G key/value heads, K head
width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.rotary import rotation

KeysValues = Callable[[], tuple[Tensor, Tensor]]
"""Returns keys and values of all tokens, including cached ones and other ranks', [B, S, G, K] each; called once the
queries are ready, because other ranks' may be in transit until then."""
_MOST_WAITING = 64
"""Limit of a layer's pending tokens; with that many, their product is no longer bound by reading the weights."""


class _Waiting(NamedTuple):
    """New tokens of a layer: normed inputs [B, T, D], their rotation [B, T, K], and the keys and values' projection."""

    h: Tensor
    cos: Tensor
    sin: Tensor
    project: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of fixed size.

    Args:
        config: the model's sizes.
        batch: B.
        capacity_tokens: S; appending beyond it raises ``ValueError``.
        device, dtype: of the buffers.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity_tokens: int, device: torch.device, dtype: torch.dtype):
        shape = (config.layers, batch, capacity_tokens, config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.documents = torch.zeros(batch, capacity_tokens, dtype=torch.int64, device=device)
        positions = torch.arange(capacity_tokens, device=device)
        self._cos, self._sin = rotation(config, positions.expand(batch, -1), dtype)
        self.capacity_tokens = capacity_tokens
        self.has_documents = False
        self.length = 0
        self._waiting: dict[int, list[_Waiting]] = {}

    def reserve(self, tokens: int) -> None:
        """Refuse, before anything is written, a step that would not fit."""
        if self.length + tokens > self.capacity_tokens:
            raise ValueError(
                f"the KV cache holds {self.capacity_tokens} tokens, {self.length} are used and {tokens} more do not "
                "fit; make the cache larger or the prompt shorter"
            )

    def append(
        self,
        layer: int,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        project: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> KeysValues:
        """Add a layer's new tokens, whose keys and values are computed on demand.

        Args:
            layer: its number.
            h: normed inputs, [B, T, D].
            cos, sin: rotation, [B, T, K].
            project: computes keys and values [B, W, G, K] from inputs and rotation of W tokens.

        Returns:
            A function that computes pending ones and returns all so far, [B, length + T, G, K] each.
        """
        waiting = self._waiting.setdefault(layer, [])
        waiting.append(_Waiting(h, cos, sin, project))
        end = self.length + h.shape[1]
        if sum(new.h.shape[1] for new in waiting) >= _MOST_WAITING:
            self._write(layer, end)
        return partial(self._read, layer, end)

    @torch.no_grad()
    def write_all(self) -> None:
        """Compute the pending keys and values of all layers."""
        for layer in list(self._waiting):
            self._write(layer, self.length)

    def _read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        self._write(layer, end)
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def _write(self, layer: int, end: int) -> None:
        """Compute the keys and values of the pending tokens; the last one is at ``end - 1``."""
        waiting = self._waiting.pop(layer, None)
        if waiting is None:
            return
        h, cos, sin = waiting[0][:3]
        if len(waiting) > 1:
            h, cos, sin = (torch.cat(parts, dim=1) for parts in list(zip(*waiting, strict=True))[:3])
        new = slice(end - h.shape[1], end)
        self.keys[layer, :, new], self.values[layer, :, new] = waiting[0].project(h, cos, sin)

    def rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the next ``tokens`` positions, [B, tokens, K] each; see ``model/rotary.py``."""
        new = slice(self.length, self.length + tokens)
        return self._cos[:, new], self._sin[:, new]

    def append_documents(self, documents: Tensor) -> Tensor:
        """Store the new tokens' documents [B, T]; return those of all keys so far [B, length + T]."""
        if self.length and not self.has_documents:
            raise ValueError("the cache was started without documents, so new tokens cannot have any")
        self.has_documents = True
        end = self.length + documents.shape[1]
        self.documents[:, self.length : end] = documents
        return self.documents[:, :end]

    def repeat(self, other: KVCache, times: Tensor) -> None:
        """Fill this empty cache with the contents of ``other``, its row i repeated ``times[i]`` times."""
        other.write_all()
        self.length = other.length
        for held, own in ((other.keys, self.keys), (other.values, self.values)):
            own[:, :, : self.length] = held[:, :, : self.length].repeat_interleave(times, dim=1)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` as seen, once every layer has taken them."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        self.write_all()
        self.length = length
