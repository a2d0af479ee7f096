"""The peak for MFU: the fastest matrix product measured on a device in a dtype.

A linear layer computes three products, each with its own memory layout, which a library may handle well or badly:

    y = x w^T        dx = dy w        dw = dy^T x

On a CPU without bf16 instructions their speeds differ by up to a factor of twenty. All three are tried at several
sizes, small ones first; those far slower than the fastest, or that would take too long, are not tried at larger sizes.
Training and benchmarks use the same peak; a layer consists of these products and more, so it cannot be faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trainer.distributed import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by their names in configs and on command lines."""
_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "y": functional.linear,
    "dx": torch.mm,
    "dw": lambda left, right: torch.mm(left.t(), right),
}
_BLOCK = 256
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Side lengths of the square matrices: multiples of ``_BLOCK``."""
_SURVEY_S = 0.25
_FAR_SLOWER = 0.5
_LEADERS = 3


class Product(NamedTuple):
    """One of ``_PRODUCTS`` at one of ``_SIZES``."""

    name: str
    size: int

    @property
    def flops(self) -> float:
        """FLOPs of one call."""
        return 2.0 * self.size**3


class PeakFlops:
    """Measures on construction, for about a quarter of a second, and the fastest products again at every call.

    Args:
        device: the device to measure.
        dtype: of the operands.

    Attributes:
        seconds: time of the fastest call of each product that was tried.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.seconds: dict[Product, float] = {}
        # A generator of its own: those of a run are part of what a resume restores.
        own = torch.Generator(device).manual_seed(0)
        self._blocks = [torch.randn(_BLOCK, _BLOCK, device=device, generator=own).to(dtype) for _ in range(2)]
        self._operands: dict[int, list[Tensor]] = {}
        for multiply in _PRODUCTS.values():  # untimed: the first call loads the device's libraries
            seconds_of(partial(multiply, *self._blocks), device)
        end_s = time.perf_counter() + _SURVEY_S
        for size in _SIZES:
            for name in _PRODUCTS:
                self._try(Product(name, size), end_s - time.perf_counter())
        while time.perf_counter() < end_s:
            for product in [p for p in self.seconds if self._rate(p) > _FAR_SLOWER * self.flops_per_s]:
                self._measure(product)

    def __call__(self) -> None:
        """Measure the fastest products once more."""
        leaders = sorted(self.seconds, key=self._rate, reverse=True)[:_LEADERS]
        sizes = {product.size for product in leaders}
        self._operands = {size: operands for size, operands in self._operands.items() if size in sizes}
        for product in leaders:
            self._measure(product)

    @property
    def flops_per_s(self) -> float:
        """FLOP/s of the fastest product so far."""
        return max(map(self._rate, self.seconds))

    @property
    def layer_flops_per_s(self) -> float:
        """FLOP/s of the three products of a small layer in sequence, which one slow product holds up."""
        layer = [Product(name, _SIZES[0]) for name in _PRODUCTS]
        return sum(product.flops for product in layer) / sum(self.seconds[product] for product in layer)

    def _rate(self, product: Product) -> float:
        return product.flops / self.seconds[product]

    def _try(self, product: Product, left_s: float) -> None:
        """Measure it twice, the first call being slow, unless it is far too slow or would exceed ``left_s``."""
        if product.size > _SIZES[0]:
            tried = [p for p in self.seconds if p.name == product.name]
            last = max(p.size for p in tried)
            beside = max(self._rate(p) for p in self.seconds if p.size == last)  # small ones are all launch-bound
            rate = self._rate(Product(product.name, last))
            if rate < _FAR_SLOWER * beside or 2 * product.flops / rate > left_s:
                return
        for _ in range(2):
            self._measure(product)

    def _measure(self, product: Product) -> None:
        if product.size not in self._operands:
            times = product.size // _BLOCK
            self._operands[product.size] = [block.repeat(times, times) for block in self._blocks]
        left, right = self._operands[product.size]
        call_s = seconds_of(lambda: _PRODUCTS[product.name](left, right), self.device)
        self.seconds[product] = min(call_s, self.seconds.get(product, math.inf))


def measure_peak(world: World, precision: str) -> float:
    """Peak FLOP/s of one device, the mean over ranks that measure at the same time; collective."""
    own = PeakFlops(world.device, DTYPES[precision]).flops_per_s
    return sum(world.all_gather_objects(own)) / world.size


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``call`` takes, until ``device`` has finished."""
    _wait(device)
    start_s = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
