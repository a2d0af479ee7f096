"""Per-layer distillation: each late layer learns the final layer's distribution, without ever holding its logits.

    KL_i = sum over tokens of T^2 sum_v p_v (log p_v - log q_i,v)      p = softmax(W n_k / T), q_i = softmax(W n_i / T)

p is a constant here: no gradient reaches the final layer's state, and the head gets the part through q alone. For a
chunk of tokens the teacher's logits are computed once, then each student's, turned in place into their own gradient and
dropped. So memory holds four chunks of logits, whatever the numbers of tokens and layers.

Source: Luo and Specia 2024 (arXiv:2410.13077) for the term, Hinton et al. 2015 for the temperature.
Dimension letters: N tokens, D width, V vocabulary, k late layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.chunks import IGNORED, accumulate, chunk_rows


def distillation(
    students: Sequence[Tensor], teacher: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum of the KL divergences over students and over tokens with a target, nats, fp32 scalar.

    Args:
        students: normed states [..., D] of the late layers but the final one.
        teacher: the final layer's, [..., D]; gets no gradient.
        weight: of the head, [V, D].
        targets: int64 [...]; tokens with ``IGNORED`` are left out.
        temperature: T.
    """
    if not students:
        return teacher.new_zeros((), dtype=torch.float32)
    flat = [student.flatten(0, -2) for student in students]
    if not torch.is_grad_enabled():  # the function itself sees only requires_grad, and would compute gradients
        flat, weight = [student.detach() for student in flat], weight.detach()
    return _ChunkedKL.apply(weight, teacher.detach().flatten(0, -2), targets.flatten(), temperature, *flat)


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, teacher: Tensor, targets: Tensor, temperature: float, *students: Tensor
    ) -> Tensor:
        needs_weight, needs_students = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grads = [torch.empty_like(s) if need else None for s, need in zip(students, needs_students, strict=True)]
        total = teacher.new_zeros((), dtype=torch.float32)
        rows = chunk_rows(weight)
        for start in range(0, len(teacher), rows):
            part = slice(start, start + rows)
            of_part = [None if grad is None else grad[part] for grad in grads]
            valid = (targets[part] != IGNORED).float()
            total += _teach(
                [s[part] for s in students], teacher[part], weight, valid, temperature, of_part, grad_weight
            )
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_weight, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_weight, *grads = ctx.saved_tensors
        of_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        of_students = (None if grad is None else grad * scale.to(grad.dtype) for grad in grads)
        return of_weight, None, None, None, *of_students


def _teach(
    students: list[Tensor],
    teacher: Tensor,
    weight: Tensor,
    valid: Tensor,
    temperature: float,
    grads: list[Tensor | None],
    grad_weight: Tensor | None,
) -> Tensor:
    """One chunk's sum; its gradients are written to ``grads`` and added to ``grad_weight``."""
    total = valid.new_zeros(())
    p, log_p = _distribution(teacher, weight, temperature)
    for student, grad_student in zip(students, grads, strict=True):
        q, log_q = _distribution(student, weight, temperature)
        total += (log_q.neg_().add_(log_p).mul_(p).sum(dim=-1) * valid).sum() * temperature**2
        del log_q
        if grad_student is None and grad_weight is None:
            continue
        # d KL / d logits = (q - p) / T, times T^2
        grad = q.sub_(p).mul_((valid * temperature)[:, None]).to(student.dtype)
        if grad_student is not None:
            torch.mm(grad, weight, out=grad_student)
        if grad_weight is not None:
            accumulate(grad_weight, grad.T, student)
        del q, grad  # before the next student's logits
    return total


def _distribution(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities and log-probabilities of hidden states [N, D], fp32 [N, V] each."""
    logits = (hidden @ weight.T).float().div_(temperature)
    logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))
    return logits.exp(), logits
