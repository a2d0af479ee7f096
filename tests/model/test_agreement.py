"""Which decisions of another run are rounding, which follow from it, and which are another model's."""

from __future__ import annotations

import pytest
import torch

from model.agreement import TIE, Decisions
from tests.model import tiny


def at(*places: tuple[int, int, int]) -> torch.Tensor:
    """bool [3 sites, 2 rows, 4 tokens], true at ``places``."""
    grid = torch.zeros(3, 2, 4, dtype=torch.bool)
    for place in places:
        grid[place] = True
    return grid


OURS = Decisions(executed=at(), ties=at((0, 1, 1)))


def test_a_tie_may_turn_and_what_it_brings_about_above_and_after() -> None:
    assert OURS.same_rows(at()).tolist() == [True, True]
    assert OURS.same_rows(at((0, 1, 1), (1, 1, 1), (2, 1, 3))).tolist() == [True, False]


@pytest.mark.parametrize(
    "other",
    [
        (0, 1, 2),  # the same site: its decisions do not depend on each other
        (2, 1, 0),  # an earlier token does not see it
        (2, 0, 3),  # nor does another row
    ],
)
def test_a_decision_that_no_tie_explains_is_another_models(other: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=rf"1 of 24 routing decisions differ .* at routed sites {other[0]}$"):
        OURS.same_rows(at((0, 1, 1), other))


@torch.no_grad()
def test_ties_are_margins_at_their_threshold() -> None:
    decoder = tiny.decoder(tiny.config()).eval()
    routing = decoder(tiny.random_tokens()).routing
    assert routing.margins is not None and not bool(Decisions.of(routing, None).ties.any())
    largest = routing.margins.abs().amax((1, 2))
    thresholds = routing.margins[:, 0, 0] + torch.tensor([0.5, -2.0] * len(largest))[: len(largest)] * TIE * largest
    ties = Decisions.of(routing, thresholds).ties[:, 0, 0]
    assert ties.tolist() == [site % 2 == 0 for site in range(len(largest))]


@torch.no_grad()
def test_without_logits_nothing_is_a_tie_and_a_dense_model_has_no_decisions() -> None:
    for router, sites in (("random", None), ("dense", 0)):
        decoder = tiny.decoder(tiny.config(router)).eval()
        ours = Decisions.of(decoder(tiny.random_tokens()).routing, None)
        assert not bool(ours.ties.any()) and (sites is None or len(ours.executed) == sites)
        assert bool(ours.same_rows(ours.executed).all())
