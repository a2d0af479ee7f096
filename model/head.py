"""The LM head and its loss, without ever holding tokens x vocabulary.

The loss is a sum, not a mean: the caller divides by the number of valid targets over all ranks and micro-batches.

    nll   = logsumexp(z) - z[target]                      summed over valid targets
    z     = logsumexp(z)^2                                the z-loss of PaLM (Chowdhery et al. 2022)
    loss  = nll + z_coefficient * z

Logits are computed for a chunk of rows, turned in place into their own gradient, multiplied onto the hidden states
and the weight, and dropped. So the backward pass has nothing to recompute: three matrix products in all, as many as
with full logits.

Dimension letters: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IGNORED = -100
# Logits held at once, in fp32 entries. On the CPU a chunk should stay in the cache between the passes over it (8 MiB);
# on a GPU (256 MiB) few chunks matter more, because each one reads and writes the weight's fp32 gradient.
_CHUNK_LOGITS = {"cpu": 2**21, "other": 2**26}
_CHUNK_ROWS_MIN = 256  # with fewer, the products wait for the weight to be read


class LossSums(NamedTuple):
    """Sums over valid targets, fp32 scalars; only ``loss`` carries a gradient."""

    loss: Tensor
    nll: Tensor
    z: Tensor


class LMHead(nn.Linear):
    """Bias-free map from hidden states to logits, which can also return the loss directly."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, z_coefficient: float = 0.0
    ) -> Tensor | LossSums:
        """Logits [..., V], or with ``targets`` the loss sums.

        Args:
            hidden: [..., D].
            targets: int64 [...], ``IGNORED`` (-100) where no loss is taken.
            z_coefficient: weight of the z-loss.
        """
        if targets is None:
            return super().forward(hidden)
        hidden, weight = hidden.flatten(0, -2), self.weight
        if not torch.is_grad_enabled():  # the function itself sees only requires_grad, and would compute gradients
            hidden, weight = hidden.detach(), weight.detach()
        return LossSums(*_ChunkedLoss.apply(hidden, weight, targets.flatten(), z_coefficient))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_coefficient: float) -> tuple[Tensor, ...]:
        chunk_logits = _CHUNK_LOGITS["cpu" if hidden.is_cpu else "other"]
        rows = max(chunk_logits // weight.shape[0], _CHUNK_ROWS_MIN)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        nll_sum = hidden.new_zeros((), dtype=torch.float32)
        z_sum = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            valid = t != IGNORED
            t = torch.where(valid, t, 0)[:, None]
            logits = (h @ weight.T).float()
            target_logits = logits.gather(1, t).squeeze(1)
            top = logits.amax(dim=-1, keepdim=True)
            exponentials = logits.sub_(top).exp_()  # the logits' memory, as every step down to grad
            total = exponentials.sum(dim=-1, keepdim=True)
            log_total = (top + total.log()).squeeze(1)
            nll_sum += ((log_total - target_logits) * valid).sum()
            z_sum += (log_total.square() * valid).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax * (1 + 2 z_coefficient logsumexp) - onehot, zero in ignored rows
            factor = valid * (1 + 2 * z_coefficient * log_total)
            grad = exponentials.mul_(factor[:, None] / total)
            grad = grad.scatter_add_(1, t, -valid[:, None].float()).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                _accumulate(grad_weight, grad.T, h)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll_sum, z_sum)
        return nll_sum + z_coefficient * z_sum, nll_sum, z_sum

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale  # scale stays fp32: rounded to bf16 it is off by up to 0.4 %
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, inside the product where the dtypes allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
