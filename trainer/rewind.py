"""Going back to an earlier checkpoint and on from there another way: behind a loss spike, or on other data.

    python -m launch.rewind runs/my 4000
    deepspeed --module pretrain.train my.yaml train.checkpoint.resume=required data.skip_ranges=[[36100,36900]]

The first command takes what was done after step 4,000 out of the way, into ``checkpoints/abandoned-N/``: the later
checkpoints and the later lines of ``metrics.jsonl``. Nothing is deleted. From then on step 4,000 is the newest, and the
run goes on from it at every start, after a preemption too; that is why this is a command and not a field of the config,
which would go back once more at every requeue.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.batches import pass_over
from data.files import write_atomically
from trainer.checkpoints import manifest
from trainer.checkpoints.retention import newest_first, step_of
from trainer.distributed import ALONE
from trainer.heartbeat import BEAT_EVERY_S, FINAL, read_beats
from trainer.monitor.spikes import Spike

Ranges = Sequence[Sequence[int]]


def go_back(run: Path, step: int) -> Path | None:
    """Move all that ``run`` did after ``step`` into a new folder ``checkpoints/abandoned-N``.

    A kill at any moment leaves every checkpoint in one of the two places, and a repetition finishes the move.

    Returns:
        The folder; None if nothing was done after ``step``.

    Raises:
        ValueError: if there is no whole checkpoint of ``step``, or the run is still going on.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        owner = run.parent.parent if run.parent.name == "checkpoints" else None
        hint = f", here {owner}" if owner else ", for example runs/my"
        raise ValueError(
            f"{run} is no run folder: it has no checkpoints; give the folder that train.run_dir names{hint}"
        )
    there = newest_first(folder)
    named = ", ".join(str(step_of(found)) for found in reversed(there)) or "none"
    target = next((found for found in there if step_of(found) == step), None)
    if target is None:
        raise ValueError(f"{run} has no checkpoint of step {step}; give one of the steps that are there: {named}")
    problem = manifest.problem_of(target, ALONE)
    if problem is not None:
        raise ValueError(f"{target} is torn: {problem}; give another of the steps that are there: {named}")
    _refuse_if_alive(run)
    kept, later_lines = _lines(run / "metrics.jsonl", step)
    later = [found for found in there if step_of(found) > step]
    if not later and not later_lines:
        return None
    numbers = [int(p.name.removeprefix("abandoned-")) for p in folder.glob("abandoned-*") if p.name[10:].isdigit()]
    abandoned = folder / f"abandoned-{max(numbers, default=0) + 1}"
    abandoned.mkdir()
    write_atomically(abandoned / "metrics.jsonl", "".join(later_lines).encode())
    for found in reversed(later):  # the newest last: until then a start goes on as if nothing had happened
        found.rename(abandoned / found.name)
    if later_lines:
        write_atomically(run / "metrics.jsonl", "".join(kept).encode())
    return abandoned


def how_to_go_back(run: Path, spike: Spike, skip_ranges: Ranges) -> str:
    """The commands, as half a sentence, that take ``run`` back before ``spike`` and have it pass over its samples."""
    before = next((found for found in newest_first(run / "checkpoints") if step_of(found) < spike.first_step), None)
    if before is None:
        return (
            "no checkpoint from before it is left to go back to; save more often or keep more "
            "(train.checkpoint.every_steps, keep, keep_every_steps)"
        )
    first, last = sample_ids(spike.consumed_before, spike.consumed, skip_ranges)
    others = [list(r) for r in skip_ranges if r[1] <= first or r[0] > last]
    ranges = json.dumps(sorted([*others, [first, last + 1]]), separators=(",", ":"))
    return (
        f"to go back before it: python -m launch.rewind {shlex.quote(str(run))} {step_of(before)}, then start again "
        f"with train.checkpoint.resume=required data.skip_ranges={ranges}"
    )


def sample_ids(consumed_before: int, consumed: int, skip_ranges: Ranges) -> tuple[int, int]:
    """The first and the last sample of those after the first ``consumed_before``, up to ``consumed`` in all."""
    ends = np.array([consumed_before, consumed - 1])
    first, last = pass_over(ends, [(start, end) for start, end in skip_ranges]).tolist()
    return first, last


def refuse_other_past(then: Ranges, now: Ranges, consumed: int) -> None:
    """Raise ValueError unless both ``data.skip_ranges`` lead to the same sample after ``consumed`` samples.

    The position in the data is the number of samples consumed. A range that is forgotten moves all later samples back,
    and one that is added where the run has been already passes over others than it names.
    """
    reached = sample_ids(0, consumed, then)[1] + 1 if consumed else 0
    past_then, past_now = ([list(r) for r in ranges if r[0] < reached] for ranges in (then, now))
    if past_then != past_now:
        raise ValueError(
            f"before sample {reached}, up to which the checkpoint was trained, it has passed over {past_then}, and "
            f"data.skip_ranges says {past_now}; keep what is there and add ranges from {reached} on "
            f"(data.skip_ranges={json.dumps(past_then, separators=(',', ':'))}), or go back to an earlier step with "
            "launch.rewind"
        )


def _refuse_if_alive(run: Path) -> None:
    """A rank that has not said that it ended is alive if its heartbeat goes on while we look."""
    first = {beat.rank: beat for beat in read_beats(run / "heartbeat") if beat.phase not in FINAL}
    if not first:
        return
    time.sleep(2.5 * BEAT_EVERY_S)
    for beat in read_beats(run / "heartbeat"):
        if beat.rank in first and beat.beat != first[beat.rank].beat:
            raise ValueError(
                f"{run} is going on: rank {beat.rank} (process {beat.pid} on {beat.host}) is {beat.doing} at step "
                f"{beat.step:,}; stop it first (kill {beat.pid}), it saves and ends"
            )


def _lines(metrics: Path, step: int) -> tuple[list[str], list[str]]:
    """The lines up to ``step`` and those after it; one that a kill cut in half is of neither."""
    kept: list[str] = []
    later: list[str] = []
    if metrics.exists():
        for text in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                (kept if json.loads(text)["step"] <= step else later).append(text)
            except ValueError:
                continue
    return kept, later
