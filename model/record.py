"""Counts of what the routed sites did in one forward pass; computed only when read.

Dimension letters: B batch, T tokens, S routed sites.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from model.block import Decision
from model.visibility import Visibility


class RoutingRecord:
    """Counts of a forward pass.

    Args:
        decisions: of the S sites, in order.
        visibility: which keys each token sees.
        batch: B.
    """

    def __init__(self, decisions: list[Decision], visibility: Visibility, batch: int):
        self._decisions, self._visibility, self._batch = decisions, visibility, batch

    @cached_property
    def density(self) -> Tensor:
        """fp32 [S], each site's mean gate value, with the straight-through gradient to its router."""
        if not self._decisions:
            return torch.zeros(0, device=self._keys.device)
        return torch.stack([decision.gate.value for decision in self._decisions]).mean((1, 2))

    @cached_property
    def executed(self) -> Tensor:
        """bool [S, B, T], the tokens that executed."""
        if not self._decisions:
            return self._keys.new_zeros((0, *self._keys.shape), dtype=torch.bool)
        return torch.stack([decision.executed for decision in self._decisions])

    @cached_property
    def executed_tokens(self) -> Tensor:
        """int64 [S], tokens that executed."""
        return self.executed.sum((1, 2))

    @cached_property
    def explored_tokens(self) -> Tensor:
        """int64 [S], skipped tokens whose gates learned from what the site would have added."""
        return self._explored.sum((1, 2))

    @cached_property
    def explored_keys(self) -> Tensor:
        """int64 [S], keys that the explored tokens saw, summed over them."""
        return (self._explored * self._keys).sum((1, 2))

    @cached_property
    def overflow_tokens(self) -> Tensor:
        """int64 [S], tokens whose gate said execute and for which the capacity had no room."""
        if all(decision.kept is None for decision in self._decisions):
            return torch.zeros_like(self.executed_tokens)
        wanted = torch.stack([decision.gate.executed for decision in self._decisions])
        return wanted.sum((1, 2)) - self.executed_tokens

    @cached_property
    def margin_sums(self) -> Tensor:
        """fp64 [2, S], sums over the tokens of the margins that thresholds follow in training, and of their squares."""
        margins = [d.gate.noisy_margin for d in self._decisions if d.gate.noisy_margin is not None]
        if not margins:
            return torch.zeros((2, len(self._decisions)), dtype=torch.float64, device=self._keys.device)
        wide = torch.stack(margins).double()
        return torch.stack((wide.sum((1, 2)), wide.square().sum((1, 2))))

    @cached_property
    def input_sums(self) -> Tensor:
        """fp32 [S, D], sums over the tokens of what routers read; empty unless thresholds follow their margins."""
        sums = [d.gate.input_sum for d in self._decisions if d.gate.input_sum is not None]
        return torch.stack(sums) if sums else torch.zeros((0, 0), device=self._keys.device)

    @cached_property
    def attended_keys(self) -> Tensor:
        """int64 [S], keys that the executed tokens saw, summed over them."""
        return (self.executed * self._keys).sum((1, 2))

    @cached_property
    def visible_keys(self) -> Tensor:
        """int64 scalar, keys that all B x T tokens see in a layer without a router."""
        return self._keys.sum()

    @cached_property
    def margins(self) -> Tensor | None:
        """fp32 [S, B, T], execute logit minus skip logit; None except for learned routers in evaluation mode."""
        margins = [d.gate.margin for d in self._decisions if d.gate.margin is not None]
        return torch.stack(margins) if margins else None

    @cached_property
    def _explored(self) -> Tensor:
        """bool [S, B, T]."""
        if all(decision.gate.explored is None for decision in self._decisions):
            return torch.zeros_like(self.executed)
        none = torch.zeros_like(self.executed[0])
        return torch.stack([none if d.gate.explored is None else d.gate.explored for d in self._decisions])

    @cached_property
    def _keys(self) -> Tensor:
        """Number of keys that each token sees, int64 [B, T]."""
        return self._visibility.counts().expand(self._batch, -1)
