"""Host overhead per layer and micro-batch: CPU time of a step with matrix products too small to matter.

    python -m bench.host configs/demo.yaml model.layers=24 model.width=64 model.heads=4 model.kv_heads=2 \\
        model.ffn_width=128 data.sequence_tokens=64 train.global_batch_samples=2 train.micro_batch_samples=2 --rounds 5

On a GPU a layer is as fast as its products or as the host that launches them, whichever is slower: the plan's
``HOST_MS`` come from here. ZeRO 1 and ZeRO 3, kept and recomputed activations, take turns in one process. Measured is
CPU time of the process, not wall time, of a whole step with its update, per layer and micro-batch. CONFIG's shards must
be prepared; its ZeRO stage, persistence threshold (0), activation checkpointing and number of steps are set here, and
the learning rate stays at its peak. A step has as many micro-batches as CONFIG says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.common.steps import stepper
from settings import command_parser, parse_arguments, path_argument, user_errors, whole_number
from trainer.config import PretrainConfig, load_run

if TYPE_CHECKING:
    from trainer.distributed import World

STAGES = (1, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = command_parser("bench.host", __doc__)
    parser.add_argument("config", help="YAML of a stage-one run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--rounds", type=whole_number(), default=5, help="steps of each (default: %(default)s)")
    parser.add_argument("--out", type=path_argument, help="also write the figures as JSON")
    options = parse_arguments(parser, arguments)
    with user_errors():
        configs = {
            (stage, recompute): load_run(
                options.config,
                [
                    *options.overrides,
                    f"deepspeed.zero_stage={stage}",
                    f"train.activation_checkpointing={str(recompute).lower()}",
                    "deepspeed.persistence_threshold=0",
                    f"train.steps={options.rounds + 1}",
                    "train.schedule.kind=constant",
                    "train.schedule.warmup_steps=0",
                ],
            )
            for stage in STAGES
            for recompute in (False, True)
        }
        from trainer.distributed import join, leave

        world = join(60.0)
        figures = measure(configs, world, options.rounds)
        leave()
        print(report(figures), flush=True)
        if options.out:
            named = {f"zero_{stage}{'_recomputed' if again else ''}": ms for (stage, again), ms in figures.items()}
            options.out.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    configs: Mapping[tuple[int, bool], PretrainConfig], world: World, rounds: int
) -> dict[tuple[int, bool], list[float]]:
    """CPU milliseconds per layer and micro-batch of each config, one figure per round."""
    from trainer.engine import build_engine
    from trainer.precision import resolve_precision

    steps: dict[tuple[int, bool], Callable[[], Any]] = {}
    engines = []
    for name, config in configs.items():
        decided, _ = resolve_precision(config, world)
        engines.append(build_engine(decided, world))
        steps[name] = stepper(engines[-1], decided, world.sharing_windows(decided.deepspeed, 60.0))
        steps[name]()  # the first step initialises lazily
    found: dict[tuple[int, bool], list[float]] = {name: [] for name in configs}
    for _ in range(rounds):
        for name, step in steps.items():
            parts = configs[name].model.layers * configs[name].accumulation(world.size)
            begin = time.process_time()
            step()
            found[name].append((time.process_time() - begin) / parts * 1e3)
    for engine in engines:
        engine.destroy()
    return found


def report(figures: Mapping[tuple[int, bool], Sequence[float]]) -> str:
    """A table: median and range over the rounds."""
    lines = ["CPU milliseconds of the host a layer and micro-batch"]
    for (stage, recompute), ms in figures.items():
        words = "activations recomputed" if recompute else "activations kept"
        lines.append(f"ZeRO {stage}, {words:24} {median(ms):6.2f} ({min(ms):.2f} to {max(ms):.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
