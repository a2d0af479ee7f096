"""The late-layer ensemble: the last k layers vote on the next token (Luo and Specia 2024, arXiv:2410.13077).

    x_1 .. x_k     residual stream after each of the last k layers; x_k is the final one
    n_i = norm_i(x_i)                                     a norm of its own for each, norm_k the decoder's final one
    w   = softmax(router(n_k) / temperature)              a weight for every layer and token; optionally the top m only
    logits = sum_i w_i (W n_i) = W (sum_i w_i n_i)        the head is linear: one product, whatever k is

The router's weights start at zero, so that the final layer has the weight ``final_weight`` on every token. During the
first ``open_by`` of the steps a bias that falls linearly to 0 is added to the final layer's logit, so that
the ensemble starts as the base model; see :meth:`LateLayers.open`.

Load balancing: Switch's (Fedus et al. 2021), ``balance x k x sum_i f_i P_i``, with P_i the mean weight of layer i and
f_i the share of tokens on which it is largest. f is that of the previous optimiser step (see :class:`Balance`), so the
term is a sum over tokens like the loss, the same however the batch is split.

Dimension letters: B batch, T tokens, N tokens that are voted on, D width, k late layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chunks import IGNORE_INDEX
from model.config import EnsembleConfig
from model.norm import RMSNorm
from model.schedules import Progress

_ALL_WEIGHT = 16.0
"""Logit of the final layer where it has all the weight: e^-16 is below fp32's rounding of the logits."""


class Vote(NamedTuple):
    """The late layers' vote.

    Attributes:
        normed: k tensors [..., D], each layer's normed state, the final layer's last.
        weights: fp32 [..., k].
        mixed: [..., D], the weighted sum: what the head reads.
    """

    normed: list[Tensor]
    weights: Tensor
    mixed: Tensor


class VoteSums(NamedTuple):
    """Sums over tokens with a target, for balancing and for the log; only ``weights`` carries a gradient."""

    weights: Tensor
    """fp32 [k]."""
    largest: Tensor
    """fp32 [k], tokens on which each layer has the largest weight."""
    entropy: Tensor
    """Of the weights, nats, fp32 scalar."""


def vote_sums(weights: Tensor, targets: Tensor) -> VoteSums:
    """Weights fp32 [..., k] and targets int64 [...] -> their sums where there is a target."""
    valid = (targets != IGNORE_INDEX).float()[..., None]
    kept = (weights * valid).flatten(0, -2)
    with torch.no_grad():
        largest = F.one_hot(weights.argmax(dim=-1), weights.shape[-1]).float() * valid
        entropy = -(torch.xlogy(weights, weights) * valid).sum()
    return VoteSums(kept.sum(0), largest.flatten(0, -2).sum(0), entropy)


class LateLayers(nn.Module):
    """Norms and router of the last k layers.

    Args:
        config: the ensemble's block.
        final_norm: the decoder's; the others begin as its copies.
    """

    def __init__(self, config: EnsembleConfig, final_norm: RMSNorm):
        super().__init__()
        self.config = config
        scale = final_norm.weight.detach()
        self.norms = nn.ModuleList(RMSNorm(scale.numel(), final_norm.epsilon) for _ in range(config.layers - 1))
        for norm in self.norms:
            norm.weight = nn.Parameter(scale.clone())
        self.router = LayerRouter(config, scale.numel()).to(scale.device, scale.dtype)

    def open(self, progress: Progress) -> None:
        """Set how far the other layers take part at this step: at step 0 not at all, from ``open_by`` on fully."""
        until = self.config.open_by * progress.steps
        full = _ALL_WEIGHT - _first_logit(self.config.layers, self.config.final_weight)
        self.router.closing_bias = full * (1 - progress.step / until) if progress.step < until else 0.0

    @torch.no_grad()
    def fold_closing_bias(self) -> None:
        """Make the current closing bias part of the router's bias: for a model that is no longer trained."""
        self.router.bias[-1] += self.router.closing_bias * self.config.temperature
        self.router.closing_bias = 0.0

    def forward(self, states: Sequence[Tensor], final_norm: nn.Module) -> Vote:
        """k residual streams [..., D], the final layer's last -> the vote."""
        normed = [norm(x) for norm, x in zip((*self.norms, final_norm), states, strict=True)]
        weights = self.router(normed[-1])
        shares = weights.to(normed[-1].dtype).unbind(-1)
        mixed = normed[-1] * shares[-1][..., None]
        for n, share in zip(normed[:-1], shares[:-1], strict=True):
            mixed = torch.addcmul(mixed, n, share[..., None])
        return Vote(normed, weights, mixed)


class LayerRouter(nn.Module):
    """Per-token weights over the late layers, from the final layer's normed state."""

    def __init__(self, config: EnsembleConfig, width: int):
        super().__init__()
        self.temperature, self.top = config.temperature, config.top
        self.weight = nn.Parameter(torch.zeros(config.layers, width))
        bias = torch.zeros(config.layers)
        bias[-1] = _first_logit(config.layers, config.final_weight) * config.temperature
        self.bias = nn.Parameter(bias)
        self.closing_bias = 0.0
        """Added to the final layer's logit."""

    def forward(self, h: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., k], adding up to 1; zero outside the ``top`` largest."""
        logits = F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype)).float() / self.temperature
        if self.closing_bias:
            logits = torch.cat((logits[..., :-1], logits[..., -1:] + self.closing_bias), dim=-1)
        if self.top is not None and self.top < logits.shape[-1]:
            chosen = logits.topk(self.top, dim=-1).indices  # by index: on a tie, values would let more in
            logits = torch.full_like(logits, -math.inf).scatter(-1, chosen, logits.gather(-1, chosen))
        return logits.softmax(dim=-1)


class Balance:
    """Prices on the late layers' weights, and the state that they come from.

    Args:
        config: the ensemble's block; None without an ensemble.
        device: where prices live.
    """

    def __init__(self, config: EnsembleConfig | None, device: torch.device | str = "cpu"):
        self.layers = 0 if config is None else config.layers
        self.coefficient = 0.0 if config is None else config.balance
        # Equal shares give every layer the same price, which adds a constant: no effect in the first step.
        self._shares = torch.full((self.layers,), 1 / max(self.layers, 1), dtype=torch.float32, device=device)

    def prices(self) -> Tensor:
        """Nats per unit of a layer's weight on a token with a target, fp32 [k]."""
        return self.coefficient * self.layers * self._shares

    def observe(self, largest: Tensor) -> None:
        """Update from the number of tokens on which each layer had the largest weight, [k], in the whole step."""
        self._shares = (largest / largest.sum().clamp(min=1)).float()

    def state_dict(self) -> dict[str, Tensor]:
        """What an exact resume needs."""
        return {"shares": self._shares.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state["shares"].shape != (self.layers,):
            raise ValueError(
                f"the checkpoint's ensemble has {state['shares'].numel()} layers, this one has {self.layers}; resume "
                "with the ensemble block that the run was started with"
            )
        self._shares = state["shares"].to(self._shares.device)


def _first_logit(layers: int, final_weight: float) -> float:
    """The final layer's logit that gives it ``final_weight`` against zero for all others."""
    if layers == 1:
        return 0.0
    others = (1 - final_weight) / (layers - 1)
    return _ALL_WEIGHT if others <= 0 else min(math.log(final_weight / others), _ALL_WEIGHT)
