"""Routed execution: which tokens of a [B, T] grid a site executes, and how they get there and back.

Everything downstream of a routing decision works on a :class:`Selection`: ``gather`` takes the executed tokens out of
the grid and ``add`` puts their results back. A selection of everything makes both a reshape, so dense layers, the
masking reference and routed layers are one code path.

    mask      1 0 1 1        index    0 2 3 | 4 6        flat positions of the executed tokens, N = 5
              1 0 1 0        columns  0 2 3 | 0 2 3      the same as a rectangle for attention kernels that want one:
                             slots    0 1 2 | 3 4        C = 3, the longest row; short rows are padded at the end

Two ways to choose, same results where nothing overflows:

    of       as many tokens as the mask holds, rounded up to a multiple. Nothing is dropped; the host waits to learn
             the count, and shapes differ from step to step.
    capped   a fixed number per row, filled first come first served along the row, which is causal. Static shapes and no
             wait; executed tokens beyond the capacity are dropped.

Both may add **fillers**, tokens that should be skipped, to reach the number. Their gate is 0, so what is computed for
them is multiplied by 0, or dropped where there is no gradient. Executed compute is counted over the tokens that routers
selected and that were computed, without fillers, which save time and whose results are not used.

An empty selection still runs every module, on zero rows: under ZeRO each rank must call the same modules in the same
order and produce a gradient (of zeros) for each parameter, whatever its tokens chose.

Dimension letters: B batch, T tokens, N selected tokens, C columns of the rectangle, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from model.linear import rows_for_one

# Shapes that differ by a few rows cost a GPU new kernel choices and memory blocks; the CPU takes any number of rows.
_ROUND_TO = {"cpu": 1, "other": 128, "one": 8}


@dataclass(frozen=True)
class Rectangle:
    """Selected tokens row by row, the short rows padded.

    Attributes:
        columns: int64 [B, C], grid column of every slot, ascending along a row; padding has the last column, T - 1.
        slots: int64 [N], flat place in the rectangle of every selected token; None where there is no padding.
    """

    columns: Tensor
    slots: Tensor | None

    def pad(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [B, C, ...], zeros in the padding."""
        if self.slots is None:
            return rows.unflatten(0, self.columns.shape)
        rectangle = rows.new_zeros(self.columns.numel(), *rows.shape[1:])
        return _AddRows.apply(rectangle, self.slots, rows).unflatten(0, self.columns.shape)

    def unpad(self, rectangle: Tensor) -> Tensor:
        """[B, C, ...] -> [N, ...], the inverse of :meth:`pad`."""
        flat = rectangle.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


@dataclass(frozen=True)
class Selection:
    """The tokens to compute. Build one with :meth:`everything`, :meth:`of` or :meth:`capped`.

    Attributes:
        batch: B.
        tokens: T.
        index: int64 [N], flat positions in the grid in ascending order; None for everything.
        exact: no fillers among them.
        row_tokens: selected tokens per row, where it is the same number for all.
        recomputed: what is gathered from is recomputed in the backward pass, and not kept until then.
    """

    batch: int
    tokens: int
    index: Tensor | None = None
    exact: bool = True
    row_tokens: int | None = None
    recomputed: bool = False

    @staticmethod
    def everything(batch: int, tokens: int, exact: bool = True) -> Selection:
        """All B x T tokens."""
        return Selection(batch, tokens, None, exact, tokens)

    @staticmethod
    def of(mask: Tensor, round_to: int | None = None) -> Selection:
        """The tokens where the bool ``mask`` [B, T] is set, and fillers up to a multiple of ``round_to``.

        Waits for the device to count them. Unless given, ``round_to`` is 1 on the CPU and 128 elsewhere, and 8 there
        for one token per row (T = 1). Zero tokens are rounded up too, except for T = 1, where zero skips the whole
        site.
        """
        return _counted(mask, round_to)

    @staticmethod
    def of_rows(rows: list[bool]) -> Selection:
        """The only token of each row for which ``rows`` [B] is true: :meth:`of` for decoding, decided on the host.

        Where all rows take as long as one (``model/linear.py``), all are computed if any executes; in a larger batch
        only those that execute. ``python -m bench.decode`` measures it.
        """
        chosen = [row for row, executed in enumerate(rows) if executed]
        if chosen and (len(chosen) == len(rows) or len(rows) <= rows_for_one()):
            return Selection(len(rows), 1, None, len(chosen) == len(rows), 1)
        return Selection(len(rows), 1, torch.tensor(chosen, dtype=torch.int64))

    @staticmethod
    def capped(mask: Tensor, capacity: int) -> tuple[Selection, Tensor]:
        """In every row the first ``capacity`` tokens of ``mask`` [B, T], and fillers where there are fewer.

        Returns the selection and the part of ``mask`` that is in it, bool [B, T].
        """
        batch, tokens = mask.shape
        capacity = min(capacity, tokens)
        if capacity == tokens:
            return Selection.everything(batch, tokens, exact=False), mask
        kept = mask & (mask.cumsum(dim=1) <= capacity)
        chosen = _fill(kept, capacity - kept.sum(dim=1, keepdim=True))
        index = _first(chosen.flatten(), batch * capacity)
        return Selection(batch, tokens, index, exact=False, row_tokens=capacity), kept

    @property
    def size(self) -> int:
        """N."""
        return self.batch * self.tokens if self.index is None else len(self.index)

    @cached_property
    def rectangle(self) -> Rectangle:
        """The selected tokens row by row; waits for the device where rows differ in length."""
        assert self.index is not None, "everything is a rectangle as it is"
        columns = self.index % self.tokens
        if self.row_tokens is not None:
            return Rectangle(columns.view(self.batch, self.row_tokens), None)
        row = self.index // self.tokens
        counts = torch.bincount(row, minlength=self.batch)
        width = max(int(counts.max()), 1)
        begins = counts.cumsum(0) - counts  # place of each row's first token among the selected
        moved = torch.arange(0, self.batch * width, width, device=row.device) - begins
        slots = torch.arange(len(row), device=row.device) + moved[row]
        filled = columns.new_full((self.batch * width,), self.tokens - 1)
        filled[slots] = columns
        return Rectangle(filled.view(self.batch, width), slots)

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def kept_as_index(self, rows: Tensor, x: Tensor) -> AbstractContextManager[object]:
        """A context in which autograd does not keep ``rows`` but gathers them again from ``x`` [B, T, D].

        For operations on the rows of an ``x`` that is kept anyway; it does nothing where ``x`` is recomputed.
        """
        index = None if self.recomputed else self.index
        if index is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nullcontext()
        flat, identity = x.detach().flatten(0, 1), id(rows)  # the hooks keep what they refer to in memory: not the rows

        def unpack(kept: Tensor | None) -> Tensor:
            return flat.index_select(0, index) if kept is None else kept

        return torch.autograd.graph.saved_tensors_hooks(lambda kept: None if id(kept) == identity else kept, unpack)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """``x`` [B, T, D] with ``update`` [N, D] added at the selected tokens; a new tensor."""
        if self.index is None:
            return x + update.view_as(x)
        return _AddRows.apply(x.flatten(0, 1), self.index, update).view_as(x)


class _AddRows(torch.autograd.Function):
    """``x.index_add(0, index, rows)``; PyTorch's own keeps ``rows``, which the backward pass does not need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.index_add(0, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (index,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, index)


@torch.compiler.disable
def _counted(mask: Tensor, round_to: int | None) -> Selection:
    """:meth:`Selection.of` by counting on the device."""
    batch, tokens = mask.shape
    flat = mask.flatten()
    if round_to is None:
        round_to = _ROUND_TO["cpu" if mask.is_cpu else "one" if tokens == 1 else "other"]
    index = flat.nonzero().squeeze(-1)
    count = len(index)
    size = -(-count // round_to) * round_to
    if size == 0 and min(tokens, round_to) > 1:
        size = round_to
    if size >= len(flat):
        return Selection.everything(batch, tokens, exact=count == len(flat))
    if size > count:
        index = _first(_fill(flat, size - count), size)
    return Selection(batch, tokens, index, exact=size == count)


def _fill(mask: Tensor, missing: Tensor | int) -> Tensor:
    """``mask`` [..., T] with the first ``missing`` unset entries of each row set as well."""
    unset = ~mask
    return mask | (unset & (unset.cumsum(dim=-1) <= missing))


def _first(mask: Tensor, size: int) -> Tensor:
    """Positions of the ``size`` set entries of the flat ``mask``, in ascending order, without counting them."""
    return torch.nonzero_static(mask, size=size).squeeze(-1)
