"""RMSNorm and its hand-written gradient against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.norm import RMSNorm
from tests.model.tiny import assert_close

EPSILON = 1e-2  # large enough to matter beside the inputs' mean square of about 1e-2


def norm() -> RMSNorm:
    made = RMSNorm(16, EPSILON)
    with torch.no_grad():
        made.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    return made


def inputs(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPSILON) * weight


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (0,), (1,)])
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    made, x = norm(), inputs(*shape).requires_grad_()
    out = made(x)
    expected = formula(x.double(), made.weight.double())
    assert_close(out.double(), expected, 1e-6)
    slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((out * slopes).sum(), (x, made.weight))
    right = torch.autograd.grad((expected * slopes).sum(), (x, made.weight))
    for value, wanted in zip(found, right, strict=True):
        assert value.shape == wanted.shape
        assert_close(value, wanted, 2e-6)


def test_strided_input() -> None:
    """Heads are normed in views whose memory is not in order."""
    made, x = norm(), inputs(4, 6).transpose(0, 1).requires_grad_()
    made(x).square().sum().backward()
    dense = x.detach().contiguous().requires_grad_()
    norm()(dense).square().sum().backward()
    assert_close(made(x), norm()(dense), 1e-6)
    assert_close(x.grad, dense.grad, 1e-6)


def test_zeros_stay_finite() -> None:
    x = torch.zeros(2, 16, requires_grad=True)
    out = norm()(x)
    out.sum().backward()
    assert not out.any() and torch.isfinite(x.grad).all()


def test_bf16() -> None:
    made, x = norm(), inputs(5)
    exact = made(x)
    rounded = made.bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.01 * exact.norm()
