"""Which keys a query sees: a run of them, from the first key of its document to its own position.

    keys        0 1 2 3 4        documents a a b b b
    query 1     x x . . .        first 0, last 1
    query 3     . . x x .        first 2, last 3
    query 4     . . x x x        first 2, last 4

Two numbers per query are enough, so no mask over pairs is ever kept: a mask is made where a kernel needs one, for the
queries and keys that it is about to process.

Dimension letters: B batch, T new tokens, S keys (of these, of cached tokens and of those on other ranks), C queries of
a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


class Visibility:
    """First and last visible key of every query of a forward pass; shared by all layers.

    Args:
        places: int64 [T], each new token's index among the keys, ascending: the last key that it sees.
        keys: S.
        documents: int64 [B, S], a number for every key that is equal within a document and differs from its
            neighbours'; None where there is only one document.

    Attributes:
        last: int64 [T], the last key that each query sees: its own index among the keys.
        first: int64 [B, T], the first one; None where that is key 0 for all.
        keys: S.
        dense_blocks: FlexAttention's block mask for all tokens as queries, once it has been built.
    """

    def __init__(self, places: Tensor, keys: int, documents: Tensor | None):
        self.last, self.keys = places, keys
        self.dense_blocks: BlockMask | None = None
        self.first = None if documents is None else _starts(documents)[:, places]

    def bounds(self, queries: Tensor) -> tuple[Tensor | None, Tensor]:
        """First (None: 0) and last visible keys of ``queries``, columns of the grid, int64 [B, C]: both [B, C]."""
        last = self.last[queries]
        return (None if self.first is None else self.first.gather(1, queries)), last

    def counts(self) -> Tensor:
        """Number of keys each query sees, int64 [B or 1, T]."""
        counts = (self.last + 1)[None]
        return counts if self.first is None else counts - self.first


def mask(first: Tensor | None, last: Tensor, start: int, end: int) -> Tensor:
    """bool [B, C, end - start]: which of the keys from ``start`` up to ``end`` lie within ``first`` to ``last``."""
    keys = torch.arange(start, end, device=last.device)
    seen = keys <= last[..., None]
    return seen if first is None else seen & (keys >= first[..., None])


def _starts(documents: Tensor) -> Tensor:
    """The first key of every key's document, int64 [B, S]."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(begins, places, 0).cummax(dim=1).values
