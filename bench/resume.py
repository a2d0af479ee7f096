"""Resume at any size: a table of every number of ranks and ZeRO stage that writes by every one that reads.

    python -m bench.resume configs/demo.yaml --precision bf16 [key.sub=value ...]

Each writer trains a few steps, saves, and trains on: that is the uninterrupted run. Each reader resumes from the
checkpoint and its losses are compared with the writer's; a cell is the largest difference in nats. Two lines below the
table put the differences into perspective: how far apart the uninterrupted runs are, because ranks and stages round
differently; and how far off a reader is that keeps the weights but discards the optimiser state.

CONFIG's shards must be prepared. Its batch must be divisible by the largest number of ranks. Runs with gloo on the CPU,
or on as many GPUs as ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.common.children import Children
from bench.common.steps import stepper
from settings import command_parser, parse_arguments, path_argument, user_errors, whole_number
from trainer.config import PretrainConfig, load_run
from trainer.local_ranks import free_port

if TYPE_CHECKING:
    from trainer.distributed import World

BEFORE, AFTER = 4, 4
"""Steps before the save, and after it."""
STAGES = (0, 1, 2, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write with every size, read with every size, print the table."""
    parser = command_parser("bench.resume", __doc__)
    parser.add_argument("config", help="YAML of a stage-one run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--ranks", type=whole_number(), nargs="+", default=[1, 2], help="numbers of ranks (default: 1 2)"
    )
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=STAGES, help="ZeRO (default: all)")
    parser.add_argument("--out", type=path_argument, help="also write the differences as JSON")
    parser.add_argument(
        "--work", type=path_argument, help=argparse.SUPPRESS
    )  # given to the ranks that this command starts
    parser.add_argument("--phase", choices=["write", "read"], help=argparse.SUPPRESS)
    options = parse_arguments(parser, arguments)
    with user_errors():
        if options.phase:
            _rank(options)
            return 0
        with tempfile.TemporaryDirectory() as work:
            found = measure(options.config, options.overrides, options.precision, options.ranks, options.stages, work)
        print(table(found), flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    config: Path,
    overrides: list[str],
    precision: str,
    ranks: Sequence[int],
    stages: Sequence[int],
    work: str,
    read_with: Sequence[str] = (),
) -> dict[str, Any]:
    """Losses after the save: ``written`` by writer, ``resumed`` by writer and reader, ``weights_only`` by writer.

    Args:
        config, overrides: a stage-one run.
        precision: of all runs.
        ranks, stages: every combination writes, and every one reads.
        work: an empty folder.
        read_with: further overrides of the readers.

    Raises:
        ValueError: if ranks end with an error.
    """
    load_run(config, overrides)  # its mistakes are reported once
    for phase in ("write", "read"):
        for count in ranks:
            arguments = [str(config), *overrides, *(read_with if phase == "read" else ())]
            arguments += ["--precision", precision, "--work", work, "--phase", phase]
            arguments += ["--stages", *map(str, stages), "--ranks", str(count)]
            log = Path(work, f"{phase}-{count}.log")
            if status := _start_ranks(count, arguments, log):
                said = log.read_text(errors="replace")[-3000:]
                raise ValueError(f"{count} ranks ended with status {status} ({phase}):\n{said}")
    found: dict[str, Any] = {"precision": precision, "written": {}, "resumed": {}, "weights_only": {}}
    for file in sorted(Path(work).glob("*.json")):
        for kind, losses in json.loads(file.read_text()).items():
            found[kind] |= losses
    return found


def table(found: dict[str, Any]) -> str:
    """The differences, a row for each writer and a column for each reader."""
    written, resumed = found["written"], found["resumed"]
    sizes = sorted(written)
    lines = [f"{found['precision']}, largest difference of the loss in nats; WxS: W ranks, ZeRO stage S"]
    lines.append("written \\ read " + " ".join(f"{size:>8}" for size in sizes))
    for writer in sizes:
        cells = [difference(resumed[f"{writer} {reader}"], written[writer]) for reader in sizes]
        lines.append(f"{writer:>14} " + " ".join(f"{cell:8.1e}" if cell else "       0" for cell in cells))
    apart = max(difference(written[a], written[b]) for a in sizes for b in sizes)
    lines.append(f"uninterrupted runs among themselves: {apart:.1e}")
    without = [difference(losses, written[writer]) for writer, losses in found["weights_only"].items()]
    lines.append(f"weights without the optimiser's state: {min(without):.1e} to {max(without):.1e}")
    return "\n".join(lines)


def difference(a: list[float], b: list[float]) -> float:
    """Largest difference between losses of the same step."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _start_ranks(count: int, arguments: list[str], log: Path) -> int:
    """Run this module in ``count`` ranks to its end; returns the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command += [f"--master-port={free_port()}", "-m", "bench.resume", *arguments]
    with Children() as children:
        return children.run(command, log)


def _rank(options: argparse.Namespace) -> None:
    from trainer.distributed import join, leave

    world = join(120.0)
    found: dict[str, dict[str, list[float]]] = {"written": {}, "resumed": {}, "weights_only": {}}
    for stage in options.stages:
        own = [f"deepspeed.zero_stage={stage}", f"train.precision={options.precision}"]
        config = load_run(options.config, [*options.overrides, *own])
        name = f"{world.size}x{stage}"
        if options.phase == "write":
            found["written"][name] = _write(config, options.work / name, world)
            continue
        for folder in sorted(p for p in options.work.iterdir() if p.is_dir()):
            found["resumed"][f"{folder.name} {name}"] = _read(config, folder, world)
        if stage == options.stages[0]:
            found["weights_only"][name] = _read(config, options.work / name, world, keep_state=False)
    if world.is_main:
        (options.work / f"{options.phase}-{world.size}.json").write_text(json.dumps(found))
    world.barrier()
    leave()


def _write(config: PretrainConfig, folder: Path, world: World) -> list[float]:
    from trainer.checkpoints.save import Saver
    from trainer.engine import build_engine

    engine = build_engine(config, world)
    _train(engine, config, world, 0, BEFORE)
    saver = Saver(folder, "", config, world, lambda sentence: None)
    saver.save(engine, BEFORE, {"step": BEFORE})
    losses = _train(engine, config, world, BEFORE, AFTER)
    saver.wait()
    engine.destroy()
    return losses


def _read(config: PretrainConfig, folder: Path, world: World, keep_state: bool = True) -> list[float]:
    from trainer.checkpoints import manifest, resume
    from trainer.deepspeed_internals import torch_optimizer
    from trainer.engine import build_engine

    engine = build_engine(config, world)
    found, _ = manifest.newest_whole(folder, world)
    assert found is not None
    resume.load(engine, found, "", config, world)
    if not keep_state:
        torch_optimizer(engine).state.clear()
    losses = _train(engine, config, world, BEFORE, AFTER)
    engine.destroy()
    return losses


def _train(engine: Any, config: PretrainConfig, world: World, first: int, count: int) -> list[float]:
    """Losses of ``count`` steps from step ``first`` on."""
    step = stepper(engine, config, world, first)
    return [step().tally.loss for _ in range(count)]


if __name__ == "__main__":
    raise SystemExit(main())
