"""From nothing to a tuned decoder in Hugging Face's format: what ``make demo`` runs.

    python -m launch.demo configs/demo.yaml configs/tune_demo.yaml --processes 2

Tokenizer, shards, stage one and stage two under DeepSpeed, export, answers from the export: each stage is the command
that a user would type, printed before it runs. Ctrl-C, SIGTERM or SIGHUP ends the running stage and saves its training,
and the same command resumes from there; after a completed demo it starts from scratch, and keeps the earlier one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from launch.demo.estimate import Speed
from launch.demo.processes import Commands
from launch.demo.screen import Screen
from launch.demo.stages import Demo, DemoStage, Record
from settings import command_parser, load, path_argument, user_errors, whole_number
from settings.project import program_path
from trainer.config import load_run, name_run
from trainer.exit_status import EXIT_PREEMPTED
from trainer.local_ranks import free_port, visible_gpus
from tune.config import TuneFile


def main() -> int:
    """Run the demo; the exit status is that of the first command that fails, 75 if it was stopped."""
    parser = command_parser("launch.demo", __doc__)
    parser.add_argument("config", type=path_argument, help="YAML of stage one")
    parser.add_argument("tune_config", type=path_argument, help="YAML of stage two")
    parser.add_argument("--processes", type=whole_number(), default=2, help="ranks on this machine (at most one a GPU)")
    parser.add_argument("--again", default=shlex.join(sys.orig_argv), help=argparse.SUPPRESS)  # make passes its own
    arguments = parser.parse_args()
    with user_errors():
        one, two = load_run(arguments.config), load(arguments.tune_config, [], TuneFile)
        two = two.model_copy(update={"train": name_run(two.train, arguments.tune_config)})
        demo = Demo(arguments.config, arguments.tune_config, one, two)
        return run(demo, arguments.processes, arguments.again)


def run(demo: Demo, ranks: int, again: str) -> int:
    """Run all stages that are not done yet; returns the exit status.

    Args:
        demo: what to run.
        ranks: number of processes asked for.
        again: the command that resumes a stopped demo.

    Raises:
        ValueError: if the batches cannot be divided among ``ranks``, or this machine's speed cannot be measured.
    """
    possible = demo.possible_ranks()
    if ranks not in possible:
        raise ValueError(
            f"--processes (PROCESSES of make) must be {' or '.join(map(str, possible))}, got {ranks}, because "
            "train.global_batch_samples of both configs must be divisible by micro_batch_samples x ranks"
        )
    commands, environment = Commands(), _environment()
    speed = _measure(demo, ranks, commands, environment)
    if speed is None:
        return _stopped("before it began", again)
    if speed.gpus:
        ranks = max((count for count in possible if count <= min(ranks, speed.gpus)), default=1)
    else:
        environment["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would detect it by itself, with warnings
    stages = demo.stages(ranks, free_port(), visible_gpus(ranks) if speed.gpus else None)
    path = demo.run_dirs[0].with_name(f"{demo.run_dirs[0].name}-stages.json")
    if all(Record(path).is_done(stage) for stage in stages) or not path.exists():
        _start_afresh(demo, path)
    record = Record(path)
    going_on = any(record.seconds(stage) for stage in stages)
    left = [stage for stage in stages if not record.is_done(stage)]
    _introduce(left, speed, ranks, demo.folders if going_on else [])
    for number, stage in enumerate(stages, start=1):
        print(f"\n[{number}/{len(stages)}] {stage.name}: {stage.what}", flush=True)
        if stage.product is not None and record.is_done(stage):
            print(f"  done already: {stage.product}", flush=True)
            continue
        status = _run(stage, record, commands, environment)
        if commands.signals:
            return _stopped(f"in {stage.name}", again)
        if status:
            return status
    _conclude(demo, stages, record)
    return 0


def _run(stage: DemoStage, record: Record, commands: Commands, environment: dict[str, str]) -> int:
    print(f"$ {shlex.join([Path(stage.command[0]).name, *stage.command[1:]])}", flush=True)
    screen = Screen(stage.name, stage.steps, stage.step)
    try:
        status = commands.run(stage.command, environment, screen)
    finally:
        screen.close()
    record.add(stage, screen.took_s, done=status == 0 and not commands.signals)
    return status


def _environment() -> dict[str, str]:
    """Environment of the commands: unbuffered output, and no progress bars, since there is one here."""
    return os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}


class _Quiet(Screen):
    """Keeps the last line instead of showing it."""

    last = ""

    def line(self, text: str) -> None:
        self.last = text


def _measure(demo: Demo, ranks: int, commands: Commands, environment: dict[str, str]) -> Speed | None:
    """The speed of this machine; None if a signal arrived meanwhile.

    Raises:
        ValueError: if it cannot be measured.
    """
    print("measuring how fast this machine is ...", flush=True)
    screen = _Quiet("measuring")
    command = [sys.executable, "-m", "launch.demo.estimate", str(demo.config), "--ranks", str(ranks)]
    status = commands.run(command, environment, screen)
    screen.close()
    if commands.signals:
        return None
    if status:
        raise ValueError(f"{shlex.join(command)} failed ({screen.last}); run it to see why")
    return Speed(**json.loads(screen.last))


def _start_afresh(demo: Demo, record: Path) -> None:
    """Move an earlier demo's output out of the way; every other command refuses to overwrite an earlier run."""
    record.unlink(missing_ok=True)
    now = time.strftime("%Y%m%d-%H%M%S")
    moved = []
    for folder in demo.folders:
        if folder.exists():
            folder.rename(earlier := folder.with_name(f"{folder.name}-before-{now}"))
            moved.append(str(earlier))
    if moved:
        print(f"an earlier demo is kept; remove it when you like: {shlex.join(['rm', '-r', *moved])}")


def _introduce(stages: list[DemoStage], speed: Speed, ranks: int, made: list[Path]) -> None:
    """Print what will happen and about how long it takes; ``made``: folders of an earlier start that is resumed."""
    where = f"{ranks} GPUs" if speed.gpus else f"{ranks} processes on the CPU"
    about = speed.demo_s(stages, ranks)
    scratch = shlex.join(["rm", "-r", *(str(folder) for folder in made if folder.exists())])
    again = f"; goes on where the last one stopped (from scratch: {scratch})" if made else ""
    what = f"raw text to a tuned, exported decoder in {len(stages)} commands, on {where}"
    print(f"{what}: about {_minutes(about)} here{again}", flush=True)


def _minutes(seconds: float) -> str:
    """Rounded to ten seconds: ``50 s``, ``2 min 40 s``."""
    minutes, rest = divmod(max(round(seconds / 10), 1) * 10, 60)
    return " ".join(part for part in (f"{minutes} min" * (minutes > 0), f"{rest} s" * (rest > 0)) if part)


def _stopped(where: str, again: str) -> int:
    print(f"\nstopped {where}; go on with: {again}", flush=True)
    return EXIT_PREEMPTED


def _conclude(demo: Demo, stages: list[DemoStage], record: Record) -> None:
    """Print the stages with their seconds, and where the results are."""
    rows = [(stage.name, record.seconds(stage)) for stage in stages]
    total = sum(seconds for _, seconds in rows)
    print("\nstage      seconds")
    for name, seconds in [*rows, ("all", total)]:
        print(f"{name:<10} {seconds:>7.1f}")
    logs = ",".join(f"{path.name}:{path}" for path in demo.run_dirs)
    print(
        f"\nruns       {', '.join(map(str, demo.run_dirs))}; losses, densities, votes: {program_path('tensorboard')} "
        f"--logdir_spec {logs}\nrouting    which tokens use which layers: {program_path('python')} -m evals.routing "
        f"{demo.run_dirs[0]}\nexport     {demo.export}: transformers loads it"
    )


if __name__ == "__main__":
    raise SystemExit(main())
