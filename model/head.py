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
_CHUNK_LOGITS = 2**24  # logits held at once: 64 MiB in fp32


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
        rows = max(_CHUNK_LOGITS // weight.shape[0], 1)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        nll_sum = hidden.new_zeros((), dtype=torch.float32)
        z_sum = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            valid = t != IGNORED
            t = torch.where(valid, t, 0)[:, None]
            logits = (h @ weight.T).float()
            log_total = torch.logsumexp(logits, dim=-1)
            nll_sum += ((log_total - logits.gather(1, t).squeeze(1)) * valid).sum()
            z_sum += (log_total.square() * valid).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax * (1 + 2 z_coefficient logsumexp) - onehot, zero in ignored rows
            grad = logits.sub_(log_total[:, None]).exp_()
            if z_coefficient:
                grad *= (1 + 2 * z_coefficient * log_total)[:, None]
            grad.scatter_add_(1, t, grad.new_full(t.shape, -1.0))
            grad = grad.mul_(valid[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ h
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
