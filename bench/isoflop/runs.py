"""Run what a suite asks for and what is not there yet, each run in a process of its own; see ``bench/isoflop``."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tqdm import tqdm

from bench.common.children import Children
from bench.common.turns import last_words
from bench.isoflop.suite import Downstream, Run, Suite
from data.config import DataConfig
from data.files import read_json, write_json
from settings import load
from trainer.checkpoints.layout import CONFIG
from trainer.config import PretrainConfig
from trainer.exit_status import EXIT_PREEMPTED
from trainer.local_ranks import deepspeed_launcher, environment_alone, free_port
from trainer.monitor import metrics_file

HARNESS, DIAL = "harness.json", Path("dial/dial.json")
"""In a run folder: what downstream tasks and the compute dial gave."""
_SHOWN = 3


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: what to call it when it fails.
        arguments: a module of ours and its arguments.
        log: file for all that it prints.
        ranks: processes, under ``deepspeed`` if more than one.
        finish: called when it has ended well.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    ranks: int = 1
    finish: Callable[[], None] = lambda: None


def trained_in(runs: Sequence[Run]) -> list[str]:
    """The precisions of those ``runs`` that have begun; several if ``auto`` met unlike machines."""
    configs = [run.folder / CONFIG for run in runs]
    return sorted({load(path, [], PretrainConfig).train.precision for path in configs if path.is_file()})


def by_step(folder: Path) -> dict[int, dict[str, Any]]:
    """Everything in a run's ``metrics.jsonl``, one dictionary a step; empty if there is none."""
    found = dict[int, dict[str, Any]]()
    for line in metrics_file.read(folder / metrics_file.NAME):
        found.setdefault(line["step"], {}).update(line)
    return found


def is_done(run: Run) -> bool:
    """True if ``run`` was evaluated after its last step.

    Raises:
        ValueError: if its folder holds a run of another config.
    """
    _refuse_other(run)
    last = by_step(run.folder).get(run.config.train.steps, {})
    return all(f"validation/{source.name}/loss" in last for source in run.config.data.validation)


def _refuse_other(run: Run) -> None:
    if (run.folder / CONFIG).is_file():
        refuse_other(run.folder, lambda path: load(path, [], PretrainConfig), run.config)


def refuse_other(
    folder: Path, read: Callable[[Path], BaseModel], asked: BaseModel, left_out: Collection[str] = ()
) -> None:
    """Refuse a run folder that holds a run of another config than the one asked for.

    Args:
        folder: with a config.
        read: its config, of the same class as ``asked``.
        asked: what the run should be.
        left_out: dotted keys that do not decide what it is, or that a start fills in.

    Raises:
        ValueError: it does.
    """
    advice = "remove the folder, or choose another --out"
    try:
        found = _leaves(read(folder / CONFIG))
    except ValueError as error:
        raise ValueError(f"{folder} holds a run that this version cannot read ({error}); {advice}") from None
    wanted = _leaves(asked)
    if wanted["train.precision"] == "auto":  # the run's own machine decided
        wanted["train.precision"] = found["train.precision"]
    other = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    other = [key for key in other if not any(key == given or key.startswith(f"{given}.") for given in left_out)]
    if other:
        differences = ", ".join(f"{key} {found.get(key)} instead of {wanted.get(key)}" for key in other[:_SHOWN])
        more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        raise ValueError(f"{folder} holds a run with another config: {differences}{more}; {advice}")


def _leaves(config: BaseModel) -> dict[str, Any]:
    """Dotted keys and values of all that decides what a run is; not where it lies nor how it was started."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else name)
        else:
            found[key] = value

    walk(config.model_dump(mode="json", exclude={"train": {"run_dir": True, "checkpoint": {"resume"}}}), "")
    return found


def prepare(suite: Suite, run: Run) -> None:
    """Tokenizer and shards, unless they are there.

    Raises:
        ValueError: if they cannot be made.
    """
    if _is_prepared(run.config.data):
        return
    for module in ("data.tokenizer", "data.prepare"):
        with Children() as children:
            status = children.run([sys.executable, "-m", module, suite.backbone, *run.overrides])
        if status:
            raise ValueError(
                f"the suite's data cannot be prepared: python -m {module} {suite.backbone} failed, see above"
            )


def _is_prepared(config: DataConfig) -> bool:
    from data.batches import TrainingData, ValidationSet

    try:
        TrainingData(config)
        for source in config.validation:
            ValidationSet(config, source.name)
    except ValueError:
        return False
    return True


def training(suite: Suite, run: Run, ranks: int, logs: Path) -> Job:
    """Train ``run``, from its newest checkpoint if it has one."""
    return Job(run.name, ("pretrain.train", suite.backbone, *run.overrides), logs / f"{run.name}.log", ranks)


def dial(run: Run, logs: Path) -> Job | None:
    """Measure the compute dial of ``run``; None if it is there, or the run has none."""
    router, path = run.config.model.router, run.folder / DIAL
    if router is None or not router.learned or read_dial(run) is not None:
        return None
    return Job(
        f"dial of {run.name}", ("evals.dial", str(run.folder), "--out", str(path.parent)), _log(logs, run, "dial")
    )


def read_dial(run: Run) -> dict[str, Any] | None:
    """The dial of the run's last checkpoint; None if there is none."""
    path = run.folder / DIAL
    found = read_json(path) if path.is_file() else {}
    return found if found.get("step") == run.config.train.steps else None


def downstream(run: Run, asked: Downstream, logs: Path) -> Job | None:
    """Evaluate ``run`` on tasks; None if that was done, or the run has no likelihoods (``expert_choice``)."""
    router = run.config.model.router
    if (router is not None and not router.causal) or read_downstream(run, asked) is not None:
        return None
    path = run.folder / HARNESS
    arguments = ["evals.harness", str(run.folder), "--tasks", *asked.tasks, "--data", asked.data]
    arguments += ["--json", str(path)] + ([] if asked.limit is None else ["--limit", str(asked.limit)])

    def note() -> None:
        metrics = read_json(path)["ours"]["metrics"]
        write_json(path, {"asked": _asked(run, asked), "metrics": metrics})  # log-likelihoods are large, and not used
        path.with_suffix(".tasks.jsonl").unlink(missing_ok=True)

    return Job(f"downstream of {run.name}", tuple(arguments), _log(logs, run, "downstream"), finish=note)


def read_downstream(run: Run, asked: Downstream) -> dict[str, float] | None:
    """One figure a task: bits per byte of ``perplexity``, accuracy of the others; None if it is not done."""
    path = run.folder / HARNESS
    found = read_json(path) if path.is_file() else {}
    if found.get("asked") != _asked(run, asked):
        return None
    metrics: dict[str, dict[str, float]] = found["metrics"]
    figures = {}
    for task in asked.tasks:
        of_task = [m for name, m in metrics.items() if name == task or (task == "blimp" and name.startswith("blimp_"))]
        name = "bits_per_byte" if task == "perplexity" else "acc"
        figures[task] = sum(m[name] for m in of_task) / len(of_task)
    return figures


def _asked(run: Run, asked: Downstream) -> dict[str, Any]:
    return {**asked.model_dump(), "step": run.config.train.steps}


def _log(logs: Path, run: Run, what: str) -> Path:
    return logs / f"{run.name}-{what}.log"


def side_by_side(jobs: Sequence[Job], at_once: int, threads: int, unit: str) -> list[str]:
    """Run ``jobs``, ``at_once`` of them at any time; a sentence for each that failed, in their order.

    Args:
        jobs: to run.
        at_once: how many.
        threads: of each process.
        unit: what the progress bar counts.

    Raises:
        KeyboardInterrupt, SystemExit: on a signal that asks to stop, once the jobs that run have saved and ended.
    """
    if not jobs:
        return []
    places: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for devices in device_sets(at_once, jobs[0].ranks):
        places.put(devices)
    problems: dict[Job, str] = {}
    with Children() as children, ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), unit=unit) as bar:
        waiting = {pool.submit(_run, job, places, threads, children): job for job in jobs}
        for done in as_completed(waiting):
            if problem := done.result():
                problems[waiting[done]] = problem
            bar.update()
    return [problems[job] for job in jobs if job in problems]


def device_sets(at_once: int, ranks: int) -> list[str | None]:
    """The GPUs of each of ``at_once`` jobs of ``ranks`` ranks, ``2,3``; shared where there are too few. None without.

    Raises:
        ValueError: if one job needs more than there are.
    """
    import torch

    from trainer.deepspeed_internals import uses_cuda

    count = torch.cuda.device_count() if uses_cuda() else 0
    if not count:
        return [None] * at_once
    if ranks > count:
        raise ValueError(f"--ranks {ranks} needs as many GPUs, and there are {count}; take fewer ranks")
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    return [",".join(names[(place * ranks + rank) % count] for rank in range(ranks)) for place in range(at_once)]


def _run(job: Job, places: queue.SimpleQueue[str | None], threads: int, children: Children) -> str | None:
    """Run a job on a free set of devices; a sentence if it did not do what it was to."""
    devices = places.get()
    environment = environment_alone(threads)
    command = [sys.executable, "-m", *job.arguments]
    if devices is None:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    elif job.ranks == 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    if job.ranks > 1:
        command = [*deepspeed_launcher(job.ranks, free_port(), devices), "--module", *job.arguments]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        status = children.run(command, job.log, environment)
    finally:
        places.put(devices)
    if status and children.signals:
        return None  # what runs was asked to stop; nothing failed
    if status == EXIT_PREEMPTED:
        return f"{job.name}: it was asked to stop and has saved; the same command goes on with it"
    if status:
        return f"{job.name}: {last_words(job.log, status)} (all that it printed: {job.log})"
    job.finish()
    return None


def submit(suite: Suite, runs: Sequence[Run], options: Sequence[str]) -> list[str]:
    """Hand ``runs`` to SLURM, one job each; a sentence for each that was refused."""
    refused = []
    for run in runs:
        command = [sys.executable, "-m", "launch.slurm", suite.backbone, *run.overrides, *options]
        done = subprocess.run(command, check=False)
        if done.returncode:
            refused.append(f"{run.name}: not submitted, see above")
    return refused
