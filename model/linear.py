"""Bias-free linear maps that are fast for the few rows of a decoding step.

For a few rows, ``x @ weight.T`` is limited by reading the weight from memory. On AMD CPUs in fp32, Intel's MKL behind
``F.linear`` reads it two to three times slower than the memory allows; ``weight @ x.T`` does not, except for one row,
which is therefore doubled. On Intel CPUs the opposite holds. Milliseconds for all the products of twelve layers of
width 384 (75 MB of weights), two cores each (AMD Zen 4 and an Intel Xeon with AMX, MKL of torch 2.13):

    rows                   1     2     4     8    16    32    64
    x @ W.T, AMD         8.1  11.7  11.1  13.2  14.2  19.5  28.2
    W @ x.T, AMD         7.9   3.0   4.8   6.9   9.3  14.0  19.9
    x @ W.T, Intel       1.6   1.7   2.4   3.0   5.8
    W @ x.T, Intel       3.6   3.3   3.5   3.2   3.6

So the weight comes first on AMD only, and only where it is large: a small one, such as a router's, is read quickly
either way. Rows must be contiguous, in input and output: ``W @ x.T`` on an AMD EPYC with AVX2, and again with rows as
another such product leaves them (``x.T`` in memory):

    rows                   1     2     4     8
    x @ W.T              7.5  11.0  11.1  10.7
    W @ x.T              7.6   4.4   4.6   7.6
    W @ x.T, x.T         7.6  14.6  15.7  15.1

Attention has no fast kernel for queries that are not contiguous, either. Above eight rows the two orders come close to
each other, and which is faster depends on the size and the instruction set. In training and prefill, with hundreds of
rows, nothing is changed.

Dimension letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8
"""Most rows for which the order is swapped."""

FEW_WEIGHTS = 1 << 16
"""Smaller weights keep ``F.linear``: swapping costs six more operations."""


def rows_for_one() -> int:
    """Up to how many rows a product takes about as long as for one or two: reading the weight dominates."""
    return 4 if weight_first() else 2


@cache
def weight_first() -> bool:
    """Whether this CPU is one of those on which products of few rows are faster the other way round."""
    facts = Path("/proc/cpuinfo")
    return facts.is_file() and "AuthenticAMD" in facts.read_text()[:1000]


class Linear(nn.Linear):
    """``nn.Linear`` without a bias, through :func:`linear`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., I] times the transposed ``weight`` [O, I]: [..., O]."""
    # Checked in this order: compiling the training pass must not look at the number of rows.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight)
    rows = x.numel() // weight.shape[1]
    if not 0 < rows <= FEW_ROWS or weight.numel() < FEW_WEIGHTS or not x.is_cpu:
        return F.linear(x, weight)
    if not x.dtype == weight.dtype == torch.float32 or not weight_first():
        return F.linear(x, weight)
    flat = x.reshape(rows, weight.shape[1])
    doubled = torch.cat((flat, flat)) if rows == 1 else flat.contiguous()
    return torch.mm(weight, doubled.t())[:, :rows].t().contiguous().view(*x.shape[:-1], len(weight))
