"""Look at everything that commonly ends a run early, in seconds, before it is started.

    python -m launch.doctor                                        # this machine
    python -m launch.doctor configs/skip_1b.yaml                   # and disk, data and memory for that config
    python -m launch.doctor my.yaml --hostfile hostfile            # and the hosts of a deepspeed hostfile
    deepspeed --module launch.doctor my.yaml                       # and the ranks: same code, clocks, all-reduce
    srun python -m launch.doctor my.yaml
    torchrun --nproc-per-node 8 -m launch.doctor my.yaml

Start it in the way in which the run will be started. One report, by rank 0: ``ok``, ``warning`` (slow or fragile) or
``error`` (would fail or hang), each with what to do. Exit status: 0 without errors, 1 with. Nothing is changed: a file
of 64 MiB is written beside the run folder and removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data.files import nearest_folder
from launch.configs import load_either, without_storage
from launch.doctor import hosts
from launch.doctor.findings import Check, Finding, merge, run, worst
from launch.plan.memory_model import CONTEXT_BYTES, GIB, checkpoint_bytes, memory
from launch.plan.workload import Workload, count_weights
from settings import (
    command_parser,
    counted,
    parse_arguments,
    path_argument,
    rank_by_environment,
    ranks_by_environment,
    user_errors,
)
from trainer.checkpoints.retention import most_at_once
from trainer.config import PretrainConfig
from tune.config import TuneFile

if TYPE_CHECKING:
    import torch

    from trainer.distributed import World

_MEET_S = 60.0


def main() -> int:
    """Print the report; 1 if it holds an error."""
    arguments = parse_arguments(_parser())
    with user_errors():
        config = None if arguments.config is None else load_either(arguments.config, arguments.overrides)
        if rank_by_environment() == 0 and not arguments.json:
            print("checking; torch takes some seconds to load", file=sys.stderr, flush=True)
        from trainer.distributed import ALONE, join, leave

        world = join(_MEET_S) if _launched() else ALONE
        findings = diagnose(config, arguments.hostfile, world)
        if world.is_main:
            print(_as_json(findings) if arguments.json else _as_text(findings), flush=True)
        if world is not ALONE:
            leave()
    return 1 if worst(findings) == "error" else 0


def diagnose(config: PretrainConfig | TuneFile | None, hostfile: Path | None, world: World) -> list[Finding]:
    """All findings of all ranks, the same list on each; collective."""
    from launch.doctor import inputs

    ranks, device = _run_on(world)
    workload, sized = _sized(config, world, ranks, device)
    own = run(machine_checks(config, workload, world, ranks))
    found = merge(world.all_gather_objects((socket.gethostname(), own)))
    if config is not None:
        data = (
            partial(inputs.shards, config) if isinstance(config, PretrainConfig) else partial(inputs.examples, config)
        )
        reads: dict[str, Check] = {
            "settings": partial(inputs.settings, config),
            "data": data,
            "tasks": partial(inputs.tasks, config.train.evaluation.tasks),
        }
        found += sized + world.broadcast_object(run(reads) if world.is_main else None)
    if hostfile is not None:
        found += world.broadcast_object(run({"hostfile": partial(hosts.hostfile, hostfile)}) if world.is_main else None)
    if world.size > 1:
        found += between_ranks(workload, world)
    return found


def machine_checks(
    config: PretrainConfig | TuneFile | None, workload: Workload | None, world: World, ranks: int
) -> dict[str, Check]:
    """What each rank looks at: its GPU, for a run on so many ``ranks``; the first of a machine at all else."""
    from launch.doctor import machine, storage

    train = None if config is None else config.train
    needed = size = None
    if workload is not None:
        stage = workload.config.deepspeed.zero_stage
        needed = memory(workload, stage, ranks).peak - CONTEXT_BYTES
        size = checkpoint_bytes(workload, stage)
    checks: dict[str, Check] = {"gpus": partial(machine.gpus, needed, world.device.index)}
    if world.local_rank:
        return checks
    folder = nearest_folder(Path.cwd() if train is None else Path(str(train.run_dir)))
    keep = 0 if train is None else most_at_once(train) - 1
    checks = {
        "python": machine.python,
        "packages": machine.packages,
        "cuda": machine.cuda,
        **checks,
        "compiler": partial(machine.compiler, train),
        "locks": machine.locks,
        "limits": machine.limits,
        "disk": partial(storage.space, folder, size, keep),
        "write speed": partial(storage.write_speed, folder, size),
    }
    if train is not None:
        checks["run folder"] = partial(storage.run_folder, train)
        checks["trackers"] = partial(storage.trackers, train)
        if train.checkpoint.mirror is not None:
            checks["mirror"] = partial(storage.mirror, train)
    if "RANK" not in os.environ:
        checks["port"] = machine.port  # of launched ranks it is in use, by them
    return checks


def between_ranks(workload: Workload | None, world: World) -> list[Finding]:
    """What only several ranks can find out together."""
    from launch.doctor import ranks

    everyone = world.all_gather_objects(ranks.facts(world))
    checks: dict[str, Check] = {
        "ranks": partial(ranks.devices, everyone),
        "code": partial(ranks.same_everywhere, everyone),
        "clocks": partial(ranks.clocks, everyone),
        "all-reduce": partial(ranks.all_reduce, world),
    }
    if workload is not None:
        checks["batch"] = partial(ranks.batch, workload.config, world)
    return world.broadcast_object(run(checks))


def _run_on(world: World) -> tuple[int, torch.device]:
    """How many ranks the run will have, and where they compute: alone the doctor stands for all GPUs of the machine."""
    import torch

    from trainer.deepspeed_internals import uses_cuda

    if world.size > 1 or not uses_cuda():
        return world.size, world.device
    return torch.cuda.device_count(), torch.device("cuda")


def _sized(
    config: PretrainConfig | TuneFile | None, world: World, ranks: int, device: torch.device
) -> tuple[Workload | None, list[Finding]]:
    """Parameters of the config and memory of a rank; without them where stage two's base is not there; collective."""
    if config is None:
        return None, []
    from trainer.precision import CPU_WIDTH, auto_precision, fast_bf16

    sized: list[Workload] = []
    everywhere = auto_precision(dataclasses.replace(world, device=device), CPU_WIDTH)

    def count() -> Iterator[Finding]:
        resolved, decoder = without_storage(config)
        fast, reason = fast_bf16(device, resolved.model.width)
        precision, why = everywhere if fast else ("fp32", reason)
        if resolved.train.precision == "auto":
            resolved = resolved.in_precision(precision)
            yield Finding("precision", "ok", f"train.precision auto is {precision}: {why}")
        elif resolved.train.precision == "bf16" and precision == "fp32":
            yield Finding("precision", "warning", f"train.precision bf16 is slow: {why}", "set train.precision to fp32")
        workload = Workload(resolved, count_weights(decoder, resolved))
        sized.append(workload)
        weights, stage = workload.weights, resolved.deepspeed.zero_stage
        held = memory(workload, stage, ranks)
        size, place = (held.peak, "GPU") if device.type == "cuda" else (held.on_cpu, "process on this CPU")
        summary = f"{weights.total:,} parameters, {weights.trained:,} trained; about {size / GIB:,.1f} GiB a {place}"
        yield Finding("model", "ok", f"{summary} at ZeRO {stage} on {counted(ranks, 'rank')}")

    findings = run({"model": count})
    return (sized[0] if sized else None), findings


def _launched() -> bool:
    """True under a launcher with several ranks; a shell in a SLURM allocation is none."""
    return ranks_by_environment() > 1


def _as_text(findings: list[Finding]) -> str:
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:7}  {finding.check:{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':7}  {'':{width}}  -> {finding.remedy}")
    counts = {level: sum(f.level == level for f in findings) for level in ("error", "warning")}
    summary = ", ".join(f"{counted(n, level)}" for level, n in counts.items() if n) or "nothing to fix"
    return "\n".join([*lines, "", summary])


def _as_json(findings: list[Finding]) -> str:
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("launch.doctor", __doc__)
    parser.add_argument(
        "config", nargs="?", help="YAML of a run of either stage; without it only the machine is checked"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument(
        "--hostfile", type=path_argument, help="hostfile of the deepspeed launcher, every host of which is checked"
    )
    parser.add_argument("--json", action="store_true", help="findings as JSON: check, level, found, remedy")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
