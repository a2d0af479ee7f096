"""What a checkpoint costs a run: written while training waits, and in the background.

    python -m bench.saving configs/demo.yaml --steps 10 --rounds 5 [key.sub=value ...]

In every round equally many steps are taken three times: alone, after a save that was waited for, and after one that is
still being written. The cost of a save is how much longer the steps then take, in units of a step taken alone; the
three follow each other directly, so that a busy machine slows all of them. CONFIG's shards must be prepared; its number
of steps is set here, and the learning rate stays at its peak. One process; the checkpoints go to a temporary folder
below ``--disk``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.common.steps import stepper
from settings import command_parser, parse_arguments, path_argument, user_errors, whole_number
from trainer.config import PretrainConfig, load_run

if TYPE_CHECKING:
    from trainer.distributed import World


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = command_parser("bench.saving", __doc__)
    parser.add_argument("config", help="YAML of a stage-one run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--steps", type=whole_number(), default=10, help="steps after each save (default: %(default)s)")
    parser.add_argument("--rounds", type=whole_number(), default=5, help="repetitions (default: %(default)s)")
    parser.add_argument(
        "--disk", type=path_argument, default=Path(), help="folder to write below (default: the current one)"
    )
    parser.add_argument("--out", type=path_argument, help="also write the figures as JSON")
    options = parse_arguments(parser, arguments)
    with user_errors():
        steps = 1 + 3 * options.steps * options.rounds
        config = load_run(options.config, [*options.overrides, f"train.steps={steps}"])
        from trainer.distributed import join, leave
        from trainer.precision import resolve_precision

        world = join(60.0)
        config, _ = resolve_precision(config, world)
        world = world.sharing_windows(config.deepspeed, 60.0)
        with tempfile.TemporaryDirectory(dir=options.disk) as folder:
            figures = measure(config, world, Path(folder), options.steps, options.rounds)
        leave()
        print(report(figures), flush=True)
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(config: PretrainConfig, world: World, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """The figures that :func:`report` prints.

    Args:
        config: its ``train.steps`` must be enough for all rounds, and one step before them.
        world: of one process.
        folder: for the checkpoints.
        steps: taken after each save.
        rounds: repetitions.
    """
    from trainer.checkpoints.layout import newest_first
    from trainer.checkpoints.save import Saver
    from trainer.engine import build_engine

    engine = build_engine(config, world)
    step = stepper(engine, config, world)
    saver, number = Saver(folder, "", config, world, lambda sentence: None), count(1)

    def save() -> None:
        saver.save(engine, next(number), {"step": 0})

    _seconds(step)  # the first step initialises lazily
    save()
    saver.wait()
    found: dict[str, list[float]] = {"waiting": [], "background": [], "copying": []}
    for _ in range(rounds):
        alone_s = _seconds(step, steps) / steps
        waiting_s = _seconds(save) + _seconds(saver.wait) + _seconds(step, steps)
        copying_s = _seconds(save)
        background_s = copying_s + _seconds(step, steps)
        saver.wait()
        found["waiting"].append(waiting_s / alone_s - steps)
        found["background"].append(background_s / alone_s - steps)
        found["copying"].append(copying_s / alone_s)
    size = sum(file.stat().st_size for file in newest_first(folder)[0].rglob("*") if file.is_file())
    engine.destroy()
    return {"checkpoint_bytes": size, "steps": steps, "cost_in_steps": found}


def report(figures: dict[str, Any]) -> str:
    """A table: median and range over the rounds."""
    lines = [f"a checkpoint of {figures['checkpoint_bytes'] / 1e6:.1f} MB, {figures['steps']} steps after each save"]
    names = {
        "waiting": "training waits until it is whole",
        "background": "written while training goes on",
        "copying": "  of which the copy to host memory",
    }
    for name, words in names.items():
        costs = figures["cost_in_steps"][name]
        lines.append(f"{words:36} {median(costs):6.2f} steps ({min(costs):.2f} to {max(costs):.2f})")
    return "\n".join(lines)


def _seconds(call: Callable[[], Any], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
