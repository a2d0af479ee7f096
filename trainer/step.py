"""One optimiser step: micro-batches forward and backward, one all-reduce of counts, one update.

The loss is (sum over valid targets) / (number of valid targets), both over all ranks and micro-batches, plus the
budget's price per routed site times its density. So it does not depend on how the batch is split.

Nothing that is not finite reaches the weights. A loss that is not finite turns its own gradient into NaN, which every
ZeRO stage then sees in its norm and skips; stage 0 in fp32, where DeepSpeed has no such check, is checked here.

Dimension letters: B windows of a micro-batch, T tokens, S routed sites, k late layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batches import Batch
from model.budget import Budget, Seen
from model.chunks import IGNORED
from model.config import Capacity
from model.decoder import DecoderOutput
from model.ensemble import Balance
from model.flops import Routed, training_flops
from model.head import LossSums
from model.router import Centres
from model.schedules import Progress
from model.sequence import SequenceGroup
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
        """Share of all decisions that were to execute and for which the capacity had no room."""
        return sum(self.overflow_tokens) / max(self.routed.tokens * len(self.overflow_tokens), 1)


@dataclass(frozen=True)
class Largest:
    """The most that one rank did in a step, over its micro-batches.

    Attributes:
        flops: forward and backward, of the rank that had most.
        routed: every count's largest; they may be of different ranks.
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
        applied: False where the update was left out because something was not finite.
        bad_ranks: then, the ranks whose loss was not finite, with their sample ids.
        largest: what the ranks that the others wait for did; None for a step that is not logged.
    """

    tally: Tally
    penalty: float
    grad_norm: float | None
    applied: bool
    bad_ranks: list[tuple[int, list[int]]]
    largest: Largest | None = None


class _StepSums(NamedTuple):
    """Views of one fp64 vector, in its order, so that one all-reduce and one copy take all of them.

    The first ``_SCALARS`` have one entry, the next seven one for each site, then two for each late layer, two for each
    source.
    """

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


_SCALARS = 11


class Counter:
    """Adds up forward passes on the device; one all-reduce makes a :class:`Tally`.

    Attributes:
        vector: all sums, to be summed over the ranks.
        sums: the same by name.

    Args:
        sites: routed ones.
        device: where the sums are.
        late_layers: that vote.
        sources: counted apart; 0 for not at all.
        width: of what routers read, where thresholds follow their margins; else 0.
    """

    def __init__(self, sites: int, device: torch.device, late_layers: int = 0, sources: int = 0, width: int = 0):
        self._sources = sources
        self._sizes = [1] * _SCALARS + [sites] * 7 + [late_layers] * 2 + [sources] * 2 + [sites * width]
        self.vector = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        self.sums = _StepSums(*self.vector.split(self._sizes))

    def add(
        self, output: DecoderOutput, targets: Tensor, scored_targets: int | None = None, sources: Tensor | None = None
    ) -> None:
        """Count one forward pass over ``targets`` [B, T], of which ``scored_targets`` (all unless given) had logits.

        ``sources`` [B] are the windows' sources, needed where they are counted apart.
        """
        assert output.loss is not None
        sums, loss, routing, vote = self.sums, output.loss, output.routing, output.vote_sums
        valid, nll = targets != IGNORED, _window_nll(output.loss, targets, scored_targets)
        sums.tokens.add_(targets.numel())  # a number of the host: no copy, no wait
        sums.head_tokens.add_(targets.numel() if scored_targets is None else scored_targets)
        sums.nll.add_(nll.sum())
        sums.z.add_(loss.z)
        sums.targets.add_(valid.sum())
        sums.visible_keys.add_(routing.visible_keys)
        sums.bad_micro_batches.add_(~torch.isfinite(loss.loss))
        parts = [routing.executed_tokens, routing.attended_keys, routing.overflow_tokens]
        parts += [routing.explored_tokens, routing.explored_keys, *routing.margin_sums]
        if vote is not None:
            sums.distillation.add_(loss.distillation.detach())
            sums.vote_entropy.add_(vote.entropy)
            parts += [vote.weights.detach(), vote.largest]
        if self._sources:
            assert sources is not None
            # Sums of rows, not scattered: scattering adds in another order every time on a GPU.
            own = sources == torch.arange(self._sources, device=sources.device)[:, None]
            parts += [torch.where(own, each, 0).sum(dim=1) for each in (nll, valid.sum(dim=1))]
        if self._sizes[-1]:
            parts.append(routing.input_sums.flatten())
        self.vector[_SCALARS:] += torch.cat(parts)  # all that follows the scalars, at once

    def ask_to_stop(self) -> None:
        """Count this rank among those that were asked to stop."""
        self.sums.stop.add_(1)

    def ask_to_save(self) -> None:
        """Say, on rank 0 alone, that a checkpoint is due after this step."""
        self.sums.save_due.add_(1)

    def wanted_density(self) -> Tensor:
        """Share of tokens that each site's router wanted to execute, room or not, fp32 [S], on the device."""
        return ((self.sums.executed_tokens + self.sums.overflow_tokens) / self.sums.tokens).float()

    def seen(self) -> Seen:
        """What thresholds follow, on the device."""
        moments = torch.stack((self.sums.margins, self.sums.squared_margins)) / self.sums.tokens
        return Seen(moments, self.sums.inputs.view(len(self.sums.margins), -1) / self.sums.tokens)

    @property
    def counts(self) -> Tensor:
        """The vector without what routers read, which stays on the device."""
        return self.vector[: sum(self._sizes[:-1])]

    def tally(self, counts: Tensor | None = None) -> Tally:
        """The sums on the host; or those of ``counts``, which has the order of :attr:`counts`."""
        names, sizes = _StepSums._fields[:-1], self._sizes[:-1]
        numbers = iter((self.counts if counts is None else counts).tolist())  # one copy, one wait
        found: dict[str, Any] = {
            name: [next(numbers) for _ in range(size)] for name, size in zip(names, sizes, strict=True)
        }
        found |= {name: found[name][0] for name in _StepSums._fields[:_SCALARS]}
        found |= {name: int(found[name]) for name in ("targets", "stop", "save_due", "bad_micro_batches")}
        del found["margins"], found["squared_margins"]
        routed = Routed(**{part.name: found.pop(part.name) for part in fields(Routed)})
        return Tally(routed=routed, **found)


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
    engine: Any,
    batch: Batch,
    config: StageConfig,
    progress: Progress,
    capacity: Capacity | None = None,
    sequence: SequenceGroup | None = None,
) -> DecoderOutput:
    """:func:`run` with the routers' noise and temperature as they are at ``progress``.

    In training ``capacity`` is how many tokens of a window a routed site computes. ``sequence`` are the ranks that
    share the batch's windows, if any.
    """
    router = config.model.router
    return run(
        engine,
        batch,
        # Plain numbers: DeepSpeed would cast fp32 tensors to the model's dtype on the way in.
        noise_scale=0.0 if router is None else router.noise.at(progress),
        temperature=1.0 if router is None else router.temperature.at(progress),
        z_coefficient=config.train.z_loss,
        capacity=capacity,
        sequence=sequence,
    )


def set_schedules(engine: Any, budget: Budget, progress: Progress) -> None:
    """From now on, in training and evaluation, routers decide by the budget's thresholds and late layers vote as far as
    they do at this step.

    Until the budget has seen margins, given thresholds stay, and soft gates are centred on them.
    """
    if engine.module.ensemble is not None:
        engine.module.ensemble.open(progress)
    if not budget.follows_margins:
        return
    given = engine.module.thresholds
    engine.module.thresholds, engine.module.centres = budget.thresholds(progress)
    if given is not None and not budget.seen_margins:
        engine.module.thresholds = given = given.to(engine.module.thresholds.device)
        engine.module.centres = Centres(torch.where(given.isfinite(), given, 0.0), None)


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
    save_due: bool = False,
) -> StepResult:
    """Take optimiser step number ``step`` (0 is the first) on this rank's micro-batches."""
    engine.train()
    progress = config.train.progress(step)
    prices = budget.prices()
    set_schedules(engine, budget, progress)
    targets = torch.tensor(_count_targets(micro_batches), dtype=torch.float64, device=world.device)
    # DeepSpeed averages gradients over ranks; times the number of ranks it is their sum.
    per_target = world.size / world.sum(targets).clamp(min=1)
    sources = len(config.data.sources)
    width = config.model.width if budget.follows_margins else 0
    counter = Counter(budget.sites, world.device, late_layers(engine), sources if sources > 1 else 0, width)
    vote_prices = balance.prices() if balance is not None and balance.coefficient else None
    capacity = budget.capacity(progress)
    for number, host_batch in enumerate(micro_batches):
        batch = to_device(host_batch, world.device)
        output = forward(engine, batch, config, progress, capacity, world.sequence)
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
    own = counter.counts.clone()  # before the sum makes it everybody's; read only if the step is logged or went bad
    if save_due:
        counter.ask_to_save()
    world.sum(counter.vector)
    norm, applied = _update(engine, config)
    largest = _largest(counter, own, config, world) if config.train.is_logged(step + 1) else None
    if applied:
        density = counter.wanted_density()
        penalty = float(budget.penalty(density, progress))
        budget.observe(density, progress, counter.seen() if budget.follows_margins else None)
        if balance is not None:
            balance.observe(counter.sums.vote_largest)
        return StepResult(counter.tally(), penalty, norm, True, [], largest)
    ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
    bad = counter.tally(own).bad_micro_batches > 0
    bad_ranks = [entry for entry in world.gather_objects((world.rank, ids) if bad else None) if entry]
    return StepResult(counter.tally(), float("nan"), norm, False, bad_ranks, largest)


def _largest(counter: Counter, own: Tensor, config: StageConfig, world: World) -> Largest:
    """What the busiest ranks did, from this rank's ``own`` sums; collective: a sum cannot tell."""
    flops = training_flops(config.model, counter.tally(own).routed, config.trained)
    most = world.largest(torch.cat((own, own.new_tensor([flops]))))
    return Largest(float(most[-1]), counter.tally(most[:-1]).routed)


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
