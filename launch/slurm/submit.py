"""Put what a job needs into its run folder, and hand the scripts to SLURM: all of a chain, or nothing of it.

RUN/submit/TIME/
  code/                  the project's Python as it was, which the job runs; commit.txt and changes.diff beside it
  config.original.yaml   as written, which the job reads with the overrides in job.sbatch
  config.yaml            resolved
  job.sbatch             and export.sbatch, at the end of a chain; prepare.sbatch in data.dir/submit/TIME
  jobs                   SLURM's ids, one a line
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.files import write_atomically
from launch.slurm.jobs import StageJob
from launch.slurm.preparation import PrepareJob
from settings import to_yaml
from trainer import git_state
from trainer.checkpoints.layout import CONFIG

_DIRECTIVE = "#SBATCH "
_OF_A_JOB = ("SLURM_", "SRUN_", "PMI_", "PMIX_")
"""What a shell inside a job has in its environment: ``srun`` of a job that is submitted there would take it for that
one's, such as the cores (SLURM_CPU_BIND)."""
_KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")
"""By which ``sbatch`` finds its cluster."""


@dataclass(frozen=True)
class BatchJob:
    """One script for ``sbatch``.

    Attributes:
        what: the module that it runs.
        file: the script's name in the submission's folder.
        script: its text.
        stage: whose run folders it belongs to.
    """

    what: str
    file: str
    script: str
    stage: StageJob | PrepareJob


def submit(jobs: Sequence[BatchJob], submission: str, after: str | None = None) -> list[str]:
    """Submit ``jobs`` as a chain, each after the one before it has succeeded; returns their ids.

    Args:
        jobs: in their order.
        after: id of a job in the queue, before the first of them.
        submission: name of the new folder in every ``RUN/submit``.

    Raises:
        ValueError: if SLURM is not there or refuses one of them; nothing of the chain stays in the queue then, nor
            after Ctrl-C.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "there is no sbatch here; submit on a machine of the cluster, or look at the script with --dry-run"
        )
    _refuse_queued([job.stage for job in jobs])
    ids: list[str] = []
    try:
        for job in jobs:
            for number, folder in enumerate(job.stage.folders):
                _write(job, number, folder / "submit" / submission)
        for number, job in enumerate(jobs):
            script = job.stage.folders[0] / "submit" / submission / job.file
            # Task i of an array waits for task i of the array before it; anything else for all of what is before it.
            kind = "aftercorr" if number and len(job.stage.tasks) > 1 else "afterok"
            before = ids[-1] if ids else after
            with _interrupted_after():
                ids.append(_sbatch(job, script, None if before is None else f"{kind}:{before}"))
                for folder in job.stage.folders:
                    with (folder / "submit" / submission / "jobs").open("a") as file:
                        file.write(f"{ids[-1]}\n")
    except BaseException:
        with _interrupted_after():
            _withdraw(ids, [folder / "submit" / submission for job in jobs for folder in job.stage.folders])
        raise
    return ids


@contextmanager
def _interrupted_after() -> Iterator[None]:
    """Ctrl-C takes effect at the end: ``sbatch`` would end with the job in the queue and its id not told.

    What is run inside has to be in a process group of its own, to which the terminal sends nothing.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _withdraw(ids: Sequence[str], folders: Sequence[Path]) -> None:
    """Take a chain back: its jobs out of the queue, then the submission's ``folders``, by which others know of them."""
    if ids and subprocess.run(["scancel", *ids], check=False, process_group=0).returncode:
        print(
            f"note: {' '.join(ids)} may still be in the queue; take them out: scancel {' '.join(ids)}", file=sys.stderr
        )
        return
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _sbatch(job: BatchJob, script: Path, dependency: str | None) -> str:
    """Submit ``script``; returns its id."""
    command = ["sbatch", "--parsable", *_options(script)]
    if dependency is not None:
        # A job whose predecessor failed is cancelled, not left in the queue.
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    own = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(_OF_A_JOB)}
    done = subprocess.run(
        [*command, str(script)], env=own, capture_output=True, text=True, check=False, process_group=0
    )
    if done.returncode:
        said = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
        raise ValueError(
            f"sbatch refused the script of {job.stage.run} ({said}); nothing was submitted; correct what it names"
        )
    return done.stdout.strip().split(";")[0]


def _options(script: Path) -> list[str]:
    """Those in the script, to be given again: SBATCH_TIMELIMIT and its kind in the environment go before the script."""
    lines = (line for line in script.read_text().splitlines() if line.startswith(_DIRECTIVE))
    return [word for line in lines for word in shlex.split(line.removeprefix(_DIRECTIVE), comments=True)]


def _write(job: BatchJob, number: int, folder: Path) -> None:
    """Fill the submission's ``folder`` of task ``number``, and make the one for the job's output."""
    (folder.parents[1] / "logs").mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        copy_code(folder / "code")
        shutil.copyfile(job.stage.file, folder / "config.original.yaml")
        write_atomically(folder / CONFIG, to_yaml(job.stage.configs[number]).encode())
    write_atomically(folder / job.file, job.script.encode())


def copy_code(folder: Path) -> None:
    """The Python of every package, and which commit and changes it is."""
    for package in git_state.packages():
        for path in package.rglob("*.py"):
            copy = folder / path.relative_to(git_state.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    (folder / git_state.COMMIT).write_text(f"{git_state.commit() or ''}\n")
    (folder / git_state.CHANGES).write_text(git_state.diff())


def _refuse_queued(stages: Sequence[StageJob | PrepareJob]) -> None:
    """Two jobs that write to one folder would destroy it."""
    for folder, field in {folder: stage.field for stage in stages for folder in stage.folders}.items():
        for path in sorted(folder.glob("submit/*/jobs")):
            for job in path.read_text().split():
                asked = subprocess.run(
                    ["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True, check=False
                )
                if asked.stdout.strip():  # SLURM forgets a job some minutes after its end, and then fails
                    raise ValueError(
                        f"job {job} of {folder} is in the queue or running; wait until it ends, cancel it with scancel "
                        f"{job}, or give another {field}"
                    )
