"""Bias-free linear maps that are quick for the few rows of a decoding step.

``x @ weight.T`` of a few rows waits for the weight to be read from memory. On an AMD CPU in fp32 the BLAS behind
``F.linear``, which is Intel's, reads it two to three times slower than the memory allows, for one row to about ten; the
same product the other way round, ``weight @ x.T``, does not, but for one row, which is therefore given a twin. On an
Intel CPU it is the other way about. Measured on two cores each (AMD Zen 4 and an Intel Xeon with AMX, MKL of torch
2.13), milliseconds for all the products of twelve layers of width 384 (75 MB of weights):

    rows                   1     2     4     8    16    32    64
    x @ W.T, AMD         8.1  11.7  11.1  13.2  14.2  19.5  28.2
    W @ x.T, AMD         7.9   3.0   4.8   6.9   9.3  14.0  19.9
    x @ W.T, Intel       1.6   1.7   2.4   3.0   5.8
    W @ x.T, Intel       3.6   3.3   3.5   3.2   3.6

So only AMD's are turned, and only large weights: a small one, as a router's, is read at once either way. Rows must lie
one after the other, in what is read and in what is given back. On an AMD EPYC with AVX2, in the same milliseconds; in
the last line rows lie as they come out of a product that was turned (``x.T`` in memory):

    rows                   1     2     4     8
    x @ W.T              7.5  11.0  11.1  10.7
    W @ x.T              7.6   4.4   4.6   7.6
    the same, x.T        7.6  14.6  15.7  15.1

Nor has attention a kernel of its own for queries whose numbers lie apart. Above eight rows the two ways come near each
other, and the order changes from size to size and from one instruction set to another. In training and prefill, with
hundreds of rows, nothing is changed.

Dimension letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8
"""Products of up to so many rows are turned."""

FEW_WEIGHTS = 1 << 16
"""A weight of fewer entries is not: it is read at once, and turning is six more operations."""


@cache
def turned() -> bool:
    """Whether this CPU is one of those on which products of few rows are quicker the other way round."""
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
    # In this order: a compiler of the training pass must not look at the number of rows.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight)
    rows = x.numel() // weight.shape[1]
    if not 0 < rows <= FEW_ROWS or weight.numel() < FEW_WEIGHTS or not x.is_cpu:
        return F.linear(x, weight)
    if not x.dtype == weight.dtype == torch.float32 or not turned():
        return F.linear(x, weight)
    flat = x.reshape(rows, weight.shape[1])
    twins = torch.cat((flat, flat)) if rows == 1 else flat.contiguous()
    # Rows that lie one after the other: the product of columns takes three times as long, and attention has no kernel
    # for queries whose numbers lie apart.
    return torch.mm(weight, twins.t())[:, :rows].t().contiguous().view(*x.shape[:-1], len(weight))
