"""Sums of a step: losses by source are each window's own, whichever way the head takes its targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.model.tiny import config, decoder, random_tokens
from trainer.tally import Counter

B = 6
OWNERS = torch.tensor([2, 0, 2, 2, 0, 0])  # source 1 has none here


@pytest.mark.parametrize("scored", [False, True], ids=["all tokens", "scored tokens only"])
def test_sums_by_source_are_those_of_its_windows(scored: bool) -> None:
    model, tokens, targets = decoder(config("dense")), random_tokens(B), random_tokens(B, seed=1)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.4] = -100
    valid = (targets != -100).sum(dim=1)

    counter = Counter(0, torch.device("cpu"), sources=3)
    for part in (slice(0, 4), slice(4, B)):
        rows = int(valid[part].sum()) if scored else None
        output = model(tokens[part], targets[part], scored_targets=rows)
        assert output.loss is not None and not output.loss.token_nll.requires_grad
        counter.add(output, targets[part], rows, OWNERS[part])
    tally = counter.tally()

    with torch.no_grad():
        logits = model(tokens).logits
    assert logits is not None
    by_window = F.cross_entropy(logits.transpose(1, 2).double(), targets, reduction="none").sum(dim=1)
    for source in range(3):
        assert tally.source_nll[source] == pytest.approx(float(by_window[source == OWNERS].sum()), rel=1e-6)
        assert tally.source_targets[source] == int(valid[source == OWNERS].sum())
    assert sum(tally.source_nll) == pytest.approx(tally.nll, rel=1e-14)
    assert sum(tally.source_targets) == tally.targets


def test_a_window_that_is_not_finite_spoils_only_its_own_source() -> None:
    """The step is left out all the same; but nobody is sent to look into a source that is fine."""
    model, tokens = decoder(config("dense")), random_tokens(2)
    tokens[tokens == 7] = 8
    tokens[1, 0] = 7
    with torch.no_grad():
        model.embed_tokens.weight[7] = float("nan")
    counter = Counter(0, torch.device("cpu"), sources=2)
    counter.add(model(tokens, tokens), tokens, None, torch.tensor([0, 1]))
    fine, spoilt = counter.tally().source_nll
    assert 0 < fine < float("inf") and spoilt != spoilt
