"""One optimiser step: micro-batches forward and backward, one all-reduce of counts, one update.

The loss is (sum over valid targets) / (number of valid targets), both over all ranks and micro-batches, plus the
budget's price per routed site times its density. So it does not depend on how the batch is split.

No non-finite value reaches the weights. A loss that is not finite makes its own gradient NaN, which every ZeRO stage
detects in the norm and skips; stage 0 in fp32, where DeepSpeed has no such check, is checked here.

Dimension letters: B windows of a micro-batch, T tokens, S routed sites, k late layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch
from model.budget import Budget
from model.chunks import IGNORE_INDEX
from model.config import Capacity
from model.decoder import DecoderOutput
from model.ensemble import Balance
from model.flops import training_flops
from model.router import Centres
from model.schedules import Progress
from model.sequence import SequenceGroup
from trainer.config import StageConfig
from trainer.deepspeed_config import owns_clipping
from trainer.deepspeed_internals import skip_step
from trainer.distributed import World
from trainer.tally import BusiestRank, Counter, StepResult


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; copies from pinned memory are asynchronous."""
    return batch.map(lambda tensor: tensor.to(device, non_blocking=True))


def forward_batch(engine: Any, batch: Batch, **options: Any) -> DecoderOutput:
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


def forward_at(
    engine: Any,
    batch: Batch,
    config: StageConfig,
    progress: Progress,
    capacity: Capacity | None = None,
    sequence: SequenceGroup | None = None,
) -> DecoderOutput:
    """:func:`forward_batch` with the routers' noise and temperature as they are at ``progress``.

    In training ``capacity`` is how many tokens of a window a routed site computes. ``sequence`` are the ranks that
    share the batch's windows, if any.
    """
    router = config.model.router
    return forward_batch(
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
    """Set what routers and late layers do at ``progress``: the budget's thresholds, and how far late layers vote.

    It holds for training and evaluation alike. Until the budget has seen margins, thresholds that came with the weights
    stay, and soft gates are centred on them.
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
    # DeepSpeed averages gradients over ranks; multiplying by the number of ranks gives their sum.
    per_target = world.size / world.all_reduce_sum(targets).clamp(min=1)
    sources = len(config.data.sources)
    width = config.model.width if budget.follows_margins else 0
    counter = Counter(budget.sites, world.device, late_layers(engine), sources if sources > 1 else 0, width)
    vote_prices = balance.prices() if balance is not None and balance.coefficient else None
    capacity = budget.capacity(progress)
    for number, host_batch in enumerate(micro_batches):
        batch = to_device(host_batch, world.device)
        output = forward_at(engine, batch, config, progress, capacity, world.sequence)
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
    own = counter.counts.clone()  # this rank's, before the all-reduce; read only if the step is logged or went bad
    if save_due:
        counter.ask_to_save()
    world.all_reduce_sum(counter.vector)
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
    bad_ranks = [entry for entry in world.all_gather_objects((world.rank, ids) if bad else None) if entry]
    return StepResult(counter.tally(), float("nan"), norm, False, bad_ranks, largest)


def _largest(counter: Counter, own: Tensor, config: StageConfig, world: World) -> BusiestRank:
    """What the busiest ranks did, from this rank's ``own`` sums; collective, as sums over ranks do not show it."""
    flops = training_flops(config.model, counter.tally(own).routed, config.trained)
    most = world.all_reduce_max(torch.cat((own, own.new_tensor([flops]))))
    return BusiestRank(float(most[-1]), counter.tally(most[:-1]).routed)


def _update(engine: Any, config: StageConfig) -> tuple[float | None, bool]:
    """Clip and step, unless the gradient is not finite; return the norm before clipping, and whether it stepped."""
    if owns_clipping(config):
        limit = config.train.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit))
        if norm != norm or norm == float("inf"):
            skip_step(engine)
            return norm, False
        engine.step()
        return norm, True
    engine.step()
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm), bool(engine.was_step_applied())


def _count_targets(batches: Iterable[Batch]) -> int:
    return sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)
