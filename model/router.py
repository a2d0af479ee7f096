"""Routers: which tokens execute a site.

The learned router is Zeng et al. 2023, section 3: a bias-free linear map to two logits (skip, execute) per token,
Gumbel noise and a hard decision forward, the soft gate's gradient backward (straight-through), the larger logit
without noise in evaluation. The softmax over two logits with two Gumbels is a sigmoid of their difference with one
logistic, so one uniform number per token is drawn. Logits are computed in fp32 whatever the model's dtype: in bf16
a close decision would flip between prefill and decoding.

The other kinds are baselines at the same density.

Dimension letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import noise
from model.config import RouterConfig
from model.linear import linear
from model.sequence import SequenceGroup

_EXPLORATION = 1 << 32
"""Added to the seed, so that exploration is independent of the noise."""


class Gate(NamedTuple):
    """A site's decisions. Rarely used values are computed on demand: a decoding step is a chain of small operations.

    Attributes:
        decided: bool [B, T], :attr:`executed`; None where that is the greedy decision by ``logits``.
        soft: fp32 [B, T], :attr:`value` where it is more than ``executed`` as a number: in training, and for expert
            choice.
        logits: fp32 [B, T, 2], skip and execute; only of a learned router in evaluation mode.
        threshold: fp32 [1], the least margin of a token that executes by ``logits``; 0 unless given.
        explored: bool [B, T], skipped tokens whose gates learn from what the site would have added; None where none do.
        noisy_margin: fp32 [B, T], what was compared with the site's threshold in training, without a gradient; None
            where thresholds do not follow it.
        input_sum: fp32 [D], sum over the tokens of what the router read; None likewise.
    """

    decided: Tensor | None
    soft: Tensor | None = None
    logits: Tensor | None = None
    threshold: Tensor | None = None
    explored: Tensor | None = None
    noisy_margin: Tensor | None = None
    input_sum: Tensor | None = None

    @property
    def executed(self) -> Tensor:
        """bool [B, T]."""
        if self.decided is not None:
            return self.decided
        assert self.logits is not None
        skip, execute = self.logits.unbind(-1)
        return execute >= skip if self.threshold is None else execute - skip >= self.threshold

    def rows(self) -> list[bool]:
        """:attr:`executed` for one token per row, as a list, which is faster on the host than a tensor."""
        if self.decided is not None or self.logits is None or self.threshold is not None:
            return self.executed.flatten().tolist()
        return [execute >= skip for [[skip, execute]] in self.logits.tolist()]

    @property
    def value(self) -> Tensor:
        """fp32 [B, T], what an executed token's output is multiplied by.

        Exactly 1 where executed and 0 elsewhere for causal kinds, with the soft gate's gradient in training; expert
        choice weights by its score.
        """
        return self.executed.float() if self.soft is None else self.soft

    @property
    def margin(self) -> Tensor | None:
        """fp32 [B, T], execute logit minus skip logit; None without logits."""
        return None if self.logits is None else _difference(self.logits)


class Centres(NamedTuple):
    """What the soft gates of sites with a threshold are centred on, from previous steps.

    Attributes:
        margin: fp32 [S], where a site's soft gate is 1/2.
        input: fp32 [S, D], mean of what its router read; None in the first step, in which nothing is learned.
    """

    margin: Tensor
    input: Tensor | None


@dataclass(frozen=True)
class RoutingInputs:
    """What routers read besides the hidden states.

    Attributes:
        sample_ids: int64 [B], the samples' global numbers, for reproducible noise.
        positions: int64 [T], token positions in the sample (they do not restart at documents); [B, T] where rows begin
            after padding, which does not count.
        noise_scale: fp32 scalar tensor, the Gumbel noise's scale; read in training mode only.
        temperature: fp32 scalar tensor of the soft gate; read in training mode only.
        seed: the run's seed.
        thresholds: fp32 [S]; a learned router executes a token whose margin reaches its site's threshold, 0 unless
            given.
        centres: what soft gates are centred on; the thresholds unless given. Read in training mode only.
        explored_tokens: how many skipped tokens of a window are explored; each by chance unless given. Read in training
            mode only.
        recompute: what routers read is recomputed in the backward pass, and not kept until then.
        sequence: the ranks that share the windows; None where every rank has whole ones.
    """

    sample_ids: Tensor
    positions: Tensor
    noise_scale: Tensor
    temperature: Tensor
    seed: int
    thresholds: Tensor | None = None
    centres: Centres | None = None
    explored_tokens: int | None = None
    recompute: bool = False
    sequence: SequenceGroup | None = None


class Router(nn.Module):
    """A router of one site. The site's number is a tensor, so that compiled code is the same for all sites."""

    site: Tensor

    def __init__(self, config: RouterConfig, width: int, site: int):
        super().__init__()
        self.config = config
        self.register_buffer("site", torch.tensor(site), persistent=False)


class LearnedRouter(Router):
    """Zeng et al. 2023: ``d_model -> 2`` logits (skip, execute), straight-through Gumbel-softmax."""

    def __init__(self, config: RouterConfig, width: int, site: int):
        super().__init__(config, width, site)
        self.weight = nn.Parameter(torch.empty(2, width))

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D] -> decisions [B, T]."""
        # Detached: the layers below get no gradient from a router. Through the residual stream the gates' gradients
        # would multiply from site to site, until clipping leaves nothing of the language model's (docs/method.md).
        logits = _logits(x.detach() if torch.is_grad_enabled() else x, self.weight, inputs.recompute)
        if not self.training:
            return Gate(None, None, logits, None if inputs.thresholds is None else self._own(inputs.thresholds))
        margin = _difference(logits) + inputs.noise_scale * torch.logit(self._uniform(inputs))
        thresholds, noisy, input_sum = inputs.thresholds, None, None
        if thresholds is None:
            executed = margin >= 0
        else:
            threshold = self._own(thresholds)
            executed = margin >= threshold
            if inputs.centres is None:
                margin = margin - threshold
            else:
                noisy, input_sum = margin.detach(), x.detach().sum((0, 1), dtype=torch.float32)
                margin = self._centred(margin, inputs.centres)
        soft = torch.sigmoid(margin / inputs.temperature)
        # In this order the forward value is exactly 0 or 1: soft - soft is exactly 0.
        learning = soft - soft.detach()
        if not (self.config.explores and inputs.explored_tokens != 0 and torch.is_grad_enabled()):
            return Gate(executed, executed.float() + learning, noisy_margin=noisy, input_sum=input_sum)
        explored, chance = self._explored(executed, inputs)
        # An explored token stands in for all skipped ones. The others get no gradient, not even from the price, which
        # alone would drive every skipped token further away.
        learning = learning * torch.where(executed, 1.0, explored / chance)
        return Gate(executed, executed.float() + learning, None, None, explored, noisy, input_sum)

    def _centred(self, margin: Tensor, centres: Centres) -> Tensor:
        """``margin`` [B, T] minus its site's centre, with the gradient of the same router on the input minus its mean.

        Most of a gate's gradient is common to all tokens: executing helps. It would move all margins together, and the
        threshold after them.
        """
        common = margin if centres.input is None else _difference(_logits(self._own(centres.input), self.weight))
        return margin - (common - common.detach()) - self._own(centres.margin)

    def _explored(self, executed: Tensor, inputs: RoutingInputs) -> tuple[Tensor, Tensor | float]:
        """Which skipped tokens are explored, bool [B, T], and the chance each skipped one had, [B, 1] or for all."""
        drawn, number = self._uniform(inputs, _EXPLORATION), inputs.explored_tokens
        if number is None:
            return ~executed & (drawn < self.config.explore), self.config.explore
        drawn = drawn.masked_fill(executed, 1.0)
        if inputs.sequence is not None:  # of the whole window from here on
            drawn = inputs.sequence.all_gather(drawn)
        first = drawn.topk(number, largest=False).indices
        skipped = drawn < 1
        explored = torch.zeros_like(skipped).scatter(1, first, True) & skipped
        chance = (number / skipped.sum(1, keepdim=True)).clamp(max=1.0)
        return explored if inputs.sequence is None else inputs.sequence.local_part(explored), chance

    def _own(self, of_sites: Tensor) -> Tensor:
        """This site's entry, [1], of a tensor [S]."""
        return of_sites.index_select(0, self.site.view(1))

    def _uniform(self, inputs: RoutingInputs, stream: int = 0) -> Tensor:
        """A number in (0, 1) for every token, fp32 [B, T]."""
        return noise.uniform(inputs.seed + stream, inputs.sample_ids, self.site, inputs.positions)


class RandomRouter(Router):
    """Every token executes with probability P, by a hash of its place: the same on any ranks, in every evaluation."""

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D], not read."""
        u = noise.uniform(inputs.seed, inputs.sample_ids, self.site, inputs.positions)
        executed = u < self.config.density
        return Gate(executed)


class StrideRouter(Router):
    """Evenly spaced tokens, a share of exactly P, with a different phase at every site."""

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D], read only for its batch size."""
        steps, phase, density = inputs.positions.double(), self.site.double() * 0.6180339887498949, self.config.density
        # Both ends of a token's step by the same formula: "start + density" rounds differently from the next start.
        start, end = steps * density + phase, (steps + 1) * density + phase
        executed = torch.floor(end) > torch.floor(start)
        executed = executed.expand(x.shape[0], -1)
        return Gate(executed)


class ExpertChoiceRouter(Router):
    """Raposo et al. 2024: the P x T tokens of the sequence with the highest scores, output weighted by the score.

    Not causal: whether a token executes depends on later ones. A baseline for training and perplexity, refused for
    generation.
    """

    def __init__(self, config: RouterConfig, width: int, site: int):
        super().__init__(config, width, site)
        self.weight = nn.Parameter(torch.empty(2, width))

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D] -> decisions [B, T]."""
        margin = _difference(_logits(x, self.weight))
        chosen = margin.topk(max(round(self.config.density * margin.shape[1]), 1), dim=1).indices
        executed = torch.zeros_like(margin, dtype=torch.bool).scatter(1, chosen, True)
        return Gate(executed, torch.where(executed, torch.sigmoid(margin), 0.0))


ROUTERS: dict[str, type[Router]] = {
    "learned": LearnedRouter,
    "random": RandomRouter,
    "stride": StrideRouter,
    "expert_choice": ExpertChoiceRouter,
}


def numbers_of(thresholds: Tensor) -> list[float | None]:
    """Thresholds [S] for a file: None in place of minus infinity, at which every token executes."""
    return [None if t == -math.inf else t for t in thresholds.tolist()]


def thresholds_of(numbers: Sequence[float | None]) -> Tensor:
    """fp32 [S] of what :func:`numbers_of` returned."""
    return torch.tensor([-math.inf if t is None else t for t in numbers])


def _logits(x: Tensor, weight: Tensor, recompute: bool = False) -> Tensor:
    """Skip and execute, fp32 [B, T, 2]; autograd keeps ``x``, not its fp32 copy, unless the layer is recomputed."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _logits(x, weight, recompute)
    if not torch.is_grad_enabled():
        return linear(x.float(), weight.float())
    wide = x.float()
    with nullcontext() if recompute else _kept_as(wide, x):
        return F.linear(wide, weight.float())


def _difference(logits: Tensor) -> Tensor:
    """Execute minus skip, [B, T]."""
    skip, execute = logits.unbind(-1)
    return execute - skip


def _kept_as(wide: Tensor, x: Tensor) -> AbstractContextManager[object]:
    """A context in which autograd keeps ``x``, as the layer does anyway, not its fp32 copy ``wide``."""
    if wide is x or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    low, place = x.detach(), wide.data_ptr()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == place else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else low.float().view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
