"""RMSNorm (Zhang and Sennrich 2019): scale by the root mean square, no mean, no bias.

Dimension letters: D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, computed in fp32 inside the kernel.

    Args:
        width: size of the last dimension.
        epsilon: added to the mean square.
    """

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., D], same dtype."""
        if x.is_cpu and x.dtype == self.weight.dtype == torch.float32:
            if torch.is_grad_enabled():
                return _LeanNorm.apply(x, self.weight, self.epsilon)
            return (x * _inverse_rms(x, self.epsilon)).mul_(self.weight)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


class _LeanNorm(torch.autograd.Function):
    """The same for fp32 on the CPU, where torch runs a chain of small operations that takes three times as long.

    With r = 1 / rms(x) and g the output's gradient, per row:

        dx = r (g * weight) - x r^3 sum(g * weight * x) / D        dweight = sum over rows of r (g * x)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        r = _inverse_rms(x, epsilon)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        product = grad * x
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = r.flatten() @ product.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            slope = (product @ weight)[..., None] * r**3 / x.shape[-1]
            # Reuses the product's memory, which is in the cache and no longer needed.
            grad_x = torch.mul(grad, weight, out=product).mul_(r).addcmul_(x, slope, value=-1)
        return grad_x, grad_weight, None


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """[..., D] -> [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
