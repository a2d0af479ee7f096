"""What a run logs about itself when it starts and when it ends."""

from __future__ import annotations

from collections.abc import Mapping

from data.batches import TrainingData
from data.stages import describe_stages
from model.flops import dense_flops, executed_flops, parameter_counts
from settings import counted
from settings.words import epochs
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.evaluate import Evaluation


def describe_start(config: StageConfig, data: TrainingData, world: World) -> str:
    """Model, routing, data and machine, a line each."""
    model, train, router = config.model, config.train, config.model.router
    counts = parameter_counts(model)
    lines = [
        f"model     {counts['total']:,} parameters ({counts['layers']:,} in {model.layers} layers, "
        f"{counts['embedding'] + counts['head']:,} in embedding and head)",
        "routing   none, every token runs every layer"
        if router is None
        else f"routing   {router.kind}, {len(model.sites)} sites, density {router.density}, "
        f"{router.execution} execution",
        f"training  {train.steps:,} steps of {train.global_batch_samples * config.data.sequence_tokens:,} tokens, "
        f"{train.samples * config.data.sequence_tokens:,} in all"
        + ("" if train.stop_at_step is None else f"; ends after step {train.last_step:,}"),
    ]
    summary = data.summary(train.samples)
    for source in summary:
        lines.append(
            f"data      {source.name}: {source.tokens:,} tokens, {source.share:.0%} of samples, "
            + epochs(source.epochs)
        )
    mixture = config.data.mixture()
    if len(mixture) > 1:
        taken = [(source.name, source.taken, source.windows) for source in summary]
        lines += [f"stage     {line}" for line in describe_stages(mixture, taken, config.data.sequence_tokens)]
    return "\n".join([*lines, machine(config, world)])


def machine(config: StageConfig, world: World) -> str:
    """The line on ranks, precision and ZeRO."""
    train, shared = config.train, config.deepspeed.sequence_parallel
    return (
        f"machine   {counted(world.size, 'rank')} on {world.device.type}, {train.precision}, ZeRO "
        f"{config.deepspeed.zero_stage}, {counted(config.accumulation(world.size), 'micro-batch', 'micro-batches')} of "
        f"{train.micro_batch_samples} samples a step and {'rank' if shared == 1 else f'group of {shared} ranks'}"
    )


def describe_end(config: StageConfig, evaluations: Mapping[int, list[Evaluation]]) -> str:
    """Run folder, validation losses before and after, densities reached against their target.

    ``evaluations`` by step, of this start of the run.
    """
    before, after = evaluations.get(0), evaluations.get(config.train.last_step)
    lines = [f"run folder       {config.train.run_dir}"]
    for number, evaluation in enumerate(after or []):
        start = f"{before[number].greedy.loss:.4f} -> " if before else ""
        lines.append(f"validation loss  {evaluation.name}: {start}{evaluation.greedy.loss:.4f} nats per token")
    if after and config.model.router is not None:
        density = after[0].greedy.density
        mean = sum(density) / len(density)
        lines.append(
            f"density          {mean:.3f} in greedy evaluation against a target of {config.model.router.density:.3f} "
            f"(sites from {min(density):.3f} to {max(density):.3f})"
        )
        routed = after[0].greedy.routed
        share = executed_flops(config.model, routed) / dense_flops(
            config.model, routed.tokens, routed.visible_keys, routed.head_tokens
        )
        lines.append(f"compute          {share:.0%} of the FLOPs of the same tokens without routers, head included")
    return "\n".join(lines)
