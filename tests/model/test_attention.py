"""Attention of the executed tokens, projections included, against a loop over queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.attention import Attention
from model.rotary import rotate, rotation
from model.selection import Selection
from model.visibility import Visibility
from tests.model.tiny import VARIANTS, assert_close, config

BATCH, TOKENS = 2, 9
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 7]])


def sees(row: int, query: int, documents: Tensor | None) -> list[int]:
    return [k for k in range(query + 1) if documents is None or documents[row, k] == documents[row, query]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("everything", [False, True])
def test_against_a_loop(variant: str, documents: Tensor | None, everything: bool) -> None:
    cfg = config("dense", variant)
    torch.manual_seed(0)
    attention = Attention(cfg)
    if cfg.qk_norm:
        with torch.no_grad():
            attention.q_norm.weight.uniform_(0.5, 2)
            attention.k_norm.weight.uniform_(0.5, 2)
    h = torch.randn(BATCH, TOKENS, cfg.width)
    chosen = torch.rand(BATCH, TOKENS) < (1.1 if everything else 0.5)
    selection = Selection.everything(BATCH, TOKENS) if everything else Selection.of(chosen)
    cos, sin = rotation(cfg, torch.arange(TOKENS).expand(BATCH, -1), torch.float32)
    keys, values = attention.keys_values(h, cos, sin)
    turns = (selection.gather(t) for t in (cos, sin))
    visibility = Visibility(torch.arange(TOKENS), TOKENS, documents)
    found = attention(h, lambda: (keys, values), *turns, selection, visibility)

    group = cfg.heads // cfg.kv_heads
    expected = []
    for row, query in chosen.nonzero().tolist():
        q = attention.q_proj(h[row, query]).view(cfg.heads, cfg.head_dim)
        q = rotate(q if attention.q_norm is None else attention.q_norm(q), cos[0, query], sin[0, query])
        seen = sees(row, query, documents)
        heads = []
        for head in range(cfg.heads):
            k, v = keys[row, seen, head // group], values[row, seen, head // group]
            heads.append(torch.softmax(k @ q[head] / math.sqrt(cfg.head_dim), 0) @ v)
        expected.append(attention.o_proj(torch.cat(heads)))
    assert_close(found, torch.stack(expected))
