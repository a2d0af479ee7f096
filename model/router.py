"""Routers: which tokens execute a site.

The learned router is Zeng et al. 2023, section 3: a bias-free linear map to two logits (skip, execute) per token,
Gumbel noise and a hard decision forward, the soft gate's gradient backward (straight-through), the larger logit
without noise in evaluation. The softmax over two logits with two Gumbels is a sigmoid of their difference with one
logistic, so one uniform number per token is drawn. Logits are computed in fp32 whatever the model's dtype: in bf16
a decision near the border would flip between prefill and decoding.

The other kinds are baselines at the same density.

Dimension letters: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import noise
from model.config import RouterConfig


class Gate(NamedTuple):
    """A site's decisions.

    Attributes:
        executed: bool [B, T].
        value: fp32 [B, T], what an executed token's output is multiplied by: exactly 1 where executed and 0 elsewhere
            for causal kinds, with the soft gate's gradient; expert choice weighs by its score.
    """

    executed: Tensor
    value: Tensor


@dataclass(frozen=True)
class RoutingInputs:
    """What routers read besides the hidden states.

    Attributes:
        sample_ids: int64 [B], the samples' global numbers, for reproducible noise.
        positions: int64 [T], token positions in the sample (they do not restart at documents).
        noise_scale: fp32 scalar tensor, the Gumbel noise's scale; read in training mode only.
        temperature: fp32 scalar tensor of the soft gate; read in training mode only.
        seed: the run's seed.
    """

    sample_ids: Tensor
    positions: Tensor
    noise_scale: Tensor
    temperature: Tensor
    seed: int


class LearnedRouter(nn.Module):
    """Zeng et al. 2023: ``d_model -> 2`` logits (skip, execute), straight-through Gumbel-softmax."""

    def __init__(self, config: RouterConfig, width: int, site: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width))
        self.site = site

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D] -> decisions [B, T]."""
        margin = _margin(x, self.weight)
        if not self.training:
            executed = margin >= 0
            return Gate(executed, executed.float())
        u = noise.uniform(inputs.seed, inputs.sample_ids, self.site, inputs.positions)
        margin = margin + inputs.noise_scale * torch.logit(u)
        executed = margin >= 0
        soft = torch.sigmoid(margin / inputs.temperature)
        # Added in this order the forward value is exactly 0 or 1: soft - soft is exactly 0.
        return Gate(executed, executed.float() + (soft - soft.detach()))


class RandomRouter(nn.Module):
    """Every token executes with probability P, by the hash of its place: the same in every epoch and evaluation."""

    def __init__(self, config: RouterConfig, width: int, site: int):
        super().__init__()
        self.density, self.site = config.density, site

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D], read for nothing but its batch size."""
        u = noise.uniform(inputs.seed, inputs.sample_ids, self.site, inputs.positions)
        executed = u < self.density
        return Gate(executed, executed.float())


class StrideRouter(nn.Module):
    """Evenly spaced tokens, exactly P of them, with another phase at every site."""

    def __init__(self, config: RouterConfig, width: int, site: int):
        super().__init__()
        self.density, self.phase = config.density, (site * 0.6180339887498949) % 1.0

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D], read for nothing but its batch size."""
        steps = inputs.positions.double()
        # Both ends of a token's step by the same formula: "start + density" rounds apart from the next start.
        start, end = steps * self.density + self.phase, (steps + 1) * self.density + self.phase
        executed = torch.floor(end) > torch.floor(start)
        executed = executed.expand(x.shape[0], -1)
        return Gate(executed, executed.float())


class ExpertChoiceRouter(nn.Module):
    """Raposo et al. 2024: the P x T tokens of the sequence with the highest scores, output weighted by the score.

    Not causal: whether a token executes depends on later ones. A baseline for training and perplexity, refused for
    generation.
    """

    def __init__(self, config: RouterConfig, width: int, site: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width))
        self.density = config.density

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D] -> decisions [B, T]."""
        margin = _margin(x, self.weight)
        chosen = margin.topk(max(round(self.density * margin.shape[1]), 1), dim=1).indices
        executed = torch.zeros_like(margin, dtype=torch.bool).scatter(1, chosen, True)
        return Gate(executed, torch.where(executed, torch.sigmoid(margin), 0.0))


ROUTERS: dict[str, type[nn.Module]] = {
    "learned": LearnedRouter,
    "random": RandomRouter,
    "stride": StrideRouter,
    "expert_choice": ExpertChoiceRouter,
}


def _margin(x: Tensor, weight: Tensor) -> Tensor:
    """Execute logit minus skip logit, fp32 [B, T]."""
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.float(), weight.float())
    return logits[..., 1] - logits[..., 0]
