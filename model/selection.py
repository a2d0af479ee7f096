"""Routed execution: which tokens of a [B, T] grid a site executes, and how they get there and back.

Everything downstream of a routing decision works on a :class:`Selection`: ``gather`` takes the executed tokens out of
the grid, ``add`` puts their results back, and ``pad``/``unpad`` give attention the rectangle it wants. A selection of
everything makes each of these a reshape, so dense layers, the masking reference and routed layers are one code path.

    mask      1 0 1 1        index   0 2 3 | 4 6         (flat positions of the executed tokens, N = 5)
              1 0 1 0        slots   0 1 2 | 3 4         (their place in a [B, C] rectangle, C = 3: the longest row)

An empty selection still runs every module, on zero rows: under ZeRO each rank must call the same modules in the same
order and produce a gradient (of zeros) for each parameter, whatever its tokens chose.

Dimension letters: B batch, T tokens, N executed tokens, C columns of the padded rectangle, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The executed tokens. Build one with :meth:`everything` or :meth:`of`.

    Attributes:
        batch: B.
        columns: C, the padded rectangle's width; T for everything.
        index: int64 [N], flat positions in the grid in rising order; None for everything.
        slots: int64 [N], flat places in the padded rectangle; None for everything.
        queries: int64 [B, C], column in the grid of every place of the rectangle, 0 where padded; None for everything.
    """

    batch: int
    columns: int
    index: Tensor | None = None
    slots: Tensor | None = None
    queries: Tensor | None = None

    @staticmethod
    def everything(batch: int, tokens: int) -> Selection:
        """All B x T tokens."""
        return Selection(batch, tokens)

    @staticmethod
    def of(mask: Tensor) -> Selection:
        """The tokens where the bool ``mask`` [B, T] is set. Reads the counts on the host."""
        batch, tokens = mask.shape
        index = mask.flatten().nonzero().squeeze(-1)
        rank = mask.cumsum(dim=1) - 1  # place within its row
        columns = max(int(rank[:, -1].max()) + 1, 1)
        slots = (rank + columns * torch.arange(batch, device=mask.device)[:, None]).flatten()[index]
        queries = torch.zeros(batch * columns, dtype=torch.int64, device=mask.device)
        queries[slots] = index % tokens
        return Selection(batch, columns, index, slots, queries.view(batch, columns))

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """``x`` [B, T, D] with ``update`` [N, D] added at the selected tokens; a new tensor."""
        if self.index is None:
            return x + update.view_as(x)
        return x.flatten(0, 1).index_add(0, self.index, update).view_as(x)

    def pad(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [B, C, ...], zeros in the empty places."""
        if self.slots is None:
            return rows.unflatten(0, (self.batch, self.columns))
        rectangle = rows.new_zeros(self.batch * self.columns, *rows.shape[1:])
        return rectangle.index_copy(0, self.slots, rows).unflatten(0, (self.batch, self.columns))

    def unpad(self, rectangle: Tensor) -> Tensor:
        """[B, C, ...] -> [N, ...], the inverse of :meth:`pad`."""
        flat = rectangle.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)
