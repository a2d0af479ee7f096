"""Bounds of the visible keys against the definition: not later, same document."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.visibility import Visibility, mask

BATCH, TOKENS = 2, 9
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 7]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("past", [0, 4])
def test_bounds_counts_and_mask(documents: Tensor | None, past: int) -> None:
    visibility = Visibility(torch.arange(past, TOKENS), TOKENS, documents)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(BATCH, -1, -1)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    seen = seen[:, past:]
    assert torch.equal(visibility.counts().expand(BATCH, -1), seen.sum(-1))
    queries = torch.tensor([[0, 2, 4], [1, 3, 4]])
    first, last = visibility.bounds(queries)
    expected = seen[torch.arange(BATCH)[:, None], queries]
    assert torch.equal(mask(first, last, 0, TOKENS), expected)
    assert torch.equal(mask(first, last, 2, 7), expected[..., 2:7])
    assert torch.equal(last, queries + past) and (first is None) == (documents is None)
