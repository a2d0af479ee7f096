"""Sequence parallelism: windows that several ranks share, and what they exchange.

The P ranks of a group cut every window into 2 P stretches, and rank p has two of them, the p-th from either end:

    16 tokens, P = 2    0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15
    rank                   0         1          1             0

A query sees the keys before it, so the first stretch has the least work and the last one the most; these pairs give all
ranks equal work (Llama 3, arXiv:2407.21783, section 3.3.2: context parallelism by an all-gather of keys and values).
Norms, routers, feed-forwards and the head work on a rank's own tokens. Keys and values, which with grouped queries are
small, are gathered over the group; then each rank's executed queries, however many, attend with the bounds that they
have anyway. Ranks may have different numbers of queries, so a routed model needs nothing else.

For ZeRO every rank is an ordinary data-parallel rank: gradients are summed over the tokens of all ranks, and the ranks
of a group hold different tokens of one window.

Dimension letters: B batch, S tokens of a window, T = S / P tokens of a rank, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceGroup:
    """The ranks that share a window with this one.

    Args:
        rank: this rank's number in the group, p.
        size: number of ranks in the group, P.
        group: the process group.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup):
        self.rank, self.size, self.group = rank, size, group

    def positions(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Where this rank's ``tokens`` are in the window: int64 [T], ascending."""
        return positions_of(self.rank, self.size, tokens * self.size, device)

    def local_part(self, x: Tensor) -> Tensor:
        """This rank's part, [B, T, ...], of a tensor of the whole window, [B, S, ...]; S is a multiple of 2 P."""
        return _part(x.chunk(2 * self.size, dim=1), self.rank)

    def all_gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] of every rank -> [B, S, ...], the whole window's, without a gradient."""
        parts, work = self.all_gather_async(x)
        work.wait()
        return _in_order(parts)

    def all_gather_async(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """[B, T, ...] of every rank -> [P, B, T, ...], which is valid once the work has been waited for."""
        x = x.contiguous()
        parts = x.new_empty((self.size, *x.shape))
        return parts, dist.all_gather_into_tensor(parts.view(-1), x.view(-1), group=self.group, async_op=True)

    def keys_values(self, keys: Tensor, values: Tensor) -> Gathered:
        """Start gathering the whole window's keys and values; this rank's are [B, T, G, K] each."""
        return Gathered(torch.cat((keys, values)), self)  # one collective; both contiguous after it


class Gathered:
    """Keys and values of a whole window, while the group gathers them; a call waits for them.

    Args:
        own: [2 B, T, G, K], this rank's, first keys, then values.
        sequence: the group.

    Both passes overlap the transfer with other work. Forward, between construction and the first call. Backward,
    autograd goes in reverse order: gradients are sent when attention has them, and waited for when the projections of
    keys and values need them, after those of queries and the router.
    """

    def __init__(self, own: Tensor, sequence: SequenceGroup):
        self._transfer = _Transfer(sequence)
        self._with_gradient = torch.is_grad_enabled()
        self._parts: Tensor | None = _Send.apply(own, self._transfer)
        self._arrived: tuple[Tensor, Tensor] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        """[B, S, G, K] each; with a gradient if enabled at construction, whatever the mode of the first call."""
        if self._arrived is None:
            parts, self._parts = self._parts, None  # freed: as large as the result
            with torch.set_grad_enabled(self._with_gradient):
                whole: Tensor = _Arrive.apply(parts, self._transfer)
                keys, values = whole.chunk(2)
            self._arrived = keys, values
        return self._arrived


class _Transfer:
    """A collective of ``sequence`` in flight."""

    def __init__(self, sequence: SequenceGroup):
        self.sequence = sequence
        self._work: dist.Work | None = None

    def begin(self, work: dist.Work) -> None:
        self._work = work

    def end(self) -> None:
        assert self._work is not None, "nothing was asked for"
        self._work.wait()
        self._work = None


class _Send(torch.autograd.Function):
    """[B, T, ...] -> [P, B, T, ...], every rank's, once the transfer has ended; backward, the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        parts, work = transfer.sequence.all_gather_async(x)
        transfer.begin(work)
        return parts

    @staticmethod
    def backward(ctx: Any, found: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.end()
        return found.sum(0, dtype=torch.float32).to(found.dtype), None


class _Arrive(torch.autograd.Function):
    """[P, B, T, ...] of the ranks -> [B, S, ...]; backward, every rank gets the others' gradients of its part."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.end()
        return _in_order(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer: _Transfer = ctx.transfer
        size = transfer.sequence.size
        stretches = grad.chunk(2 * size, dim=1)
        parts = torch.stack([_part(stretches, rank) for rank in range(size)])
        found = torch.empty_like(parts)
        # Not a reduce-scatter: the same bytes, and the sum is in fp32 and in the order of the ranks.
        transfer.begin(dist.all_to_all_single(found, parts, group=transfer.sequence.group, async_op=True))
        return found, None


def positions_of(rank: int, size: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """Where the tokens of rank ``rank`` of ``size`` are in a window of ``window``: int64 [T], ascending."""
    return _part(torch.arange(window, device=device)[None].chunk(2 * size, dim=1), rank)[0]


def _part(stretches: tuple[Tensor, ...] | list[Tensor], rank: int) -> Tensor:
    """[B, T, ...], what rank ``rank`` has of all 2 P stretches of a window."""
    return torch.cat((stretches[rank], stretches[-1 - rank]), dim=1)


def _in_order(parts: Tensor) -> Tensor:
    """[P, B, T, ...], what each rank has -> the whole window, [B, S, ...]."""
    early, late = parts.chunk(2, dim=2)
    return torch.cat([*early, *[*late][::-1]], dim=1)
