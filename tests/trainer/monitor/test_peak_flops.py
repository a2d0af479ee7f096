"""The peak that MFU is a share of: products as layers make them, the best of them, and quick about it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from trainer.distributed import ALONE, World
from trainer.monitor import peak_flops
from trainer.monitor.peak_flops import _PRODUCTS, DTYPES, PeakFlops, Product, measure_peak

CPU = torch.device("cpu")


def test_the_products_are_those_of_a_linear_layer() -> None:
    x, w, dy = (torch.randn(*shape, requires_grad=True) for shape in ((5, 3), (4, 3), (5, 4)))
    y = functional.linear(x, w)
    y.backward(dy)
    assert torch.equal(_PRODUCTS["y"](x, w), y)
    torch.testing.assert_close(_PRODUCTS["dx"](dy, w), x.grad)
    torch.testing.assert_close(_PRODUCTS["dw"](dy, x), w.grad)
    assert Product("y", 256).flops == 2 * 256**3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_takes_the_best_and_is_quick(precision: str) -> None:
    torch.manual_seed(3)
    untouched = torch.get_rng_state()
    begun_s = time.process_time()
    fastest = PeakFlops(CPU, DTYPES[precision])
    assert time.process_time() - begun_s < 0.6 * torch.get_num_threads()
    assert torch.equal(torch.get_rng_state(), untouched)
    rates = {product: product.flops / seconds for product, seconds in fastest.seconds.items()}
    assert {name for name, _ in rates} == {"y", "dx", "dw"}
    assert fastest.flops_per_s == max(rates.values()) > fastest.layer_flops_per_s > 0
    before = fastest.flops_per_s
    fastest()
    assert fastest.flops_per_s >= before


def test_what_is_far_slower_is_not_tried_at_larger_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without bf16 instructions, where one layout is twenty times slower: it would take minutes."""

    def slow(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return torch.mm(left, right)

    monkeypatch.setitem(_PRODUCTS, "dx", slow)
    monkeypatch.setattr(peak_flops, "_SURVEY_S", 1.0)  # on a busy machine a quarter may not be enough
    fastest = PeakFlops(CPU, torch.float32)
    assert [size for name, size in fastest.seconds if name == "dx"] == [256]
    assert max(size for name, size in fastest.seconds if name == "y") > 256
    assert fastest.layer_flops_per_s < fastest.flops_per_s / 2


def test_a_first_call_that_loads_libraries_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuBLAS is loaded in: longer than the whole survey, after which nothing but the smallest was tried."""
    called: list[int] = []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        called.append(1)
        if len(called) == 1:
            time.sleep(2.0)
        return torch.mm(left, right)

    monkeypatch.setitem(_PRODUCTS, "y", product)
    monkeypatch.setattr(peak_flops, "_SURVEY_S", 1.0)
    assert max(size for name, size in PeakFlops(CPU, torch.float32).seconds if name == "y") > 256


def test_the_peak_is_the_mean_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(World):
        def all_gather_objects(self, value: float) -> list[float]:
            return [value, 3 * value]

    assert 1e8 < measure_peak(ALONE, "fp32") < 1e16
    monkeypatch.setattr(peak_flops, "PeakFlops", lambda device, dtype: SimpleNamespace(flops_per_s=2.0))
    assert measure_peak(Two(0, 2, 0, 2, CPU), "fp32") == 4.0
