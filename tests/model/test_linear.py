"""Linear maps of few rows give what ``torch.nn.Linear`` gives, and leave training as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.linear import FEW_ROWS, Linear, weight_first


class Products(TorchDispatchMode):
    """Shapes of the results of all matrix products inside, and strides of their second factors."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.strides: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.append(tuple(out.shape))
            self.strides.append(args[1].stride())
        return out


@pytest.fixture(autouse=True)
def _no_weight_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.linear.FEW_WEIGHTS", 0)


def layers(dtype: torch.dtype = torch.float32) -> tuple[Linear, nn.Linear]:
    ours, usual = Linear(48, 20).to(dtype), nn.Linear(48, 20, bias=False).to(dtype)
    usual.load_state_dict(ours.state_dict())
    return ours, usual


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (1, 1, 48), (2, 48), (2, 3, 48), (8, 1, 48), (9, 48), (4, 70, 48)])
def test_the_same_numbers_in_the_same_shape(
    shape: tuple[int, ...], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.linear.weight_first", lambda: first)
    ours, usual = layers()
    x = rows_of(*shape)
    with Products() as products:
        found = ours(x)
    torch.testing.assert_close(found, usual(x), rtol=0, atol=1e-5)
    rows = x.numel() // 48
    assert products.shapes == [(20, max(rows, 2)) if first and 0 < rows <= FEW_ROWS else (rows, 20)]
    assert found.is_contiguous()
    strided = rows_of(*shape[:-1], 96)[..., ::2]
    torch.testing.assert_close(ours(strided), usual(strided), rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_are_made_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.linear.weight_first", lambda: True)
    ours, usual = layers()
    x = rows_of(48, 4).t()  # as another such product leaves them
    with Products() as products:
        found = ours(x)
    assert products.strides == [(1, 48)]
    torch.testing.assert_close(found, usual(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_small_weight_keeps_the_usual_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.linear.weight_first", lambda: True)
    monkeypatch.setattr("model.linear.FEW_WEIGHTS", 48 * 20 + 1)
    ours, _ = layers()
    with Products() as products:
        ours(rows_of(4, 48))
    assert products.shapes == [(4, 20)]


def test_training_and_other_dtypes_take_the_usual_product() -> None:
    ours, usual = layers()
    with Products() as products:
        assert torch.equal(ours(rows_of(2, 48)), usual(rows_of(2, 48)))
    assert products.shapes == [(2, 20)] * 2
    ours, usual = layers(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(ours(rows_of(2, 48).bfloat16()), usual(rows_of(2, 48).bfloat16()))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False), (None, False)],
)
def test_on_which_cpus_the_weight_comes_first(
    facts: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr("model.linear.Path", lambda _: tmp_path / "cpuinfo")
    assert weight_first.__wrapped__() is expected
