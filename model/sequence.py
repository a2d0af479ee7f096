"""Sequence parallelism: a window that several ranks share, and what they tell each other.

The P ranks of a group cut every window into 2 P stretches, and rank p has two of them, the p-th from either end:

    16 tokens, P = 2    0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15
    rank                   0         1          1             0

A query sees the keys before it, so the first stretch has the least work and the last one the most; in these pairs all
ranks have the same (Llama 3, arXiv:2407.21783, section 3.3.2: context parallelism by an all-gather of keys and values).
Norms, routers, feed-forwards and the head work on a rank's own tokens. Keys and values, which with grouped queries are
small, are gathered over the group; then each rank's executed queries, however many, attend with the bounds that they
have anyway. No numbers of queries have to be equal, so a routed model needs nothing else.

To the data-parallel ranks beneath, ZeRO's, every rank is one of its own: gradients are sums over the tokens of all of
them, and a group's are some of these tokens.

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
        place: this rank's number among them, p.
        size: how many they are, P.
        group: they.
    """

    def __init__(self, place: int, size: int, group: dist.ProcessGroup):
        self.place, self.size, self.group = place, size, group

    def places(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Where this rank's ``tokens`` are in the window: int64 [T], rising."""
        return places_of(self.place, self.size, tokens * self.size, device)

    def own(self, x: Tensor) -> Tensor:
        """This rank's part, [B, T, ...], of what all have of the whole window, [B, S, ...]; S is a multiple of 2 P."""
        return _part(x.chunk(2 * self.size, dim=1), self.place)

    def whole(self, x: Tensor) -> Tensor:
        """[B, T, ...] of every rank -> [B, S, ...], the whole window's, without a gradient."""
        x = x.contiguous()
        parts = x.new_empty((self.size, *x.shape))
        dist.all_gather_into_tensor(parts.view(-1), x.view(-1), group=self.group)
        early, late = parts.chunk(2, dim=2)
        return torch.cat([*early, *[*late][::-1]], dim=1)

    @torch.compiler.disable
    def keys_values(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of this rank's tokens, [B, T, G, K] each -> of the whole window's, [B, S, G, K] each."""
        gathered: Tensor = _Gather.apply(torch.cat((keys, values)), self)  # one collective; both contiguous behind it
        keys, values = gathered.chunk(2)
        return keys, values


class _Gather(torch.autograd.Function):
    """:meth:`SequenceGroup.whole`; backward, every rank gets the sum of what the group's ranks found for its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: SequenceGroup) -> Tensor:
        ctx.sequence = sequence
        return sequence.whole(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sequence: SequenceGroup = ctx.sequence
        stretches = grad.chunk(2 * sequence.size, dim=1)
        parts = torch.stack([_part(stretches, place) for place in range(sequence.size)])
        found = torch.empty_like(parts)
        # Not a reduce-scatter: the same bytes, and the sum is in fp32 and in the order of the ranks.
        dist.all_to_all_single(found, parts, group=sequence.group)
        return found.sum(0, dtype=torch.float32).to(grad.dtype), None


def places_of(place: int, size: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """Where the tokens of the rank at ``place`` of ``size`` are in a window of ``window``: int64 [T], rising."""
    return _part(torch.arange(window, device=device)[None].chunk(2 * size, dim=1), place)[0]


def _part(stretches: tuple[Tensor, ...] | list[Tensor], place: int) -> Tensor:
    """[B, T, ...], what the rank at ``place`` has of all 2 P stretches of a window."""
    return torch.cat((stretches[place], stretches[-1 - place]), dim=1)
