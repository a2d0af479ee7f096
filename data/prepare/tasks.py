"""This process's share of the work, given by ``--part I/N`` or by SLURM."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


class Task(NamedTuple):
    """One of the processes, on any machines, that share a preparation."""

    number: int
    """From 0."""
    of: int
    """1 for a process that does everything."""
    said_by: str
    """Where this comes from, for a line in the log."""


ONLY_TASK = Task(0, 1, "")


def task_of(part: str | None, environment: Mapping[str, str] = os.environ) -> Task:
    """This process's task: ``part``, such as ``0/4``, or else its place in SLURM's job array and step.

    Tasks that ``srun`` starts within a job array divide the array task's share. A shell or batch script with no
    ``srun`` and no array does everything, however many tasks its allocation has.

    Raises:
        ValueError: ``part`` is not I/N, or the array's numbers have gaps.
    """
    if part is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", part)
        if found is None or int(found[1]) >= int(found[2]):
            raise ValueError(
                f"--part {part} must be I/N: task I, from 0 to N - 1, of N tasks that share the parts, such as 0/4"
            )
        return Task(int(found[1]), int(found[2]), "--part")
    array, arrays = _array(environment)
    step, steps = 0, 1
    if "SLURM_STEP_NUM_TASKS" in environment:
        step, steps = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    if arrays * steps == 1:
        return ONLY_TASK
    names = [name for name, count in (("job array", arrays), ("step", steps)) if count > 1]
    return Task(array * steps + step, arrays * steps, f"SLURM's {' and '.join(names)}")


def _array(environment: Mapping[str, str]) -> tuple[int, int]:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    given = {name: environment.get(f"SLURM_ARRAY_TASK_{name}", "1") for name in names}
    number, count, first, last, step = (int(given[name]) for name in names)
    if (last - first) // step + 1 != count:
        raise ValueError(
            f"the job array has {count} tasks with gaps between {first} and {last}, so tasks cannot tell their shares; "
            "submit --array=0-N, or give each task --part I/N"
        )
    return (number - first) // step, count
