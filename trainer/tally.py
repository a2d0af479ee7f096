"""What is counted in a step or an evaluation, and what a step returns: losses by source, the vote, and what ran.

Dimension letters: B windows of a micro-batch, T tokens, S routed sites, k late layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.budget import MarginStatistics
from model.chunks import IGNORE_INDEX
from model.decoder import DecoderOutput
from model.flops import Routed
from model.head import LossSums


@dataclass(frozen=True)
class Tally:
    """Sums over the tokens of all ranks and micro-batches of a step or an evaluation.

    Attributes:
        nll, z: summed over valid targets, in nats.
        targets: number of valid targets.
        stop: ranks that were asked to stop.
        routed: what was executed.
        bad_micro_batches: forward passes whose loss was not finite.
        overflow_tokens: per routed site, tokens whose gate chose to execute but which exceeded the capacity.
        distillation: KL divergences of the late layers from the final one, summed over layers and valid targets, nats.
        vote_entropy: of the ensemble's weights, summed over valid targets, nats.
        vote_weights, vote_largest: per late layer, its weight and whether that is the largest, over valid targets.
        source_nll, source_targets: nll and targets of each source, in training on several; they add up to the totals.
        save_due: 1 if rank 0's clock says that a checkpoint is due.
    """

    nll: float
    z: float
    targets: int
    stop: int
    routed: Routed
    bad_micro_batches: int
    overflow_tokens: list[float]
    distillation: float = 0.0
    vote_entropy: float = 0.0
    vote_weights: list[float] = field(default_factory=list)
    vote_largest: list[float] = field(default_factory=list)
    source_nll: list[float] = field(default_factory=list)
    source_targets: list[float] = field(default_factory=list)
    save_due: int = 0

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per valid target."""
        return self.nll / max(self.targets, 1)

    @property
    def density(self) -> list[float]:
        """Share of tokens that each routed site executed."""
        return [executed / self.routed.tokens for executed in self.routed.executed_tokens]

    @property
    def overflow(self) -> float:
        """Share of all decisions that were to execute but exceeded the capacity."""
        return sum(self.overflow_tokens) / max(self.routed.tokens * len(self.overflow_tokens), 1)


@dataclass(frozen=True)
class BusiestRank:
    """The most that one rank did in a step, over its micro-batches.

    Attributes:
        flops: forward and backward, of the rank with the most.
        routed: the largest of every count; these may come from different ranks.
    """

    flops: float
    routed: Routed


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        tally: counts over the whole batch.
        penalty: the budget regulariser's value, nats.
        grad_norm: norm of the gradient before clipping; None where DeepSpeed does not report it.
        applied: False if the update was skipped because something was not finite.
        bad_ranks: in that case, the ranks whose loss was not finite, with their sample ids.
        largest: work of the ranks that the others wait for; None for a step that is not logged.
    """

    tally: Tally
    penalty: float
    grad_norm: float | None
    applied: bool
    bad_ranks: list[tuple[int, list[int]]]
    largest: BusiestRank | None = None


class _StepSums(NamedTuple):
    """Views of one fp64 vector, so that one all-reduce and one copy cover all of them; see :func:`_sizes`."""

    nll: Tensor
    z: Tensor
    targets: Tensor
    tokens: Tensor
    visible_keys: Tensor
    stop: Tensor
    save_due: Tensor
    bad_micro_batches: Tensor
    distillation: Tensor
    vote_entropy: Tensor
    head_tokens: Tensor
    executed_tokens: Tensor
    attended_keys: Tensor
    overflow_tokens: Tensor
    explored_tokens: Tensor
    explored_keys: Tensor
    margins: Tensor
    squared_margins: Tensor
    vote_weights: Tensor
    vote_largest: Tensor
    source_nll: Tensor
    source_targets: Tensor
    inputs: Tensor


_ROUTED = ("executed_tokens", "attended_keys", "overflow_tokens", "explored_tokens", "explored_keys")
_MARGINS = ("margins", "squared_margins")
_OF_LATE_LAYERS = ("vote_weights", "vote_largest")
_OF_SOURCES = ("source_nll", "source_targets")
_INPUTS = "inputs"
_SCALARS = tuple(
    name for name in _StepSums._fields if name not in (*_ROUTED, *_MARGINS, *_OF_LATE_LAYERS, *_OF_SOURCES, _INPUTS)
)
_WHOLE = ("targets", "stop", "save_due", "bad_micro_batches")


def _sizes(sites: int, late_layers: int, sources: int, width: int) -> dict[str, int]:
    """How many entries of the vector each sum has, in the vector's order: scalars first, ``inputs`` last."""
    return {
        **dict.fromkeys(_SCALARS, 1),
        **dict.fromkeys(_ROUTED + _MARGINS, sites),
        **dict.fromkeys(_OF_LATE_LAYERS, late_layers),
        **dict.fromkeys(_OF_SOURCES, sources),
        _INPUTS: sites * width,
    }


class Counter:
    """Adds up forward passes on the device; one all-reduce makes a :class:`Tally`.

    Attributes:
        vector: all sums, to be summed over the ranks.
        sums: the same by name.

    Args:
        sites: number of routed sites.
        device: where the sums are.
        late_layers: number of late layers that vote.
        sources: number of sources counted separately; 0 for no separate counts.
        width: of the routers' input, where thresholds follow their margins; else 0.
    """

    def __init__(self, sites: int, device: torch.device, late_layers: int = 0, sources: int = 0, width: int = 0):
        self._sources = sources
        self._sizes = _sizes(sites, late_layers, sources, width)
        self.vector = torch.zeros(sum(self._sizes.values()), dtype=torch.float64, device=device)
        views = self.vector.split(list(self._sizes.values()))
        self.sums = _StepSums(**dict(zip(self._sizes, views, strict=True)))

    def add(
        self, output: DecoderOutput, targets: Tensor, scored_targets: int | None = None, sources: Tensor | None = None
    ) -> None:
        """Count one forward pass over ``targets`` [B, T], of which ``scored_targets`` (all unless given) had logits.

        ``sources`` [B] are the windows' sources, needed where they are counted separately.
        """
        assert output.loss is not None
        sums, loss, routing, vote = self.sums, output.loss, output.routing, output.vote_sums
        valid, nll = targets != IGNORE_INDEX, _window_nll(output.loss, targets, scored_targets)
        sums.tokens.add_(targets.numel())  # a Python number: no copy, no synchronisation
        sums.head_tokens.add_(targets.numel() if scored_targets is None else scored_targets)
        sums.nll.add_(nll.sum())
        sums.z.add_(loss.z)
        sums.targets.add_(valid.sum())
        sums.visible_keys.add_(routing.visible_keys)
        sums.bad_micro_batches.add_(~torch.isfinite(loss.loss))
        parts = {name: getattr(routing, name) for name in _ROUTED}
        parts |= zip(_MARGINS, routing.margin_sums, strict=True)
        if self._sizes[_INPUTS]:
            parts[_INPUTS] = routing.input_sums.flatten()
        if vote is not None:
            sums.distillation.add_(loss.distillation.detach())
            sums.vote_entropy.add_(vote.entropy)
            parts |= zip(_OF_LATE_LAYERS, (vote.weights.detach(), vote.largest), strict=True)
        if self._sources:
            assert sources is not None
            # Sums over rows, not a scatter: on a GPU a scatter adds in a different order every time.
            own = sources == torch.arange(self._sources, device=sources.device)[:, None]
            for name, each in zip(_OF_SOURCES, (nll, valid.sum(dim=1)), strict=True):
                parts[name] = torch.where(own, each, 0).sum(dim=1)
        vectors = [parts[name] for name, size in self._sizes.items() if size and name not in _SCALARS]
        if vectors:
            self.vector[len(_SCALARS) :] += torch.cat(vectors)  # in one addition

    def ask_to_stop(self) -> None:
        """Count this rank among those that were asked to stop."""
        self.sums.stop.add_(1)

    def ask_to_save(self) -> None:
        """Say, on rank 0 alone, that a checkpoint is due after this step."""
        self.sums.save_due.add_(1)

    def wanted_density(self) -> Tensor:
        """Share of tokens that each site's router wanted to execute, capacity aside, fp32 [S], on the device."""
        return ((self.sums.executed_tokens + self.sums.overflow_tokens) / self.sums.tokens).float()

    def seen(self) -> MarginStatistics:
        """The statistics that thresholds follow, on the device."""
        moments = torch.stack((self.sums.margins, self.sums.squared_margins)) / self.sums.tokens
        return MarginStatistics(moments, self.sums.inputs.view(len(self.sums.margins), -1) / self.sums.tokens)

    @property
    def counts(self) -> Tensor:
        """The vector without the sums of router inputs, which stay on the device."""
        return self.vector[: len(self.vector) - self._sizes[_INPUTS]]

    def tally(self, counts: Tensor | None = None) -> Tally:
        """The sums, or those in ``counts`` (in the order of :attr:`counts`), as Python numbers."""
        numbers = iter((self.counts if counts is None else counts).tolist())  # one copy, one wait
        found: dict[str, Any] = {
            name: [next(numbers) for _ in range(size)] for name, size in self._sizes.items() if name != _INPUTS
        }
        found |= {name: found[name][0] for name in _SCALARS}
        found |= {name: int(found[name]) for name in _WHOLE}
        found = {name: value for name, value in found.items() if name not in _MARGINS}  # these stay on the device
        routed = Routed(**{part.name: found.pop(part.name) for part in fields(Routed)})
        return Tally(routed=routed, **found)


def _window_nll(loss: LossSums, targets: Tensor, scored_targets: int | None) -> Tensor:
    """Each window's sum of negative log-likelihoods, fp64 [B]."""
    nll = loss.token_nll
    if scored_targets is not None:  # the head saw only those tokens, in this order
        nll = nll.new_zeros(targets.shape).masked_scatter(targets != IGNORE_INDEX, nll)
    return nll.view(targets.shape).sum(dim=1, dtype=torch.float64)
