"""One optimiser step: micro-batches forward and backward, one all-reduce of counts, one update.

The loss is (sum over valid targets) / (number of valid targets), both over all ranks and micro-batches, plus the
budget's price per routed site times its density. So it does not depend on how the batch is split.

Nothing that is not finite reaches the weights. A loss that is not finite turns its own gradient into NaN, which every
ZeRO stage then sees in its norm and skips; stage 0 in fp32, where DeepSpeed has no such check, is checked here.

Dimension letters: B windows of a micro-batch, T tokens, S routed sites, k late layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch
from model.budget import Budget
from model.chunks import IGNORED
from model.decoder import DecoderOutput
from model.ensemble import Balance
from model.flops import Routed
from model.head import LossSums
from trainer.config import StageConfig
from trainer.deepspeed_config import owns_clipping
from trainer.deepspeed_internals import leave_step_out
from trainer.distributed import World


@dataclass(frozen=True)
class Tally:
    """Sums over the tokens of all ranks and micro-batches of a step or an evaluation.

    Attributes:
        nll, z: summed over valid targets, in nats.
        targets: number of valid targets.
        stop: ranks that were asked to stop.
        routed: what ran.
        bad_micro_batches: forward passes whose loss was not finite.
        overflow_tokens: per routed site, tokens whose gate said execute and for which the capacity had no room.
        distillation: KL divergences of the late layers from the final one, summed over layers and valid targets, nats.
        vote_entropy: of the ensemble's weights, summed over valid targets, nats.
        vote_weights, vote_largest: per late layer, its weight and whether that is the largest, over valid targets.
        source_nll, source_targets: nll and targets of each source, in training on several; they add up to the whole.
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
        """Share of all decisions that were to execute and for which the capacity had no room."""
        return sum(self.overflow_tokens) / max(self.routed.tokens * len(self.overflow_tokens), 1)


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        tally: counts over the whole batch.
        penalty: the budget regulariser's value, nats.
        grad_norm: norm of the gradient before clipping; None where DeepSpeed does not tell it.
        applied: False where the update was left out because something was not finite.
        bad_ranks: then, the ranks whose loss was not finite, with their sample ids.
    """

    tally: Tally
    penalty: float
    grad_norm: float | None
    applied: bool
    bad_ranks: list[tuple[int, list[int]]]


_PER_SITE = 5
"""Executed tokens, their keys, overflow, explored tokens, their keys."""


class Counter:
    """Adds up forward passes on the device; one all-reduce makes a :class:`Tally`."""

    # nll, z, targets, tokens, visible keys, stop, bad micro-batches, distillation, entropy of the vote, head tokens
    _SCALARS = 10

    def __init__(self, sites: int, device: torch.device, late_layers: int = 0, sources: int = 0):
        self.sites, self.late_layers, self.sources = sites, late_layers, sources
        size = self._SCALARS + _PER_SITE * sites + 2 * late_layers + 2 * sources
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)

    def add(
        self, output: DecoderOutput, targets: Tensor, scored_targets: int | None = None, sources: Tensor | None = None
    ) -> None:
        """Count one forward pass over ``targets`` [B, T], of which ``scored_targets`` (all unless given) had logits.

        ``sources`` [B] are the windows' sources, needed where they are counted apart.
        """
        assert output.loss is not None
        loss, routing, vote = output.loss, output.routing, output.vote_sums
        valid, nll = targets != IGNORED, _window_nll(output.loss, targets, scored_targets)
        self.sums[3] += targets.numel()  # a number of the host: no copy, no wait
        self.sums[9] += targets.numel() if scored_targets is None else scored_targets
        for place, value in ((0, nll.sum()), (1, loss.z), (2, valid.sum()), (4, routing.visible_keys)):
            self.sums[place] += value
        self.sums[6] += ~torch.isfinite(loss.loss)
        parts = [routing.executed_tokens, routing.attended_keys, routing.overflow_tokens]
        parts += [routing.explored_tokens, routing.explored_keys]
        if vote is not None:
            self.sums[7] += loss.distillation.detach()
            self.sums[8] += vote.entropy
            parts += [vote.weights.detach(), vote.largest]
        if self.sources:
            assert sources is not None
            # Sums of rows, not scattered: scattering adds in another order every time on a GPU.
            own = sources == torch.arange(self.sources, device=sources.device)[:, None]
            parts += [torch.where(own, each, 0).sum(dim=1) for each in (nll, valid.sum(dim=1))]
        self.sums[self._SCALARS :] += torch.cat(parts)

    def ask_to_stop(self) -> None:
        """Count this rank among those that were asked to stop."""
        self.sums[5] += 1

    def wanted_density(self) -> Tensor:
        """Share of tokens that each site's router wanted to execute, room or not, fp32 [S], on the device."""
        executed, _, overflow, *_ = self._of_sites()
        return ((executed + overflow) / self.sums[3]).float()

    def vote_largest(self) -> Tensor:
        """Tokens on which each late layer had the largest weight, [k], on the device."""
        end = len(self.sums) - 2 * self.sources
        return self.sums[end - self.late_layers : end]

    def tally(self) -> Tally:
        """The sums on the host."""
        numbers = iter(self.sums.tolist())  # one copy, one wait
        nll, z, targets, tokens, visible, stop, bad, distillation, entropy, head = islice(numbers, self._SCALARS)
        counts = [self.sites] * _PER_SITE + [self.late_layers] * 2 + [self.sources] * 2
        executed, keys, overflow, explored, explored_keys, *rest = (list(islice(numbers, count)) for count in counts)
        routed = Routed(tokens, visible, executed, keys, head, explored, explored_keys)
        return Tally(nll, z, int(targets), int(stop), routed, int(bad), overflow, distillation, entropy, *rest)

    def _of_sites(self) -> Tensor:
        return self.sums[self._SCALARS : self._SCALARS + _PER_SITE * self.sites].view(_PER_SITE, self.sites)


def _window_nll(loss: LossSums, targets: Tensor, scored_targets: int | None) -> Tensor:
    """Each window's sum of negative log-likelihoods, fp64 [B]."""
    nll = loss.token_nll
    if scored_targets is not None:  # the head saw those tokens alone, in this order
        nll = nll.new_zeros(targets.shape).masked_scatter(targets != IGNORED, nll)
    return nll.view(targets.shape).sum(dim=1, dtype=torch.float64)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; copies from pinned memory do not wait."""
    return batch.map(lambda tensor: tensor.to(device, non_blocking=True))


def run(engine: Any, batch: Batch, **options: Any) -> DecoderOutput:
    """Run a decoder, or the engine around one, on a batch on its device; ``options`` are the decoder's own."""
    return engine(
        batch.tokens,
        batch.targets,
        sample_ids=batch.sample_ids,
        documents=batch.documents,
        positions=batch.positions,
        scored_targets=batch.scored_targets,
        **options,
    )


def forward(
    engine: Any, batch: Batch, config: StageConfig, progress: float, capacity_tokens: int | None = None
) -> DecoderOutput:
    """:func:`run` with the routers' noise and temperature as they are at ``progress``.

    In training ``capacity_tokens`` is the most tokens of a window that a routed site executes.
    """
    router = config.model.router
    return run(
        engine,
        batch,
        # Plain numbers: DeepSpeed would cast fp32 tensors to the model's dtype on the way in.
        noise_scale=0.0 if router is None else router.noise.at(progress),
        temperature=1.0 if router is None else router.temperature.at(progress),
        z_coefficient=config.train.z_loss,
        capacity_tokens=capacity_tokens,
    )


def late_layers(engine: Any) -> int:
    """How many layers vote in the model; 0 without an ensemble."""
    ensemble = getattr(engine, "module", engine).ensemble
    return 0 if ensemble is None else ensemble.config.layers


def train_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    budget: Budget,
    config: StageConfig,
    world: World,
    step: int,
    stop_requested: bool = False,
    balance: Balance | None = None,
) -> StepResult:
    """Take optimiser step number ``step`` (0 is the first) on this rank's micro-batches."""
    engine.train()
    progress = step / config.train.steps
    prices = budget.prices()
    targets = torch.tensor(_count_targets(micro_batches), dtype=torch.float64, device=world.device)
    # DeepSpeed averages gradients over ranks; times the number of ranks it is their sum.
    per_target = world.size / world.sum(targets).clamp(min=1)
    sources = len(config.data.sources)
    counter = Counter(budget.sites, world.device, late_layers(engine), sources if sources > 1 else 0)
    vote_prices = balance.prices() if balance is not None and balance.coefficient else None
    capacity_tokens = budget.capacity_tokens(progress)
    for number, host_batch in enumerate(micro_batches):
        batch = to_device(host_batch, world.device)
        output = forward(engine, batch, config, progress, capacity_tokens)
        assert output.loss is not None
        loss = output.loss.loss
        if vote_prices is not None and output.vote_sums is not None:
            loss = loss + (vote_prices * output.vote_sums.weights).sum()
        loss = loss * per_target.float()
        loss = loss + (prices * output.routing.density).sum() / len(micro_batches)
        loss = loss * torch.where(torch.isfinite(loss), 1.0, float("nan"))
        engine.backward(loss, scale_wrt_gas=False)
        counter.add(output, batch.targets, batch.scored_targets, batch.sources)
        if number + 1 < len(micro_batches):
            engine.step()
    if stop_requested:
        counter.ask_to_stop()
    own_bad = counter.sums[6].clone()  # before the sum makes it everybody's; read only if the step went bad
    world.sum(counter.sums)
    norm, applied = _update(engine, config)
    if applied:
        density = counter.wanted_density()
        penalty = float(budget.penalty(density, progress))
        budget.observe(density, progress)
        if balance is not None:
            balance.observe(counter.vote_largest())
        return StepResult(counter.tally(), penalty, norm, True, [])
    ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
    bad_ranks = [entry for entry in world.gather_objects((world.rank, ids) if own_bad > 0 else None) if entry]
    return StepResult(counter.tally(), float("nan"), norm, False, bad_ranks)


def _update(engine: Any, config: StageConfig) -> tuple[float | None, bool]:
    """Clip and step, unless the gradient is not finite; the norm before clipping and whether it was applied."""
    if owns_clipping(config):
        limit = config.train.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit))
        if norm != norm or norm == float("inf"):
            leave_step_out(engine)
            return norm, False
        engine.step()
        return norm, True
    engine.step()
    told = engine.get_global_grad_norm()
    return None if told is None else float(told), bool(engine.was_step_applied())


def _count_targets(batches: Iterable[Batch]) -> int:
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)
