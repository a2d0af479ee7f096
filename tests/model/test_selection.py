"""Gathering executed tokens and putting them back; fillers, capacity, the rectangle."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from model.selection import Selection

EXAMPLE = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)


def test_the_example_of_the_docstring() -> None:
    selection = Selection.of(EXAMPLE)
    assert selection.index.tolist() == [0, 2, 3, 4, 6]
    assert selection.rectangle.columns.tolist() == [[0, 2, 3], [0, 2, 3]]
    assert selection.rectangle.slots.tolist() == [0, 1, 2, 3, 4]


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
def test_gather_and_add(name: str) -> None:
    chosen = mask(name)
    batch, tokens = chosen.shape
    selection = Selection.of(chosen)
    assert selection.size == int(chosen.sum())
    grid = torch.arange(1.0, batch * tokens * 2 + 1).view(batch, tokens, 2)
    rows = selection.gather(grid)
    assert torch.equal(rows, grid[chosen])
    before = grid.clone()
    assert torch.equal(selection.add(grid, 10 * rows), grid + 10 * grid * chosen[..., None])
    assert torch.equal(grid, before)  # a new tensor


@masks
def test_the_rectangle(name: str) -> None:
    chosen = mask(name)
    batch, tokens = chosen.shape
    selection = Selection.of(chosen)
    if name == "all":
        assert selection == Selection.everything(batch, tokens)
        return
    grid = torch.arange(1.0, batch * tokens * 2 + 1).view(batch, tokens, 2)
    rows, shape = selection.gather(grid), selection.rectangle
    padded = shape.pad(rows)
    width = max(int(chosen.sum(1).max()), 1)
    assert padded.shape == (batch, width, 2)
    assert torch.equal(shape.unpad(padded), rows)
    for row in range(batch):
        count = int(chosen[row].sum())
        assert torch.equal(padded[row, :count], grid[row][chosen[row]])
        assert not padded[row, count:].any()
        assert torch.equal(shape.columns[row, :count], chosen[row].nonzero()[:, 0])
        assert (shape.columns[row, count:] == tokens - 1).all()  # rising along the row to its end


def test_everything_is_a_reshape() -> None:
    selection = Selection.everything(3, 7)
    grid = torch.randn(3, 7, 2)
    rows = selection.gather(grid)
    assert torch.equal(rows, grid.view(21, 2)) and selection.size == 21
    assert torch.equal(selection.add(grid, rows), 2 * grid)


@masks
@pytest.mark.parametrize("round_to", [1, 4, 8, 64])
def test_rounding_takes_in_the_first_skipped_tokens(name: str, round_to: int) -> None:
    chosen = mask(name)
    selection = Selection.of(chosen, round_to)
    count, size = int(chosen.sum()), chosen.numel()
    expected = count if round_to == 1 else min(max(-(-count // round_to), 1) * round_to, size)
    assert selection.size == expected
    assert selection.exact == (expected == count), (expected, count)
    if selection.index is None:
        assert expected == size
        return
    assert (selection.index.diff() > 0).all()
    flat = chosen.flatten()
    taken = torch.zeros_like(flat)
    taken[selection.index] = True
    assert taken[flat].all()  # nothing is dropped
    fillers = (~flat).nonzero().squeeze(-1)[: expected - count]
    assert torch.equal((taken & ~flat).nonzero().squeeze(-1), fillers)


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 16, 17, 20])
def test_one_token_a_row_is_rounded_up_but_not_from_none(rows: int) -> None:
    chosen = (torch.arange(20) < rows)[:, None]
    selection = Selection.of(chosen, round_to=8)
    assert selection.size == {0: 0, 1: 8, 8: 8, 9: 16, 16: 16, 17: 20, 20: 20}[rows]
    assert selection.exact == (selection.size == rows)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("chosen", ["none", "last", "all"])
@pytest.mark.parametrize("weight_first", [True, False])
def test_one_token_a_row_on_the_cpu_is_taken_exactly_but_of_few_rows(
    batch: int, chosen: str, weight_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two rows both are computed, where CPUs multiply them by weights that come first of four all."""
    monkeypatch.setattr("model.linear.weight_first", lambda: weight_first)
    rows = {"none": [], "last": [batch - 1], "all": list(range(batch))}[chosen]
    selection = Selection.of_rows([row in rows for row in range(batch)])
    if chosen == "last" and batch in ((2, 3) if weight_first else (2,)):
        assert selection.index is None and not selection.exact
    elif len(rows) == batch:
        assert selection.index is None and selection.exact
    else:
        assert selection.index.tolist() == rows and selection.exact


@masks
@pytest.mark.parametrize("capacity", [1, 2, 3, 6, 7, 100])
def test_a_capacity_is_filled_first_come_first_served(name: str, capacity: int) -> None:
    chosen = mask(name)
    batch, tokens = chosen.shape
    selection, kept = Selection.capped(chosen, capacity)
    room = min(capacity, tokens)
    assert selection.size == batch * room
    taken = torch.zeros(batch * tokens, dtype=torch.bool)
    taken[slice(None) if selection.index is None else selection.index] = True
    taken = taken.view(batch, tokens)
    for row in range(batch):
        wanted = chosen[row].nonzero().squeeze(-1)
        assert torch.equal(kept[row].nonzero().squeeze(-1), wanted[:room])
        assert int(taken[row].sum()) == room and taken[row][kept[row]].all()
        assert not (taken[row] & chosen[row] & ~kept[row]).any()  # what overflowed is not computed as filler
    if selection.index is not None:
        shape = selection.rectangle
        assert shape.slots is None and torch.equal(shape.columns.flatten(), selection.index % tokens)


def test_what_comes_later_takes_no_room_from_what_came_before() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(4, 50, generator=generator) < 0.6
    changed = chosen.clone()
    changed[:, 30:] = torch.rand(4, 20, generator=generator) < 0.6
    for capacity in (5, 15, 20, 40):
        (_, kept), (_, again) = Selection.capped(chosen, capacity), Selection.capped(changed, capacity)
        assert torch.equal(kept[:, :30], again[:, :30])


def test_the_backward_pass_keeps_indices_and_not_rows() -> None:
    """What a routed layer saves by skipping, it must not hold again in copies."""
    selection = Selection.of(EXAMPLE)
    x = torch.randn(2, 4, 8, requires_grad=True) * 1
    weight = torch.randn(8, 8, requires_grad=True)
    rows = selection.gather(x)
    expected = torch.autograd.grad((rows @ weight).square().sum(), (x, weight))

    rows = selection.gather(x)
    with selection.kept_as_index(rows, x):
        product = rows @ weight
    alive = weakref.ref(rows)
    del rows
    assert alive() is None
    found = torch.autograd.grad(product.square().sum(), (x, weight))
    for gradient, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, truth)

    update = torch.randn(5, 8, requires_grad=True) * 1
    alive = weakref.ref(update)
    out = selection.add(x, update)
    del update
    assert alive() is None and out.requires_grad
