"""One optimiser step: micro-batches forward and backward, one all-reduce of counts, one update.

The loss is (sum over valid targets) / (number of valid targets), both over all ranks and micro-batches, plus the
budget's price per routed site times its density. So it does not depend on how the batch is split.

Nothing that is not finite reaches the weights. A loss that is not finite turns its own gradient into NaN, which every
ZeRO stage then sees in its norm and skips; stage 0 in fp32, where DeepSpeed has no such check, is checked here.

Dimension letters: B micro-batch, T tokens, S routed sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch
from model.budget import Budget
from model.chunks import IGNORED
from model.decoder import DecoderOutput
from model.flops import Routed
from trainer.config import RunConfig
from trainer.deepspeed_config import owns_clipping
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
    """

    nll: float
    z: float
    targets: int
    stop: int
    routed: Routed
    bad_micro_batches: int
    overflow_tokens: list[float]

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


class Counter:
    """Adds up forward passes on the device; one all-reduce makes a :class:`Tally`."""

    _SCALARS = 7  # nll, z, targets, tokens, visible keys, stop, bad micro-batches

    def __init__(self, sites: int, device: torch.device):
        self.sites = sites
        self.sums = torch.zeros(self._SCALARS + 3 * sites, dtype=torch.float64, device=device)

    def add(self, output: DecoderOutput, targets: Tensor) -> None:
        """Count one forward pass over ``targets`` [B, T]."""
        assert output.loss is not None
        loss, routing = output.loss, output.routing
        self.sums[3] += targets.numel()  # a number of the host: no copy, no wait
        for place, value in ((0, loss.nll), (1, loss.z), (2, (targets != IGNORED).sum()), (4, routing.visible_keys)):
            self.sums[place] += value
        self.sums[6] += ~torch.isfinite(loss.loss)
        self.sums[self._SCALARS :] += torch.cat(
            (routing.executed_tokens, routing.attended_keys, routing.overflow_tokens)
        )

    def ask_to_stop(self) -> None:
        """Count this rank among those that were asked to stop."""
        self.sums[5] += 1

    def wanted_density(self) -> Tensor:
        """Share of tokens that each site's router wanted to execute, room or not, fp32 [S], on the device."""
        executed, _, overflow = self.sums[self._SCALARS :].view(3, self.sites)
        return ((executed + overflow) / self.sums[3]).float()

    def tally(self) -> Tally:
        """The sums on the host."""
        nll, z, targets, tokens, visible, stop, bad, *sites = self.sums.tolist()
        n = self.sites
        routed = Routed(tokens, visible, sites[:n], sites[n : 2 * n])
        return Tally(nll, z, int(targets), int(stop), routed, int(bad), sites[2 * n :])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; copies from pinned memory do not wait."""
    return batch.map(lambda tensor: tensor.to(device, non_blocking=True))


def forward(
    engine: Any, batch: Batch, config: RunConfig, progress: float, capacity_tokens: int | None = None
) -> DecoderOutput:
    """Run the engine on a batch on its device, with the routers' noise and temperature as they are at ``progress``.

    In training ``capacity_tokens`` is the most tokens of a window that a routed site executes.
    """
    router = config.model.router
    return engine(
        batch.tokens,
        batch.targets,
        sample_ids=batch.sample_ids,
        documents=batch.documents,
        positions=batch.positions,
        # Plain numbers: DeepSpeed would cast fp32 tensors to the model's dtype on the way in.
        noise_scale=0.0 if router is None else router.noise.at(progress),
        temperature=1.0 if router is None else router.temperature.at(progress),
        z_coefficient=config.train.z_loss,
        capacity_tokens=capacity_tokens,
    )


def train_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    budget: Budget,
    config: RunConfig,
    world: World,
    step: int,
    stop_requested: bool = False,
) -> StepResult:
    """Take optimiser step number ``step`` (0 is the first) on this rank's micro-batches."""
    engine.train()
    progress = step / config.train.steps
    prices = budget.prices()
    targets = torch.tensor(_count_targets(micro_batches), dtype=torch.float64, device=world.device)
    # DeepSpeed averages gradients over ranks; times the number of ranks it is their sum.
    per_target = world.size / world.sum(targets).clamp(min=1)
    counter = Counter(budget.sites, world.device)
    capacity_tokens = budget.capacity_tokens(progress)
    for number, host_batch in enumerate(micro_batches):
        batch = to_device(host_batch, world.device)
        output = forward(engine, batch, config, progress, capacity_tokens)
        assert output.loss is not None
        loss = output.loss.loss * per_target.float()
        loss = loss + (prices * output.routing.density).sum() / len(micro_batches)
        loss = loss * torch.where(torch.isfinite(loss), 1.0, float("nan"))
        engine.backward(loss, scale_wrt_gas=False)
        counter.add(output, batch.targets)
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
        return StepResult(counter.tally(), penalty, norm, True, [])
    ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
    bad_ranks = [entry for entry in world.gather_objects((world.rank, ids) if own_bad > 0 else None) if entry]
    return StepResult(counter.tally(), float("nan"), norm, False, bad_ranks)


def _update(engine: Any, config: RunConfig) -> tuple[float | None, bool]:
    """Clip and step, unless the gradient is not finite; the norm before clipping and whether it was applied."""
    if owns_clipping(config):
        limit = config.train.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit))
        if norm != norm or norm == float("inf"):
            engine.zero_grad()
            engine.micro_steps += 1  # what engine.step() would have counted
            return norm, False
        engine.step()
        return norm, True
    engine.step()
    told = engine.get_global_grad_norm()
    return None if told is None else float(told), bool(engine.was_step_applied())


def _count_targets(batches: Iterable[Batch]) -> int:
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)
