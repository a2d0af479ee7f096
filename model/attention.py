"""Grouped-query attention in which only some tokens ask and every token answers.

Keys and values are computed for all tokens of the sequence; queries, the attention itself and the output projection
only for the executed ones. A query sees every key at or before its own position, of its own document where attention
is confined:

    keys      0 1 2 3 4        documents a a b b b,  executed queries 1 3 4
    query 1   x x . . .
    query 3   . . x x .
    query 4   . . x x x

Dimension letters: B batch, T new tokens, S keys (T and the cached ones), N executed tokens, C columns of the padded
queries, H query heads, G key/value heads, K head width, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.norm import RMSNorm
from model.rotary import rotate
from model.selection import Selection


class Visibility:
    """Which keys each query sees, built once per forward pass and shared by all layers.

    Args:
        tokens: T.
        past: tokens in the KV cache before these.
        documents: int64 [B, past + T], the document of every key, or None where there is only one.
        device: where masks are built.
    """

    def __init__(self, tokens: int, past: int, documents: Tensor | None, device: torch.device):
        self.tokens, self.past, self.documents = tokens, past, documents
        self._mask: Tensor | None = None
        self._keys = torch.arange(past + tokens, device=device)

    @property
    def plain_causal(self) -> bool:
        """True where SDPA's own causal flag says it all."""
        return self.past == 0 and self.documents is None

    @property
    def mask(self) -> Tensor:
        """bool [B or 1, T, S], True where the query sees the key."""
        if self._mask is None:
            queries = self._keys[self.past :]
            mask = (self._keys[None, :] <= queries[:, None])[None]
            if self.documents is not None:
                mask = mask & (self.documents[:, self.past :, None] == self.documents[:, None, :])
            self._mask = mask
        return self._mask

    def mask_of(self, selection: Selection) -> Tensor:
        """bool [B, C, S]: the rows of the selected queries; padded places get the row of query 0."""
        if selection.queries is None:
            return self.mask
        if self.documents is None:
            return self._keys <= (selection.queries + self.past)[..., None]
        return self.mask.take_along_dim(selection.queries[..., None], dim=1)

    def counts(self) -> Tensor:
        """Number of keys each query sees, int64 [B or 1, T]."""
        if self.documents is None:
            return (self._keys[self.past :] + 1)[None]
        return self.mask.sum(-1)


class Attention(nn.Module):
    """Projections and SDPA; weights are laid out as Hugging Face's Llama has them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, k = config.width, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, k
        self.q_proj = nn.Linear(d, config.heads * k, bias=False)
        self.k_proj = nn.Linear(d, config.kv_heads * k, bias=False)
        self.v_proj = nn.Linear(d, config.kv_heads * k, bias=False)
        self.o_proj = nn.Linear(config.heads * k, d, bias=False)
        self.q_norm = RMSNorm(k, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(k, config.norm_epsilon) if config.qk_norm else None

    def keys_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normed input [B, T, D] and rotation [B or 1, T, K] -> keys and values [B, G, T, K]."""
        keys = self.k_proj(h).unflatten(-1, (self.kv_heads, self.head_dim))
        values = self.v_proj(h).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        return rotate(keys, cos, sin).transpose(1, 2), values.transpose(1, 2)

    def forward(
        self,
        h: Tensor,
        keys: Tensor,
        values: Tensor,
        cos: Tensor,
        sin: Tensor,
        selection: Selection,
        visibility: Visibility,
    ) -> Tensor:
        """Attend from the executed tokens.

        Args:
            h: normed inputs of the executed tokens, [N, D].
            keys, values: [B, G, S, K].
            cos, sin: rotation of the executed tokens, [N, K].

        Returns:
            [N, D].
        """
        queries = self.q_proj(h).unflatten(-1, (self.heads, self.head_dim))
        if self.q_norm is not None:
            queries = self.q_norm(queries)
        queries = selection.pad(rotate(queries, cos, sin)).transpose(1, 2)  # [B, H, C, K]
        grouped = self.heads != self.kv_heads
        if selection.queries is None and visibility.plain_causal:
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
        else:
            mask = visibility.mask_of(selection)[:, None]
            if grouped and not queries.is_cpu:
                # No fused CUDA kernel takes a mask together with grouped heads; the plain one would hold [B, H, C, S].
                keys, values = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (keys, values))
                grouped = False
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(selection.unpad(out.transpose(1, 2)).flatten(1))
