"""Do two runs of one model route the same tokens alike? Rounding may tip a router over where its two logits tie.

Dimension letters: B batch, T tokens, S routed sites.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.record import RoutingRecord

TIE = 1e-4
"""Largest distance of a margin from its threshold that rounding may cross, as a share of the site's largest margin."""


class Decisions(NamedTuple):
    """What was decided in one run.

    Attributes:
        executed: bool [S, B, T].
        ties: decisions that rounding may turn, bool [S, B, T]; none of routers without logits.
    """

    executed: Tensor
    ties: Tensor

    @staticmethod
    def of(routing: RoutingRecord, thresholds: Tensor | None) -> Decisions:
        """Of a run in evaluation mode, by the ``thresholds`` [S] of its decoder; 0 unless given."""
        margins = routing.margins
        if margins is None:
            return Decisions(routing.executed, torch.zeros_like(routing.executed))
        distances = margins if thresholds is None else margins - thresholds.to(margins)[:, None, None]
        return Decisions(routing.executed, distances.abs() <= TIE * margins.abs().amax((1, 2), keepdim=True))

    def first(self, tokens: int) -> Decisions:
        """Of the first ``tokens`` of every row."""
        return Decisions(self.executed[..., :tokens], self.ties[..., :tokens])

    def same_rows(self, executed: Tensor) -> Tensor:
        """Rows in which another run decided the same for all tokens, bool [B].

        Args:
            executed: what that run executed, bool [S, B, T].

        Raises:
            ValueError: if a decision differs that is no tie, and that no other one can have brought about: at a layer
                below, of this token or of one before it.
        """
        differs = self.executed != executed
        below = differs.cumsum(0) - differs.int()
        unexplained = differs & (below.cumsum(2) == 0) & ~self.ties
        if bool(unexplained.any()):
            sites = unexplained.any(dim=2).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"{int(unexplained.sum())} of {differs.numel()} routing decisions differ by more than rounding, at "
                f"routed sites {', '.join(map(str, sites))}"
            )
        return ~differs.any(dim=2).any(dim=0)
