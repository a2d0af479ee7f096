"""Every attention kernel against a dense mask, on random positions, documents and pasts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from model import attend as attend_module
from model.attend import attend, attend_by_blocks
from model.flex import BLOCK, block_mask, flat_bounds, flex_attend, needed_blocks
from model.selection import Selection
from model.visibility import Visibility

HEADS, GROUPS, WIDTH = 6, 2, 16


def visible(tokens: int, past: int = 0, documents: Tensor | None = None) -> Visibility:
    """Of new tokens after ``past`` others."""
    return Visibility(torch.arange(past, past + tokens), past + tokens, documents)


def documents_of(batch: int, keys: int, count: int = 4) -> Tensor:
    """int64 [batch, keys], runs of equal numbers of random lengths."""
    return torch.randint(count, (batch, keys), generator=torch.Generator().manual_seed(7)).sort(dim=1).values


def selections(batch: int, tokens: int) -> dict[str, Selection]:
    draw = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3))
    lopsided = draw < torch.linspace(0.05, 0.95, batch)[:, None]
    return {
        "everything": Selection.everything(batch, tokens),
        "half": Selection.of(draw < 0.5),
        "few": Selection.of(draw < 0.02),
        "one": Selection.of(draw == draw.max()),
        "none": Selection.of(draw < 0),
        "lopsided": Selection.of(lopsided),
        "rounded": Selection.of(draw < 0.3, round_to=64),
        "capped": Selection.capped(lopsided, tokens // 2)[0],
    }


def inputs(selection: Selection, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(selection.size, HEADS, WIDTH, generator=generator)
    k, v = (torch.randn(selection.batch, keys, GROUPS, WIDTH, generator=generator) for _ in range(2))
    return tuple(x.requires_grad_() for x in (q, k, v))


def dense_mask(selection: Selection, past: int, documents: Tensor | None, keys: int) -> Tensor:
    """bool [N, B x S], by the definition: same row, not later, same document."""
    place = torch.arange(selection.batch * selection.tokens)
    place = place if selection.index is None else place[selection.index]
    row, column = place // selection.tokens, place % selection.tokens + past
    key = torch.arange(selection.batch * keys)
    seen = (key[None] // keys == row[:, None]) & (key[None] % keys <= column[:, None])
    if documents is not None:
        seen &= documents.flatten()[None] == documents[row, column][:, None]
    return seen


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (x.flatten(0, 1).repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("nhk,shk->hns", q, k) / WIDTH**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hns,shk->nhk", weights, v)


names = pytest.mark.parametrize("name", selections(2, 8))
confined = pytest.mark.parametrize("confined", [False, True], ids=["one-document", "documents"])


@names
@confined
@pytest.mark.parametrize("past", [0, 45])
@pytest.mark.parametrize("tokens", [5, 64, 150])
def test_blocks_of_queries(name: str, confined: bool, past: int, tokens: int) -> None:
    selection = selections(3, tokens)[name]
    documents = documents_of(3, past + tokens) if confined else None
    tensors = inputs(selection, past + tokens)
    visibility = visible(tokens, past, documents)
    found = attend(*tensors, selection, visibility)
    expected = reference(*tensors, dense_mask(selection, past, documents, past + tokens))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found * weight).sum(), tensors)
    truths = torch.autograd.grad((expected * weight).sum(), tensors)
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """bf16 keeps 8 bits: outputs of size 1 within 2e-2; fp16 keeps 11."""
    selection = selections(3, 150)["half"]
    tensors = [x.detach().to(dtype) for x in inputs(selection, 150)]
    found = attend(*tensors, selection, visible(150)).float()
    expected = reference(*(x.float() for x in tensors), dense_mask(selection, 0, None, 150))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 3e-3)


@confined
@pytest.mark.parametrize("rows", [[], [2], [0, 3], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("keys", [40, 200, 300])
def test_one_new_token_a_row(confined: bool, rows: list[int], keys: int) -> None:
    chosen = torch.zeros(4, 1, dtype=torch.bool)
    chosen[rows] = True
    selection = Selection.of(chosen)
    documents = documents_of(4, keys) if confined else None
    tensors = inputs(selection, keys)
    found = attend(*tensors, selection, visible(1, keys - 1, documents))
    expected = reference(*tensors, dense_mask(selection, keys - 1, documents, keys))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("rows", "keys", "calls"),
    [([1, 2, 6], 100, [2, 1]), ([1, 2, 5], 100, [5]), ([1, 3], 300, [1, 1]), ([0, 1], 300, [2]), ([], 100, [])],
)
def test_rows_that_do_not_ask_are_read_only_where_a_call_would_cost_more(
    rows: list[int], keys: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    sdpa = F.scaled_dot_product_attention

    def counting(q: Tensor, *args: object, **kwargs: object) -> Tensor:
        read.append(q.shape[0])
        return sdpa(q, *args, **kwargs)

    monkeypatch.setattr(attend_module.F, "scaled_dot_product_attention", counting)
    chosen = torch.zeros(8, 1, dtype=torch.bool)
    chosen[rows] = True
    selection = Selection.of(chosen)
    attend(*inputs(selection, keys), selection, visible(1, keys - 1))
    assert read == calls


def test_blocks_skip_keys_that_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal pass over 512 tokens works on 9/16 of all pairs, eight blocks of 64 queries, not on all of them."""
    pairs = []
    sdpa = F.scaled_dot_product_attention

    def counting(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> Tensor:
        pairs.append(q.shape[2] * k.shape[2])
        return sdpa(q, k, *args, **kwargs)

    monkeypatch.setattr(attend_module.F, "scaled_dot_product_attention", counting)
    selection = Selection.everything(1, 512)
    attend_by_blocks(*inputs(selection, 512), selection, visible(512))
    assert sum(pairs) == 512 * 512 * 9 / 16


def test_flex_block_mask_of_a_shared_window() -> None:
    """A rank's two stretches of a window, 512 keys of 1,024: the bounds of queries that lie apart rise all the same."""
    places = torch.cat((torch.arange(256, 512), torch.arange(1536, 1792)))
    visibility = Visibility(places, 2048, documents_of(2, 2048))
    mask = torch.rand(2, 512, generator=torch.Generator().manual_seed(3)) < 0.6
    selection = Selection.of(mask)
    first, last = flat_bounds(selection, visibility)
    assert (first.diff() >= 0).all() and (last.diff() > 0).all()
    needed, full = needed_blocks(first, last, 2 * 2048)
    key = torch.arange(2 * 2048)
    seen = (first[:, None] <= key) & (key <= last[:, None])
    assert seen.any(1).all() and seen.sum() == (visibility.counts() * mask).sum()
    for block, rows in enumerate(seen.split(BLOCK)):
        tiles = rows.view(len(rows), -1, BLOCK)
        assert torch.equal(needed[block], tiles.any(2).any(0)) and torch.equal(full[block], tiles.all(2).all(0))


@names
@confined
@pytest.mark.parametrize("past", [0, 45])
@pytest.mark.parametrize("tokens", [50, 333])
def test_flex_block_mask_is_the_dense_mask(name: str, confined: bool, past: int, tokens: int) -> None:
    selection = selections(3, tokens)[name]
    if selection.size == 0:
        pytest.skip("on a GPU a selection is filled up to at least one block of queries")
    documents = documents_of(3, past + tokens) if confined else None
    keys = 3 * (past + tokens)
    first, last = flat_bounds(selection, visible(tokens, past, documents))
    seen = dense_mask(selection, past, documents, past + tokens)
    place = torch.arange(keys)
    assert torch.equal((first[:, None] <= place) & (place <= last[:, None]), seen)

    needed, full = needed_blocks(first, last, keys)
    padded = torch.zeros(needed.shape[0] * BLOCK, needed.shape[1] * BLOCK, dtype=torch.bool)
    padded[: len(seen), :keys] = seen
    tiles = padded.view(needed.shape[0], BLOCK, needed.shape[1], BLOCK)
    assert torch.equal(needed, tiles.any(3).any(1))
    padded[len(seen) :] = True  # a block that ends early is full if its real queries see everything
    assert torch.equal(full, tiles.all(3).all(1))

    made = block_mask(first, last, keys)
    scanned = create_block_mask(made.mask_mod, None, None, len(first), keys, device="cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(made.to_dense(), scanned.to_dense())
    for ours, theirs in ((made.kv_num_blocks, scanned.kv_num_blocks), (made.q_num_blocks, scanned.q_num_blocks)):
        assert ours.shape == theirs.shape


@pytest.mark.processes  # of a C++ compiler
def test_flex_attention_compiled_and_not_again_for_other_shapes() -> None:
    """The compiled CPU kernel reads the block mask; it has no backward pass, so gradients wait for a GPU."""
    for number, name in enumerate(["everything", "half", "lopsided", "rounded", "capped", "half"]):
        tokens = 150 + 40 * number
        selection = selections(3, tokens)[name]
        tensors = [x.detach() for x in inputs(selection, tokens)]
        documents = documents_of(3, tokens) if number % 2 else None
        if number == 3:  # one graph for equal numbers of queries and keys, one for others
            torch.compiler.set_stance("fail_on_recompile")
        try:
            with torch.no_grad():
                found = flex_attend(*tensors, selection, visible(tokens, 0, documents))
        finally:
            torch.compiler.set_stance("default")
        expected = reference(*tensors, dense_mask(selection, 0, documents, tokens))
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
