"""Grouped-query attention: queries of the selected tokens only, keys and values of all tokens.

Keys and values are computed for all tokens of the sequence; queries, the attention itself and the output projection
only for the executed ones. A query sees every key at or before its own position, only those of its own document where
attention is confined to documents:

    keys      0 1 2 3 4        documents a a b b b,  executed queries 1 3 4
    query 1   x x . . .
    query 3   . . x x .
    query 4   . . x x x

Dimension letters: B batch, T new tokens, S keys (T and the cached ones), N selected tokens, H query heads, G key/value
heads, K head width, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.attend import attend
from model.cache import KeysValues
from model.config import ModelConfig
from model.linear import Linear
from model.norm import RMSNorm
from model.rotary import rotate
from model.selection import Selection
from model.visibility import Visibility


class Attention(nn.Module):
    """Projections around :func:`model.attend.attend`; weights have the layout of Hugging Face's Llama."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, k = config.width, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, k
        self.q_proj = Linear(d, config.heads * k)
        self.k_proj = Linear(d, config.kv_heads * k)
        self.v_proj = Linear(d, config.kv_heads * k)
        self.o_proj = Linear(config.heads * k, d)
        self.q_norm = RMSNorm(k, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(k, config.norm_epsilon) if config.qk_norm else None

    def keys_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normed input [B, T, D] and rotation [B, T, K] -> keys and values [B, T, G, K]."""
        keys = self.k_proj(h).unflatten(-1, (self.kv_heads, self.head_dim))
        values = self.v_proj(h).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        return rotate(keys, cos, sin), values

    def forward(
        self,
        h: Tensor,
        keys_values: KeysValues,
        cos: Tensor,
        sin: Tensor,
        selection: Selection,
        visibility: Visibility,
    ) -> Tensor:
        """Attend from the selected tokens.

        Args:
            h: normed inputs of all tokens, [B, T, D].
            keys_values: of all tokens.
            cos, sin: rotation of the selected tokens, [N, K].
            selection: which tokens of the grid they are.
            visibility: which keys each of them sees.

        Returns:
            [N, D].
        """
        rows = selection.gather(h)
        with selection.kept_as_index(rows, h):
            queries = self.q_proj(rows)
        queries = queries.unflatten(-1, (self.heads, self.head_dim))
        if self.q_norm is not None:
            queries = self.q_norm(queries)
        out = attend(rotate(queries, cos, sin), *keys_values(), selection, visibility)
        return self.o_proj(out.flatten(1))
