"""Take a run back to an earlier checkpoint, to continue from there differently.

    python -m launch.rewind runs/my 4000

Later checkpoints and later lines of ``metrics.jsonl`` are moved to RUN/checkpoints/abandoned-N; nothing is deleted. The
run then resumes from that step, and after a preemption from wherever it has got to; that is why this is a command and
not a field of the config, which would go back again at every requeue. Then start the run again, with
train.checkpoint.resume=required and the change: data.skip_ranges to skip samples, a lower train.optimizer.lr, another
data.seed. Exit status: 0 when step STEP is the newest; 1 on an error, nothing moved.
"""

from __future__ import annotations

import time
from pathlib import Path

from data.files import only_writer, write_atomically
from settings import command_parser, path_argument, user_errors, whole_number
from trainer.checkpoints import manifest
from trainer.checkpoints.layout import (
    checkpoints_of,
    is_run,
    newest_first,
    next_abandoned,
    run_of,
    step_of,
    what_is_there,
)
from trainer.heartbeat import FINAL, read_beats
from trainer.monitor import metrics_file


def go_back(run: Path, step: int) -> Path | None:
    """Move ``run``'s checkpoints and metrics after ``step`` into a new folder ``checkpoints/abandoned-N``.

    A kill at any moment leaves every checkpoint in one of the two places, and repeating the call finishes the move.

    Returns:
        The folder; None if nothing was done after ``step``.

    Raises:
        ValueError: if there is no whole checkpoint of ``step``, or the run is still running.
    """
    folder = checkpoints_of(run)
    if not is_run(run):
        owner = run_of(run)
        hint = f", here {owner}" if owner else f", for example runs/my{what_is_there(run)}"
        raise ValueError(
            f"{run} is not a run folder: it has no checkpoints; give the folder that train.run_dir names{hint}"
        )
    there = newest_first(folder)
    named = ", ".join(str(step_of(found)) for found in reversed(there)) or "none"
    target = next((found for found in there if step_of(found) == step), None)
    if target is None:
        raise ValueError(f"{run} has no checkpoint of step {step}; give one of the steps found there: {named}")
    from trainer.distributed import ALONE  # torch

    problem = manifest.problem_of(target, ALONE)
    if problem is not None:
        raise ValueError(f"{target} is torn: {problem}; give another of the steps found there: {named}")
    _refuse_if_alive(run)
    with only_writer(run):  # a start that is still reading a checkpoint has no heartbeat yet
        return _move(run, there, step)


def _move(run: Path, there: list[Path], step: int) -> Path | None:
    """Move away checkpoints in ``there`` and lines after ``step``; returns the folder, None if there are none."""
    folder, metrics = checkpoints_of(run), run / metrics_file.NAME
    lines = metrics_file.read(metrics)
    later_lines = [line for line in lines if line["step"] > step]
    later = [found for found in there if step_of(found) > step]
    if not later and not later_lines:
        return None
    abandoned = next_abandoned(folder)
    abandoned.mkdir()
    write_atomically(abandoned / metrics_file.NAME, metrics_file.content_of(later_lines))
    for found in reversed(later):  # the newest last: until then a start resumes as if nothing had been moved
        found.rename(abandoned / found.name)
    if later_lines:
        kept = (line for line in lines if line["step"] <= step)
        write_atomically(metrics, metrics_file.content_of(kept))
    return abandoned


def _refuse_if_alive(run: Path) -> None:
    """Raise ValueError if a rank that has not ended is alive: its heartbeat advances while we watch."""
    first = {beat.rank: beat for beat in read_beats(run / "heartbeat") if beat.phase not in FINAL}
    if not first:
        return
    time.sleep(2.5 * max(beat.every_s for beat in first.values()))
    for beat in read_beats(run / "heartbeat"):
        if beat.rank in first and beat.beat != first[beat.rank].beat:
            raise ValueError(
                f"{run} is still running: rank {beat.rank} (process {beat.pid} on {beat.host}) is {beat.doing} at step "
                f"{beat.step:,}; stop it first (kill {beat.pid}; it saves and ends)"
            )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and move."""
    parser = command_parser("launch.rewind", __doc__)
    parser.add_argument("run", type=path_argument, help="run folder, for example runs/my")
    parser.add_argument("step", type=whole_number(0), help="optimiser steps done at the checkpoint to go back to")
    options = parser.parse_args(arguments)
    with user_errors():
        abandoned = go_back(options.run, options.step)
    if abandoned is None:
        print(f"nothing was done after step {options.step:,}; start again with train.checkpoint.resume=required")
        return 0
    moved = ", ".join(sorted(path.name for path in abandoned.iterdir()))
    print(
        f"{abandoned} now has {moved}; remove it when you like. Step {options.step:,} is the newest: start again with "
        "train.checkpoint.resume=required"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
