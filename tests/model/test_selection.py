"""Gathering executed tokens and putting them back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.selection import Selection

EXAMPLE = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)


def test_the_example_of_the_docstring() -> None:
    selection = Selection.of(EXAMPLE)
    assert selection.index.tolist() == [0, 2, 3, 4, 6]
    assert selection.slots.tolist() == [0, 1, 2, 3, 4]
    assert selection.columns == 3
    assert selection.queries.tolist() == [[0, 2, 3], [0, 2, 0]]


def mask(name: str) -> Tensor:
    if name == "example":
        return EXAMPLE
    if name in ("none", "all"):
        return torch.full((3, 7), name == "all")
    made = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    if name == "empty first row":
        made[0] = False
    return made


masks = pytest.mark.parametrize("name", ["example", "none", "all", "mixed", "empty first row"])


@masks
def test_gather_pad_unpad_add(name: str) -> None:
    chosen = mask(name)
    batch, tokens = chosen.shape
    selection = Selection.of(chosen)
    grid = torch.arange(1.0, batch * tokens * 2 + 1).view(batch, tokens, 2)
    rows = selection.gather(grid)
    assert torch.equal(rows, grid[chosen])

    rectangle = selection.pad(rows)
    assert rectangle.shape == (batch, selection.columns, 2)
    assert selection.columns == max(int(chosen.sum(1).max()), 1)
    for row in range(batch):
        count = int(chosen[row].sum())
        assert torch.equal(rectangle[row, :count], grid[row][chosen[row]])
        assert not rectangle[row, count:].any()
        assert torch.equal(selection.queries[row, :count], chosen[row].nonzero()[:, 0])
        assert not selection.queries[row, count:].any()
    assert torch.equal(selection.unpad(rectangle), rows)

    before = grid.clone()
    assert torch.equal(selection.add(grid, 10 * rows), grid + 10 * grid * chosen[..., None])
    assert torch.equal(grid, before)  # a new tensor


def test_everything_is_a_reshape() -> None:
    selection = Selection.everything(3, 7)
    grid = torch.randn(3, 7, 2)
    rows = selection.gather(grid)
    assert torch.equal(rows, grid.view(21, 2))
    assert torch.equal(selection.pad(rows), grid) and torch.equal(selection.unpad(grid), rows)
    assert torch.equal(selection.add(grid, rows), 2 * grid)
