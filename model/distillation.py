"""Per-layer distillation: each late layer learns the final layer's distribution, without ever holding its logits.

    KL_i = sum over tokens of T^2 sum_v p_v (log p_v - log q_i,v)      p = softmax(W n_k / T), q_i = softmax(W n_i / T)

p is a constant here: no gradient reaches the final layer's state, and the head only gets the part through q. For a
chunk of tokens the teacher's logits are computed once, then each student's, turned in place into their own gradient and
dropped. So memory holds two chunks of logits, whatever the numbers of tokens and layers.

Source: Luo and Specia 2024 (arXiv:2410.13077) for the term, Hinton et al. 2015 for the temperature.
Dimension letters: N tokens, D width, V vocabulary, k late layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.chunks import IGNORE_INDEX, accumulate, chunk_rows


def distillation(
    students: Sequence[Tensor], teacher: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum of the KL divergences over students and over tokens with a target, nats, fp32 scalar.

    Args:
        students: normed states [..., D] of the late layers except the final one.
        teacher: the final layer's, [..., D]; gets no gradient.
        weight: of the head, [V, D].
        targets: int64 [...]; tokens with ``IGNORE_INDEX`` are left out.
        temperature: T.
    """
    if not students:
        return teacher.new_zeros((), dtype=torch.float32)
    flat = [student.flatten(0, -2) for student in students]
    if not torch.is_grad_enabled():  # the function only sees requires_grad, and would compute gradients
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
            valid = (targets[part] != IGNORE_INDEX).float()
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
        of_students = (None if grad is None else grad * scale for grad in grads)
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
    """One chunk's sum; its gradients are written to ``grads`` and added to ``grad_weight``.

    With c = sum_v p_v log p_v and student logits z:  KL = c - p.z + logsumexp(z), and d KL / d z = q - p.
    """
    logits = _scaled(teacher @ weight.T, temperature)
    p = logits.softmax(dim=-1)
    # logsumexp is the largest logit minus the log of its probability, which is at least 1 / V.
    negative_entropy = _dot(p, logits) - (logits.amax(dim=-1) - p.amax(dim=-1).log())
    del logits
    total = valid.new_zeros(())
    for student, grad_student in zip(students, grads, strict=True):
        z = _scaled(student @ weight.T, temperature)
        agreement = _dot(p, z)
        top = z.amax(dim=-1, keepdim=True)
        exponentials = z.sub_(top).exp_()  # in the logits' memory, as is every step down to grad
        norm = exponentials.sum(dim=-1, keepdim=True)
        divergence = negative_entropy - agreement + (top + norm.log()).squeeze(1)
        total += (divergence * valid).sum() * temperature**2
        if grad_student is not None or grad_weight is not None:
            grad = exponentials.div_(norm).sub_(p)
            if temperature != 1:
                grad.mul_(temperature)  # T^2 / T
            grad = grad.to(student.dtype)
            # Tokens without a target are masked in [N, D], which is smaller than [N, V].
            kept = valid[:, None].to(student.dtype)
            if grad_student is not None:
                torch.mm(grad, weight, out=grad_student)
                grad_student.mul_(kept)
            if grad_weight is not None:
                accumulate(grad_weight, grad.T, student * kept)
            del grad
        del z, exponentials  # free the memory before the next student's logits
    return total


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Divided by the temperature, fp32, in place where possible."""
    return logits.float() if temperature == 1 else logits.float().div_(temperature)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row: [N, V], [N, V] -> [N]; on the CPU without materialising the product."""
    if left.is_cpu:
        return torch.bmm(left[:, None], right[:, :, None]).flatten()
    return (left * right).sum(dim=-1)  # a matrix product could be in TF32, too coarse for the small difference
