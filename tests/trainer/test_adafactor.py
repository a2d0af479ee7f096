"""Adafactor against its formulas written out in numpy, and at work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.trainer.one_rank import losses
from trainer.adafactor import Adafactor
from trainer.config import PretrainConfig
from trainer.distributed import World


class Reference:
    """Shazeer and Stern 2018, algorithms 4 and 5 without momentum, entry by entry in float64."""

    def __init__(self, x: np.ndarray, lr: float, beta2: float, weight_decay: float):
        self.x, self.lr, self.beta2, self.weight_decay = x.astype(np.float64), lr, beta2, weight_decay
        self.mean_square = np.zeros_like(self.x)  # whole: factored only when it is read
        self.steps = 0

    def step(self, grad: np.ndarray) -> None:
        self.steps += 1
        self.mean_square = self.beta2 * self.mean_square + (1 - self.beta2) * (grad**2 + 1e-30)
        moment = self.mean_square / (1 - self.beta2**self.steps)
        if grad.ndim == 2:
            rows, columns = moment.mean(1), moment.mean(0)
            factored = np.empty_like(moment)
            for i in range(grad.shape[0]):
                for j in range(grad.shape[1]):
                    factored[i, j] = rows[i] * columns[j] / moment.mean()
            moment = factored
        update = grad / np.sqrt(moment)
        update /= max(1.0, float(np.sqrt((update**2).mean())))
        scale = self.lr * max(1e-3, float(np.sqrt((self.x**2).mean())))
        self.x = self.x * (1 - self.lr * self.weight_decay) - scale * update


@pytest.mark.parametrize("shape", [(5, 7), (6,)])
@pytest.mark.parametrize("size", [1.0, 0.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_follow_the_formulas(shape: tuple[int, ...], size: float, weight_decay: float) -> None:
    """The mean of rows and columns of running squares is the running mean of rows and columns: linear."""
    rng = np.random.default_rng(3)
    start = rng.normal(size=shape) * size  # from zero, smallest_scale moves it
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = Adafactor([{"params": [parameter], "weight_decay": weight_decay}], lr=0.05, beta2=0.9)
    reference = Reference(start, lr=0.05, beta2=0.9, weight_decay=weight_decay)
    for step in range(12):
        grad = rng.normal(size=shape) * 10.0 ** (step % 4 - 2)  # the last ones far above the mean: clipped to RMS 1
        parameter.grad = torch.tensor(grad, dtype=torch.float32)
        optimizer.step()
        reference.step(grad)
        np.testing.assert_allclose(parameter.detach().numpy(), reference.x, rtol=2e-5, atol=1e-7)
    assert np.abs(reference.x - start).max() > 1e-4


def test_state_is_a_row_and_a_column() -> None:
    matrix, vector, idle = (torch.nn.Parameter(torch.ones(s)) for s in ((30, 20), (9,), (4, 4)))
    matrix.grad, vector.grad = torch.ones(30, 20), torch.ones(9)
    optimizer = Adafactor([matrix, vector, idle], lr=0.1)
    assert optimizer.step(lambda: 2.5) == 2.5
    sizes = {k: v.numel() for k, v in optimizer.state[matrix].items() if isinstance(v, torch.Tensor)}
    assert sizes == {"row": 30, "column": 20}
    assert optimizer.state[vector]["full"].shape == (9,)
    assert not optimizer.state[idle] and torch.equal(idle, torch.ones(4, 4))


def test_it_solves_a_small_regression() -> None:
    torch.manual_seed(0)
    inputs, truth = torch.randn(64, 8), torch.randn(8, 3)
    weight, bias = torch.nn.Parameter(torch.randn(8, 3) * 0.1), torch.nn.Parameter(torch.zeros(3))
    optimizer = Adafactor([weight, bias], lr=0.1)
    errors = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.97 ** max(step - 150, 0)
        optimizer.zero_grad()
        error = (inputs @ weight + bias - inputs @ truth - 1.0).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 1e-2 < 1.0 < errors[0]


def test_it_trains_inside_deepspeed_in_either_precision(configure: Callable[..., PretrainConfig], world: World) -> None:
    adafactor = ("deepspeed.zero_stage=0", "train.optimizer.kind=adafactor", "train.optimizer.lr=0.02")
    fp32 = losses(configure(*adafactor, "train.steps=8"), world, 8)
    assert fp32[-1] < fp32[0] - 0.03
    assert losses(configure("train.precision=bf16"), world, 8) == pytest.approx(fp32, rel=2e-3)
