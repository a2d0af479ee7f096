"""Attention of gathered queries over all keys, with a kernel that depends on the device.

    training, prefill   CPU   scaled_dot_product_attention, block of queries by block of queries
                        CUDA  FlexAttention on the flat grid (model/flex.py)
    one new token       both  scaled_dot_product_attention over the KV cache

A selection is sorted, so the queries of a block are neighbours in the sequence, and a block only gets the keys from the
first to the last that any of its queries sees. That halves the work of a causal pass; PyTorch's CPU kernel does not do
so by itself for windows of up to 512 tokens, with or without its causal flag (LOG.md).

Dimension letters: B batch, T new tokens, S keys (T and the cached ones), N selected tokens, C columns of the
selection's rectangle, H query heads, G key/value heads, R = H / G, K head width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.flex import flex_attend
from model.selection import Selection
from model.visibility import Visibility, mask

# Smaller blocks skip more invisible keys, but need more kernel launches; and the backward pass holds the gradients of
# each block's keys until all blocks have theirs.
_BLOCK_QUERIES_MIN, _BLOCKS_MAX = 64, 8

# In decoding on the CPU, a separate call for some rows of the cache costs about as much as reading this many more keys
# in one call: an estimate from single calls on one thread.
_CALL_KEYS = 256


def attend(queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, visibility: Visibility) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(K).

    Args:
        queries: of the selected tokens, [N, H, K].
        keys, values: of all tokens, [B, S, G, K].
        selection: the tokens of the [B, T] grid that have queries.
        visibility: which keys each of them sees.

    Returns:
        [N, H, K].
    """
    if selection.tokens == 1:
        return _attend_one(queries, keys, values, selection, visibility)
    if queries.is_cuda:
        return flex_attend(queries, keys, values, selection, visibility)
    return attend_by_blocks(queries, keys, values, selection, visibility)


@torch.compiler.disable
def attend_by_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, visibility: Visibility
) -> Tensor:
    """:func:`attend` on the selection's rectangle with ``scaled_dot_product_attention``."""
    batch = selection.batch
    if selection.index is None:
        rectangle, columns = None, torch.arange(selection.tokens, device=queries.device)[None]
        columns = columns if visibility.first is None else columns.expand(batch, -1)
        q = queries.unflatten(0, (batch, selection.tokens))
    else:
        rectangle = selection.rectangle
        columns = rectangle.columns
        q = rectangle.pad(queries)
    first, last = visibility.bounds(columns)
    edges, seen = _blocks(first, last)
    blocks = zip(
        q.split([e - s for s, e in pairwise(edges)], dim=1), _Runs.apply(keys, seen), _Runs.apply(values, seen),
        pairwise(edges), seen, strict=True,
    )  # fmt: skip
    outs = []
    for q, k, v, (begin, end), (lowest, highest) in blocks:
        m = mask(None if first is None else first[:, begin:end], last[:, begin:end], lowest, highest)[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H or G, columns or keys of the block, K]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2))
    out = torch.cat(outs, dim=1)  # [B, C, H, K]
    return out.flatten(0, 1) if rectangle is None else rectangle.unpad(out)


def _blocks(first: Tensor | None, last: Tensor) -> tuple[list[int], list[tuple[int, int]]]:
    """Edges of the blocks of columns, and the keys that each block's queries see, as half-open ranges.

    ``first`` and ``last`` are [B or 1, C]; a short last block is merged into the one before.
    """
    columns = last.shape[1]
    block = max(_BLOCK_QUERIES_MIN, -(-columns // _BLOCKS_MAX))
    edges = [*range(0, max(columns - block // 4, 1), block), columns]
    ends = (last[:, [e - 1 for e in edges[1:]]].amax(0) + 1).tolist()
    starts = [0] * len(ends) if first is None else first[:, edges[:-1]].amin(0).tolist()
    return edges, list(zip(starts, ends, strict=True))


class _Runs(torch.autograd.Function):
    """Overlapping runs of x [B, S, ...]; their gradients are summed into one tensor, not one per run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.runs, ctx.shape = runs, x.shape
        return tuple(x[:, start:end] for start, end in runs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape, dtype=torch.float32)
        for (start, end), grad in zip(ctx.runs, grads, strict=True):
            total[:, start:end] += grad
        return total.to(grads[0].dtype), None


def _attend_one(queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, visibility: Visibility) -> Tensor:
    """:func:`attend` where every row has one new token, the last of its keys; a group's R heads are R queries."""
    groups = keys.shape[2]
    q = queries.unflatten(1, (groups, -1))  # [N, G, R, K]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)  # [B, G, S, K]
    m = None
    if visibility.first is not None:
        m = mask(visibility.first, visibility.last, 0, visibility.keys)[:, None]  # [B, 1, 1, S]
    if selection.index is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m).flatten(1, 2)
    # The cache is read in place: copying the rows that execute would cost more than skipping the others saves.
    every = q.new_zeros(selection.batch, *q.shape[1:]).index_copy(0, selection.index, q)
    pieces, end = [], 0
    for rows in _runs_of_rows(selection.index, selection.batch, visibility.keys):
        attended = F.scaled_dot_product_attention(every[rows], k[rows], v[rows], None if m is None else m[rows])
        pieces += [every[end : rows.start], attended]  # rows in between are dropped below
        end = rows.stop
    return torch.cat([*pieces, every[end:]]).index_select(0, selection.index).flatten(1, 2)


def _runs_of_rows(index: Tensor, batch: int, keys: int) -> list[slice]:
    """Slices of the batch that hold all rows in ``index``, int64 [N], ascending, and few others."""
    if not index.is_cpu:
        return [slice(0, batch)]  # one shape whichever rows execute, and no sync with the host
    runs: list[slice] = []
    for row in index.tolist():
        if runs and (row - runs[-1].stop) * keys <= _CALL_KEYS:
            runs[-1] = slice(runs[-1].start, row + 1)
        else:
            runs.append(slice(row, row + 1))
    return runs
