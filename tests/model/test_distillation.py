"""Chunked distillation against full logits, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.chunks as chunks_module
from bench.common.memory import peak_bytes
from model.chunks import IGNORE_INDEX
from model.distillation import distillation

WIDTH, VOCABULARY = 16, 101


def inputs(layers: int, tokens: int, vocabulary: int = VOCABULARY) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Students, teacher, weight and targets."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(tokens, WIDTH, generator=generator).requires_grad_() for _ in range(layers)]
    weight = (0.5 * torch.randn(vocabulary, WIDTH, generator=generator)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::3] = IGNORE_INDEX
    return states[:-1], states[-1], weight, targets


def full(students: list[Tensor], teacher: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The same over all logits at once."""
    p = F.linear(teacher.detach(), weight.detach()).div(temperature).log_softmax(-1)
    kl = [
        F.kl_div(F.linear(s, weight).div(temperature).log_softmax(-1), p, reduction="none", log_target=True).sum(-1)
        for s in students
    ]
    return temperature**2 * (sum(kl) * (targets != IGNORE_INDEX)).sum()


@pytest.mark.parametrize("rows", [1, 7, 48, 1000])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_equals_the_divergence_over_full_logits(rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "_CHUNK_LOGITS", dict.fromkeys(("cpu", "other"), rows * VOCABULARY))
    monkeypatch.setattr(chunks_module, "_CHUNK_ROWS_MIN", 1)
    students, teacher, weight, targets = inputs(4, 48)
    ours = distillation(students, teacher, weight, targets, temperature)
    theirs = full(students, teacher, weight, targets, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    learners = (*students, weight)
    found, wanted = torch.autograd.grad(ours / 7, learners), torch.autograd.grad(theirs / 7, learners)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    students, teacher, weight, targets = inputs(3, 20)
    distillation(students, teacher, weight, targets).backward()
    assert teacher.grad is None and all(student.grad is not None for student in students)


def test_bf16_keeps_the_sum_in_fp32() -> None:
    students, teacher, weight, targets = inputs(3, 60)
    low = [t.detach().bfloat16().requires_grad_() for t in (*students, teacher, weight)]
    ours = distillation(low[:2], low[2], low[3], targets)
    assert ours.dtype == torch.float32
    upcast = [t.detach().float().requires_grad_() for t in low]
    torch.testing.assert_close(ours, full(upcast[:2], upcast[2], upcast[3], targets, 1.0), rtol=2e-2, atol=0)
    (ours / 7).backward()  # a factor that bf16 has not: the gradient must have it all the same
    assert low[0].grad is not None and low[0].grad.dtype == torch.bfloat16
    (full(upcast[:2], upcast[2], upcast[3], targets, 1.0) / 7).backward()
    assert upcast[0].grad is not None
    ratio = (low[0].grad.float() * upcast[0].grad).sum() / upcast[0].grad.square().sum()
    assert abs(float(ratio) - 1) < 2e-3


def test_one_that_already_agrees_costs_nothing() -> None:
    _, teacher, weight, targets = inputs(1, 30)
    student = teacher.detach().clone().requires_grad_()
    loss = distillation([student], teacher, weight, targets)
    loss.backward()
    assert abs(float(loss)) < 1e-5 and student.grad is not None and student.grad.abs().max() < 1e-6


def test_without_students_or_gradients_there_is_nothing_to_do() -> None:
    students, teacher, weight, targets = inputs(2, 10)
    assert float(distillation([], teacher, weight, targets)) == 0
    with torch.no_grad():
        assert not distillation(students, teacher, weight, targets).requires_grad


def test_peak_memory_does_not_grow_with_vocabulary_tokens_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the gradients it returns it holds a few chunks of logits; full logits would be k x tokens x vocabulary."""
    vocabulary, rows, scalar = 3000, 64, 4
    monkeypatch.setattr(chunks_module, "_CHUNK_LOGITS", dict.fromkeys(("cpu", "other"), rows * vocabulary))
    monkeypatch.setattr(chunks_module, "_CHUNK_ROWS_MIN", 1)

    def beyond_gradients(layers: int, tokens: int) -> int:
        students, teacher, weight, targets = inputs(layers, tokens, vocabulary)
        distillation(students, teacher, weight, targets)  # what happens only once
        peak = peak_bytes(lambda: distillation(students, teacher, weight, targets), torch.device("cpu"))
        gradients = scalar * (weight.numel() + sum(s.numel() for s in students))
        return peak - gradients

    chunk = rows * vocabulary * scalar
    few, many = beyond_gradients(2, 256), beyond_gradients(8, 2048)
    assert few < 2.2 * chunk
    assert many - few < chunk / 4  # 7 x 2048 instead of 1 x 256 rows of logits
