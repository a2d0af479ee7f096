"""The LM head and its loss, without ever holding tokens x vocabulary.

The loss is a sum, not a mean: the caller divides by the number of valid targets over all ranks and micro-batches.

    nll   = logsumexp(z) - z[target]                      summed over valid targets
    z     = logsumexp(z)^2                                the z-loss of PaLM (Chowdhery et al. 2022)
    loss  = nll + z_coefficient * z

Logits are computed for a chunk of rows, turned in place into their own gradient, multiplied by the hidden states
and the weight, and dropped. So the backward pass has nothing to recompute: three matrix products in all, as many as
with full logits.

Dimension letters: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chunks import IGNORE_INDEX, accumulate, chunk_rows
from model.distillation import distillation
from model.linear import linear


class LossSums(NamedTuple):
    """Sums over valid targets, fp32 scalars, and what they are sums of; only ``loss`` and ``distillation`` carry a
    gradient."""

    loss: Tensor
    nll: Tensor
    z: Tensor
    distillation: Tensor
    """KL divergences of the students from the teacher, not part of ``loss``; zero without students."""
    token_nll: Tensor
    """Each token's share of ``nll``, fp32 [N]; zero where no loss is taken."""


class Scores(NamedTuple):
    """Scores per token, for each of C sets of hidden states."""

    nll: Tensor
    """Negative log-likelihood of the target, fp32 [C, N]."""
    hit: Tensor
    """Whether the target is the likeliest token, bool [C, N]."""


class Distillation(NamedTuple):
    """Students and their teacher: see :mod:`model.distillation`."""

    students: list[Tensor]
    """[..., D] each."""
    teacher: Tensor
    """[..., D], gets no gradient."""
    temperature: float


class LMHead(nn.Linear):
    """Bias-free map from hidden states to logits, which can also return losses directly.

    Whatever needs the weight goes through :meth:`forward`, where ZeRO 3 gathers it.
    """

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        z_coefficient: float = 0.0,
        teaching: Distillation | None = None,
        candidates: Sequence[Tensor] = (),
    ) -> Tensor | LossSums | Scores:
        """Logits [..., V]; with ``targets`` the loss sums; with ``candidates`` as well, the scores of each of them.

        Args:
            hidden: [..., D].
            targets: int64 [...], ``IGNORE_INDEX`` (-100) where no loss is taken.
            z_coefficient: weight of the z-loss.
            teaching: distillation between hidden states of the same tokens.
            candidates: C hidden states [N, D] to score against targets [N], all of them valid.
        """
        if targets is None:
            return linear(hidden, self.weight)
        if candidates:
            return self._score(candidates, targets)
        flat, weight = hidden.flatten(0, -2), self.weight
        if not torch.is_grad_enabled():  # the function only sees requires_grad, and would compute gradients
            flat, weight = flat.detach(), weight.detach()
        loss, nll, z, token_nll = _ChunkedLoss.apply(flat, weight, targets.flatten(), z_coefficient)
        if teaching is None:
            return LossSums(loss, nll, z, torch.zeros_like(nll), token_nll)
        students, teacher, temperature = teaching
        return LossSums(loss, nll, z, distillation(students, teacher, self.weight, targets, temperature), token_nll)

    @torch.no_grad()
    def _score(self, candidates: Sequence[Tensor], targets: Tensor) -> Scores:
        nll = candidates[0].new_empty((len(candidates), len(targets)), dtype=torch.float32)
        hit = torch.empty_like(nll, dtype=torch.bool)
        rows = chunk_rows(self.weight)
        for number, hidden in enumerate(candidates):
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                logits = linear(hidden[part], self.weight).float()
                nll[number, part] = F.cross_entropy(logits, targets[part], reduction="none")
                hit[number, part] = logits.argmax(dim=-1) == targets[part]
        return Scores(nll, hit)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_coefficient: float) -> tuple[Tensor, ...]:
        rows = chunk_rows(weight)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        token_nll = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        nll_sum = hidden.new_zeros((), dtype=torch.float32)
        z_sum = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            valid = t != IGNORE_INDEX
            t = torch.where(valid, t, 0)[:, None]
            logits = (h @ weight.T).float()
            target_logits = logits.gather(1, t).squeeze(1)
            top = logits.amax(dim=-1, keepdim=True)
            exponentials = logits.sub_(top).exp_()  # in the logits' memory, as is every step down to grad
            total = exponentials.sum(dim=-1, keepdim=True)
            log_total = (top + total.log()).squeeze(1)
            token_nll[start : start + rows] = (log_total - target_logits) * valid
            nll_sum += token_nll[start : start + rows].sum()
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
                accumulate(grad_weight, grad.T, h)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll_sum, z_sum, token_nll)
        return nll_sum + z_coefficient * z_sum, nll_sum, z_sum, token_nll

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale  # scale stays fp32: rounded to bf16 it is off by up to 0.4 %
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
