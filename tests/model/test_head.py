"""The chunked loss against cross-entropy over full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.chunks as chunks_module
from model.chunks import IGNORE_INDEX
from model.head import LMHead

ROWS, WIDTH, VOCABULARY = 48, 16, 101


def inputs(dtype: torch.dtype = torch.float32) -> tuple[LMHead, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = LMHead(WIDTH, VOCABULARY)
    with torch.no_grad():
        head.weight.normal_(0, 0.5, generator=generator)
    hidden = torch.randn(4, ROWS // 4, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (4, ROWS // 4), generator=generator)
    targets[0, :5] = IGNORE_INDEX
    targets[3] = IGNORE_INDEX
    return head.to(dtype), hidden, targets


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Make the head hold ``rows`` rows of logits at once."""
    monkeypatch.setattr(chunks_module, "_CHUNK_LOGITS", dict.fromkeys(("cpu", "other"), rows * VOCABULARY))
    monkeypatch.setattr(chunks_module, "_CHUNK_ROWS_MIN", 1)


def full_logits(head: LMHead, hidden: Tensor, targets: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, nll and z as torch computes them, in fp32."""
    logits = F.linear(hidden.float(), head.weight.float()).flatten(0, 1)
    nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    squared = logits.logsumexp(-1).square()[targets.flatten() != IGNORE_INDEX].sum()
    return nll + z * squared, nll, squared


@pytest.mark.parametrize("z", [0.0, 0.01])
@pytest.mark.parametrize("chunk_rows", [1, 7, 16, ROWS, 1000])
def test_equals_cross_entropy(z: float, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, chunk_rows)
    head, hidden, targets = inputs()
    expected = full_logits(head, hidden, targets, z)
    wanted = torch.autograd.grad(expected[0] / 7, (hidden, head.weight))
    sums = head(hidden, targets, z)
    for value, right in zip(sums[:3], expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-5)
    found = torch.autograd.grad(sums.loss / 7, (hidden, head.weight))
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)
    assert not sums.nll.requires_grad and not sums.z.requires_grad


@pytest.mark.parametrize("z", [0.0, 0.01])
def test_bf16(z: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 16)
    head, hidden, targets = inputs(torch.bfloat16)
    expected = full_logits(head, hidden, targets, z)
    wanted = torch.autograd.grad(expected[0] / 7, (hidden, head.weight))
    sums = head(hidden, targets, z)
    assert sums.loss.dtype == torch.float32
    torch.testing.assert_close(sums.loss, expected[0], rtol=3e-3, atol=0)
    for value, right in zip(torch.autograd.grad(sums.loss / 7, (hidden, head.weight)), wanted, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value - right).float().norm() < 0.01 * right.float().norm()


def test_bf16_weight_gradient_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time: in bf16 the sum of the small remainders would be lost in the large ones."""
    head, hidden, targets = inputs(torch.bfloat16)
    (whole,) = torch.autograd.grad(head(hidden, targets).loss, head.weight)
    small_chunks(monkeypatch, 1)
    (pieces,) = torch.autograd.grad(head(hidden, targets).loss, head.weight)
    error = float((pieces - whole).float().norm() / whole.float().norm())
    assert error < 0.0035  # 0.0022 with an fp32 sum, 0.0053 with one in bf16


def test_bf16_gradients_are_scaled_in_fp32() -> None:
    """The trainer's 1 / valid tokens is no bf16 number: rounded to one, every gradient would be off by 0.1 % here."""
    head, hidden, targets = inputs(torch.bfloat16)
    whole = torch.autograd.grad(head(hidden, targets).loss, (hidden, head.weight))
    scaled = torch.autograd.grad(head(hidden, targets).loss / 2900, (hidden, head.weight))
    for w, s in zip(whole, scaled, strict=True):
        ratio = s.float().abs().sum() * 2900 / w.float().abs().sum()
        assert abs(float(ratio) - 1) < 3e-4


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    head, hidden, targets = inputs()
    loss = head(hidden, torch.full_like(targets, IGNORE_INDEX), 0.1).loss
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not head.weight.grad.any()


def test_large_logits_stay_finite() -> None:
    head, hidden, targets = inputs()
    loss = head(hidden * 1e4, targets, 0.0).loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


def test_gradient_of_one_input_only() -> None:
    head, hidden, targets = inputs()
    expected = torch.autograd.grad(head(hidden, targets).loss, (hidden, head.weight))
    (only_hidden,) = torch.autograd.grad(head.requires_grad_(False)(hidden, targets).loss, hidden)
    assert torch.equal(only_hidden, expected[0])
    loss = head.requires_grad_(True)(hidden.detach(), targets).loss
    (only_weight,) = torch.autograd.grad(loss, head.weight)
    assert torch.equal(only_weight, expected[1])


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, and how many matrix products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


def test_never_holds_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 8)
    head, hidden, targets = inputs()
    with Watch() as watch:
        head(hidden, targets, 0.01).loss.backward()
    assert watch.largest == max(WIDTH, 8) * VOCABULARY < ROWS * VOCABULARY
    with Watch() as watch:
        full_logits(head, hidden, targets, 0.01)[0].backward()
    assert watch.largest >= ROWS * VOCABULARY  # the watch sees what it is meant to see


def test_evaluation_computes_no_gradient() -> None:
    head, hidden, targets = inputs()
    with Watch() as watch, torch.no_grad():
        evaluated = head(hidden, targets, 0.01)
    assert watch.products == 1
    with Watch() as watch:
        trained = head(hidden, targets, 0.01)
    assert watch.products == 3
    assert torch.equal(evaluated.loss, trained.loss.detach())
