"""RMSNorm (Zhang and Sennrich 2019): scale by the root mean square, no mean, no bias."""

from __future__ import annotations

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
        """x: [..., width] -> [..., width], same dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)
