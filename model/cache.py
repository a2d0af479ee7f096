"""The KV cache of token-by-token decoding.

Every layer writes keys and values of every token, skipped or not: a skipped token is still attended to by later
ones (Zeng et al. 2023), so the cache of a routed model is as full as a dense one's.

Dimension letters: B batch, S capacity in tokens, T new tokens, G key/value heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.rotary import rotation


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

    def reserve(self, tokens: int) -> None:
        """Refuse, before anything is written, a step that would not fit."""
        if self.length + tokens > self.capacity_tokens:
            raise ValueError(
                f"the KV cache holds {self.capacity_tokens} tokens, {self.length} are taken and {tokens} more do not "
                "fit; make the cache larger or the prompt shorter"
            )

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put down a layer's new keys and values [B, T, G, K]."""
        end = self.length + keys.shape[1]
        self.keys[layer, :, self.length : end] = keys
        self.values[layer, :, self.length : end] = values

    def read(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values so far, those of the ``tokens`` new ones included: [B, length + tokens, G, K]."""
        end = self.length + tokens
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the ``tokens`` next positions, [B, tokens, K] each; see ``model/rotary.py``."""
        new = slice(self.length, self.length + tokens)
        return self._cos[:, new], self._sin[:, new]

    def append_documents(self, documents: Tensor) -> Tensor:
        """Note the new tokens' documents [B, T]; return those of all keys so far [B, length + T]."""
        if self.length and not self.has_documents:
            raise ValueError("the cache was started without documents, so new tokens cannot have any")
        self.has_documents = True
        end = self.length + documents.shape[1]
        self.documents[:, self.length : end] = documents
        return self.documents[:, :end]

    def repeat(self, other: KVCache, times: Tensor) -> None:
        """Begin, empty so far, with all that ``other`` holds, each of its rows as often as ``times`` [its B] says."""
        self.length = other.length
        for held, own in ((other.keys, self.keys), (other.values, self.values)):
            own[:, :, : self.length] = held[:, :, : self.length].repeat_interleave(times, dim=1)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` as seen, once every layer has written them."""
        self.length += tokens
