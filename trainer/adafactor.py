"""Adafactor (Shazeer and Stern 2018) with the settings of Zeng et al. 2023: no momentum, constant beta2.

``torch.optim.Adafactor`` cannot express them: its beta2 grows with the step (1 - t^decay) and its rate is capped by
1 / sqrt(t).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Adafactor(torch.optim.Optimizer):
    """Second moments kept as a row and a column mean per matrix; updates clipped to RMS 1.

    Args:
        params: parameters or groups.
        lr: relative step: an update moves a parameter by ``lr`` times the parameter's own RMS.
        beta2: decay of the second moment.
        weight_decay: decoupled weight decay.
        epsilon: added to squared gradients.
        smallest_scale: lower bound on a parameter's RMS in the step size, so that zeros can move.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        beta2: float = 0.99,
        weight_decay: float = 0.0,
        epsilon: float = 1e-30,
        smallest_scale: float = 1e-3,
    ):
        defaults = {"lr": lr, "beta2": beta2, "weight_decay": weight_decay, "epsilon": epsilon}
        super().__init__(params, {**defaults, "smallest_scale": smallest_scale})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            shapes = {"row": grad.shape[:-1], "column": grad.shape[:-2] + grad.shape[-1:]}
            for name, shape in (shapes if grad.dim() > 1 else {"full": grad.shape}).items():
                state[name] = torch.zeros(shape, dtype=torch.float32, device=grad.device)
        state["step"] += 1
        beta2 = group["beta2"]
        square = grad.square() + group["epsilon"]
        unbias = 1 - beta2 ** state["step"]
        if grad.dim() > 1:
            row = state["row"].lerp_(square.mean(-1), 1 - beta2) / unbias
            column = state["column"].lerp_(square.mean(-2), 1 - beta2) / unbias
            moment = (row / row.mean(-1, keepdim=True))[..., None] * column[..., None, :]
        else:
            moment = state["full"].lerp_(square, 1 - beta2) / unbias
        update = grad * moment.rsqrt()
        update /= _rms(update).clamp(min=1.0)
        scale = group["lr"] * _rms(parameter.float()).clamp(min=group["smallest_scale"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_((scale * update).to(parameter.dtype))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
