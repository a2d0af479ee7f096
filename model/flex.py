"""FlexAttention over gathered queries, on the flat grid: one sequence of the keys of all rows, B x S.

A query sees the keys from the first of its document to itself. On the flat grid (key s of row b is b S + s) both
bounds rise with the query, because a selection is sorted. So which blocks of keys a block of queries needs follows
from the bounds alone: no mask over pairs, no evaluation of the mask function over all blocks, no padded rectangle.

    a block of queries that see the keys 70 to 400, 70 to 410, ..., 130 to 500; blocks of 128 keys:

    keys       0..127   128..255   256..383   384..511
    needed       x         x          x          x         some query sees some of it
    full         .         .          x          .         every query sees all of it: needs no masking

Dimension letters: B batch, T tokens, S keys, N selected tokens, Q and M blocks of queries and keys, H query heads, G
key/value heads, K head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.compilation import raise_recompile_limit
from model.selection import Selection
from model.visibility import Visibility

BLOCK = 128  # queries and keys of a block: what FlexAttention's kernels are tuned for


@torch.compiler.disable(recursive=False)
def flex_attend(queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, visibility: Visibility) -> Tensor:
    """:func:`model.attend.attend` by FlexAttention; same arguments and result."""
    q, k, v = (x.transpose(0, 1)[None] for x in (queries, keys.flatten(0, 1), values.flatten(0, 1)))
    blocks = visibility.dense_blocks if selection.index is None else None
    if blocks is None:
        blocks = block_mask(*flat_bounds(selection, visibility), keys=k.shape[2])
    if selection.index is None:
        visibility.dense_blocks = blocks
    # Without the option, torch 2.13 picks a decoding kernel for fewer than 128 queries, which finds no valid tiling
    # where the number of query heads per key head is a power of two.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    grouped = q.shape[1] != k.shape[1]
    out = _kernel()(q, k, v, block_mask=blocks, enable_gqa=grouped, kernel_options=options)  # [1, H, N, K]
    return out[0].transpose(0, 1)


@torch.compiler.disable
def flat_bounds(selection: Selection, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """First and last visible key of every selected token on the flat grid, int64 [N] each, both ascending."""
    batch, tokens, keys = selection.batch, selection.tokens, visibility.keys
    begins = torch.arange(0, batch * keys, keys, device=visibility.last.device)[:, None]
    last = begins + visibility.last
    first = (begins.expand(-1, tokens) if visibility.first is None else begins + visibility.first).contiguous()
    return selection.gather(first), selection.gather(last)


@torch.compiler.disable
def block_mask(first: Tensor, last: Tensor, keys: int) -> BlockMask:
    """The block mask of queries that see the keys ``first`` to ``last`` (int64 [N], both ascending) of ``keys``."""
    needed, full = needed_blocks(first, last, keys)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[query] <= key) & (key <= last[query])

    return BlockMask.from_kv_blocks(
        *_listed(needed & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(len(first), keys),
    )


def needed_blocks(first: Tensor, last: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Which blocks of keys any query of a block sees, and which all its queries see entirely: bool [Q, M] each."""
    queries = len(first)
    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
    block = torch.arange(queries, device=first.device) // BLOCK
    # +1 where a query's run of key blocks begins, -1 after its end: the running sum counts the runs over a block.
    edges = torch.zeros(rows * (columns + 1), dtype=torch.int32, device=first.device)
    one = edges.new_ones(()).expand(queries)
    edges = edges.index_add(0, block * (columns + 1) + first // BLOCK, one)
    edges = edges.index_add(0, block * (columns + 1) + last // BLOCK + 1, -one)
    needed = edges.view(rows, columns + 1).cumsum(dim=1)[:, :columns] > 0
    # Bounds rise: a block's largest first is its last query's, its smallest last its first query's.
    ends = (torch.arange(1, rows + 1, device=first.device) * BLOCK).clamp(max=queries) - 1
    largest_first, smallest_last = first[ends], last[::BLOCK]
    begin = torch.arange(0, columns * BLOCK, BLOCK, device=first.device)
    full = (begin >= largest_first[:, None]) & (begin + BLOCK - 1 <= smallest_last[:, None])
    return needed, full


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, M] -> the number of set blocks of each row [1, 1, Q], and their columns, set ones first [1, 1, Q, M]."""
    count = blocks.sum(dim=1, dtype=torch.int32)
    order = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], order[None, None]


@cache
def _kernel() -> Any:
    """FlexAttention compiled, once for all shapes: uncompiled it would materialise all pairs of queries and keys."""
    raise_recompile_limit()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
