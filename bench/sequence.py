"""Windows shared by ranks against one window per rank: time, memory and balance at several lengths.

    torchrun --nproc-per-node 2 -m bench.sequence configs/demo.yaml model.layers=4 model.width=256 model.heads=4 \\
        model.kv_heads=1 model.ffn_width=768 --tokens 2048 4096 8192

A step has as many windows as there are ranks. With ``deepspeed.sequence_parallel`` 1 every rank takes one of them; with
more a group takes its windows one after the other, each rank its part of each. Time: of a step, in turns in one
process, relative to sequence_parallel 1. Memory: what autograd saves in a rank's forward pass, and the peak of its step
besides weights and optimiser, with logits and gradients, which have the same size for all; relative to the same.
Balance: FLOPs of the busiest rank over the mean, with the parts as implemented (rank p has the p-th stretch from either
end) and with one stretch per rank from first to last, for the same decisions. CONFIG's shards must be prepared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench.common.steps import stepper
from settings import command_parser, parse_arguments, path_argument, tables, user_errors, whole_number
from trainer.config import PretrainConfig, load_run

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.distributed import World

TOKENS = (2048, 4096, 8192)
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Row:
    """Measurements of ``shared`` ranks per window of ``tokens``.

    Attributes:
        seconds: of each round's step.
        kept_bytes, peak_bytes: of the rank that held most.
        balance, in_order: FLOPs of the busiest rank over the mean, as implemented and from first to last.
    """

    tokens: int
    shared: int
    seconds: list[float]
    kept_bytes: int
    peak_bytes: int
    balance: float
    in_order: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = command_parser("bench.sequence", __doc__)
    parser.add_argument("config", help="YAML of a stage-one run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--tokens", type=whole_number(2), nargs="+", default=list(TOKENS), help="window lengths")
    parser.add_argument("--rounds", type=whole_number(), default=3, help="steps of each (default: %(default)s)")
    parser.add_argument("--out", type=path_argument, help="also write the figures as JSON")
    options = parse_arguments(parser, arguments)
    with user_errors():
        from trainer.distributed import join, leave

        world = join(_TIMEOUT_S)
        shared = [ranks for ranks in range(1, world.size + 1) if world.size % ranks == 0]
        rows = []
        for tokens in options.tokens:
            configs = {ranks: _config(options, tokens, ranks, world) for ranks in shared}
            rows += measure(configs, world, options.rounds)
        leave()
        if world.is_main:
            print(report(rows, world.size), flush=True)
            if options.out:
                options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


def _config(options: argparse.Namespace, tokens: int, shared: int, world: World) -> PretrainConfig:
    from trainer.precision import resolve_precision

    config = load_run(
        options.config,
        [
            *options.overrides,
            f"data.sequence_tokens={tokens}",
            f"model.max_positions={tokens}",
            f"train.global_batch_samples={world.size}",
            "train.micro_batch_samples=1",
            "train.steps=10000",
            "train.schedule.kind=constant",
            "train.schedule.warmup_steps=0",
            f"deepspeed.sequence_parallel={shared}",
        ],
    )
    return resolve_precision(config, world)[0]


def measure(configs: Mapping[int, PretrainConfig], world: World, rounds: int) -> list[Row]:
    """A row for each number of ranks that share a window; collective."""
    import torch

    from bench.common.memory import kept_tensors, peak_bytes, tensor_bytes
    from bench.common.timing import take_turns
    from data.batches import TrainingData
    from model.visibility import Visibility
    from trainer.engine import build_engine
    from trainer.step import forward_at, to_device

    engines = {shared: build_engine(config, world) for shared, config in configs.items()}
    worlds = {shared: world.sharing_windows(config.deepspeed, _TIMEOUT_S) for shared, config in configs.items()}
    steps = {str(shared): stepper(engine, configs[shared], worlds[shared]) for shared, engine in engines.items()}
    seconds = take_turns(steps, rounds, world.device)
    alone = configs[1]
    batch, progress = TrainingData(alone.data).batch([0]), alone.train.progress(0)
    with torch.no_grad():
        output = forward_at(engines[1].module, to_device(batch, world.device), alone, progress)
    executed = output.routing.executed[:, 0].cpu()
    keys = Visibility(torch.arange(executed.shape[1]), executed.shape[1], batch.documents).counts()[0]
    rows = []
    for shared, config in configs.items():
        engine, here = engines[shared], worlds[shared]
        peak = peak_bytes(steps[str(shared)], world.device)
        own = to_device(here.local_part(batch), world.device)
        output, kept = kept_tensors(partial(forward_at, engine, own, config, progress, sequence=here.sequence))
        weights = {weight.untyped_storage().data_ptr() for weight in engine.module.parameters()}
        held = tensor_bytes(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in weights)
        del output, kept
        most = world.all_reduce_max(torch.tensor([held, peak], dtype=torch.float64, device=world.device)).tolist()
        rows.append(
            Row(
                config.data.sequence_tokens,
                shared,
                seconds[str(shared)],
                int(most[0]),
                int(most[1]),
                balance(config, executed, keys, shared),
                balance(config, executed, keys, shared, in_order=True),
            )
        )
    for engine in engines.values():
        engine.destroy()
    return rows


def balance(config: PretrainConfig, executed: Tensor, keys: Tensor, shared: int, in_order: bool = False) -> float:
    """FLOPs of the busiest rank over the mean of the ranks that share a window.

    Args:
        config: the run's.
        executed: bool [S, T], what each routed site executes.
        keys: int64 [T], how many keys each token sees.
        shared: ranks per window.
        in_order: each rank has one stretch, from first to last.
    """
    import torch

    from model.flops import Routed, executed_flops
    from model.sequence import positions_of

    stretches = torch.arange(len(keys)).chunk(shared)
    flops = []
    for rank in range(shared):
        own = stretches[rank] if in_order else positions_of(rank, shared, len(keys))
        mask, seen = executed[:, own], keys[own]
        counts = Routed(len(own), int(seen.sum()), mask.sum(1).tolist(), (mask * seen).sum(1).tolist())
        flops.append(executed_flops(config.model, counts))
    return max(flops) * shared / sum(flops)


def report(rows: Sequence[Row], ranks: int) -> str:
    """A table; each length is relative to its row without sharing."""
    from bench.common.timing import ratios

    table = [["tokens", "ranks a window", "time", "activations", "peak memory", "busiest rank", "in order"]]
    for row in rows:
        alone = next(r for r in rows if r.tokens == row.tokens and r.shared == 1)
        spread = ratios(row.seconds, alone.seconds)
        table.append(
            [
                f"{row.tokens:,}",
                str(row.shared),
                f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})",
                f"{row.kept_bytes / alone.kept_bytes:.3f}",
                f"{row.peak_bytes / alone.peak_bytes:.3f}",
                f"{row.balance:.3f}",
                f"{row.in_order:.3f}",
            ]
        )
    return f"{ranks} ranks, {ranks} windows a step\n{tables.columns(table)}"


if __name__ == "__main__":
    raise SystemExit(main())
