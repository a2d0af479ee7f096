"""Run what a suite asks for and what is not there yet, each run in a process of its own; see ``bench/isoflop``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.children import Children
from bench.common.jobs import Job
from bench.common.run_folders import refuse_other
from bench.isoflop.suite import Downstream, Run, Suite
from data.config import DataConfig
from data.files import read_json, write_json
from settings import load
from trainer.checkpoints.layout import CONFIG
from trainer.config import PretrainConfig
from trainer.monitor import metrics_file

HARNESS, DIAL = "harness.json", Path("dial/dial.json")
"""In a run folder: what downstream tasks and the compute dial gave."""


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


def submit(suite: Suite, runs: Sequence[Run], options: Sequence[str]) -> list[str]:
    """Hand ``runs`` to SLURM, one job each; a sentence for each that was refused."""
    refused = []
    for run in runs:
        command = [sys.executable, "-m", "launch.slurm", suite.backbone, *run.overrides, *options]
        done = subprocess.run(command, check=False)
        if done.returncode:
            refused.append(f"{run.name}: not submitted, see above")
    return refused
