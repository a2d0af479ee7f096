"""The runs of a comparison of tuning methods: what each is, how it is trained, what it reached."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.jobs import Job, side_by_side
from bench.common.run_folders import refuse_other
from data.files import write_atomically
from settings.project import resolve_shipped
from trainer.checkpoints.layout import CONFIG, checkpoints_of
from trainer.monitor import metrics_file
from tune.config import TuneFile
from tune.resolve import load_file

METHODS: dict[str, tuple[str, list[str]]] = {
    "full": ("full", []),
    "lora": ("lora", []),
    "lora_norm": ("lora_norm", []),
    "lora_ensemble": ("lora_ensemble", []),
    "dora": ("dora", []),
    "dora_ensemble": ("dora_ensemble", []),
    "ensemble_only": ("ensemble_only", []),
    "early_lora_ensemble": ("early_lora_ensemble", []),
    "full_ensemble": ("full_ensemble", []),
    "early_lora_ensemble_half": ("early_lora_ensemble", ["adapter.rank=4", "adapter.alpha=8"]),
    "early_lora_ensemble_quarter": ("early_lora_ensemble", ["adapter.rank=2", "adapter.alpha=4"]),
    "late_lora_ensemble": ("early_lora_ensemble", ["adapter.layers=late"]),
    # One step at a learning rate near zero: the adapters stay at zero.
    "none": ("lora", ["train.steps=1", "train.schedule.warmup_steps=0", "train.optimizer.lr=1e-12"]),
}
"""The config of each, and what else it takes; the first eight are the default."""
COMPARED = {
    "full_ensemble": "full",
    "lora_ensemble": "lora",
    "dora_ensemble": "dora",
    "early_lora_ensemble": "lora",
    "early_lora_ensemble_half": "lora",
    "early_lora_ensemble_quarter": "lora",
    "late_lora_ensemble": "lora",
}
"""What an ensemble is put on, or is to replace a part of."""
CHOICES = {"polarity": [" negative", " positive"], "subjectivity": [" objective", " subjective"]}
"""Responses of the tasks that come with train, validation and test files."""
SPLITS = {"train": "sources", "validation": "validation", "test": "test"}
"""Parts of a task, and the config's group that reads each."""
_FILLED_IN = ("model", "base.sha256", "base.seed", "base.cache_states", "data.tokenizer")
"""Of a saved config: what the base says, and where states are kept."""


class TuningRun(NamedTuple):
    """One method on one task with one seed, at the config's learning rate unless given."""

    method: str
    task: str
    seed: int
    rate: float | None = None

    def folder(self, out: Path) -> Path:
        """Its run folder."""
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return out / f"{self.task}-{self.method}-{self.seed}{rate}"


Runs = dict[tuple[str, str, int], TuningRun]
"""The runs of a table by method, task and seed."""


class Outcome(NamedTuple):
    """What a run reached on its test set, shares of examples, and what it trained."""

    final: float
    voted: float
    best_layer: float
    oracle: float
    trained: int
    total: int


def config_of(method: str) -> str:
    """Its config file."""
    return resolve_shipped(f"configs/tune_{METHODS[method][0]}.yaml")


def files_of(task: str, data: Path, out: Path) -> dict[str, Path]:
    """The task's files by split; of a file of questions they are written first.

    Raises:
        ValueError: if there is no such task.
    """
    found = {split: data / f"{task}-{split}.jsonl" for split in SPLITS}
    if found["train"].is_file():
        return found
    parts = {split: out / "data" / f"{task}-{split}.jsonl" for split in SPLITS}
    whole = data.parent / "tasks" / f"{task}.jsonl"
    if not whole.is_file():
        raise ValueError(f"--tasks {task}: there is neither {found['train']} nor {whole}; name another, or give --data")
    lines = [line for line in whole.read_text(encoding="utf-8").split("\n") if line.strip()]
    odd = lines[1::2]
    own = {"train": [x for n, x in enumerate(odd) if n % 5], "validation": odd[::5], "test": lines[::2]}
    (out / "data").mkdir(parents=True, exist_ok=True)
    for split, path in parts.items():
        content = "".join(f"{line}\n" for line in own[split]).encode()
        if not (path.is_file() and path.read_bytes() == content):
            write_atomically(path, content)
    return parts


def overrides(run: TuningRun, options: argparse.Namespace) -> list[str]:
    """The command line after the method's config."""
    files, block = files_of(run.task, options.data, options.out), {}
    for split, group in SPLITS.items():
        source: dict[str, Any] = {"name": run.task, "files": [str(files[split])]}
        if files[split].parent != options.data:
            source["format"] = "question"
        elif run.task in CHOICES and group != "sources":
            source["choices"] = CHOICES[run.task]
        block[group] = json.dumps([source], ensure_ascii=False)
    return [
        f"base.path={options.base}",
        *(f"data.{group}={value}" for group, value in block.items()),
        f"train.run_dir={run.folder(options.out)}",
        f"train.seed={run.seed}",
        f"data.seed={run.seed}",
        *options.overrides,
        *([] if run.rate is None else [f"train.optimizer.lr={run.rate:g}"]),
        *METHODS[run.method][1],
    ]


def job_of(run: TuningRun, options: argparse.Namespace) -> Job | None:
    """What trains it; None if that is done.

    Raises:
        ValueError: its folder holds a run of another base or of other settings.
    """
    folder, config = run.folder(options.out), config_of(run.method)
    if (folder / CONFIG).is_file():
        read = partial(_read_saved, base=options.base)
        refuse_other(folder, read, load_file(config, overrides(run, options)), _FILLED_IN)
    if outcome(folder, run.task) is not None:
        return None
    arguments = [config, *overrides(run, options), "train.checkpoint.resume=auto"]
    return Job(folder.name, ("tune.train", *arguments), options.out / "logs" / f"{folder.name}.log")


def _read_saved(path: Path, base: str) -> TuneFile:
    """A run's config; as ``base.path`` the run ``base``, if a start has filled in which checkpoint of it was tuned."""
    file = load_file(path)
    if Path(file.base.path).parent != checkpoints_of(base):
        return file
    return file.model_copy(update={"base": file.base.model_copy(update={"path": base})})


def outcome(folder: Path, task: str, per_token: bool = False) -> Outcome | None:
    """What the run in ``folder`` reached; None if it is not done.

    Args:
        folder: of the run.
        task: its test set.
        per_token: choices are compared by their nats a token instead of the sum.
    """
    found = metrics_file.latest(folder / metrics_file.NAME)
    group = f"test/{task}/choice_accuracy{'_per_token' if per_token else ''}/"
    accuracies = {n.removeprefix(group): v for n, v in found.items() if n.startswith(group)}
    if not accuracies:
        return None
    layers = [value for name, value in sorted(accuracies.items()) if name.startswith("layer-")]
    return Outcome(
        final=layers[-1],
        voted=accuracies.get("ensemble", layers[-1]),
        best_layer=max(layers),
        oracle=accuracies.get("oracle", layers[-1]),
        trained=int(found["parameters/trained"]),
        total=int(found["parameters/total"]),
    )


def rates_of(method: str, options: argparse.Namespace) -> list[float]:
    """Learning rates to try: ``--rates``, times the one of the method's config."""
    if not options.rates:
        return []
    own = load_file(config_of(method), options.overrides).train.optimizer.lr
    return [own * rate for rate in options.rates]


def chosen_rate(method: str, task: str, options: argparse.Namespace) -> float | None:
    """Of ``--rates`` the one whose last validation loss, with the first seed, was least; None for what has no rate.

    Runs that are not done have no say.
    """
    if method == "none" or not options.rates:
        return None
    losses = {}
    rates = rates_of(method, options)
    for rate in rates:
        folder = TuningRun(method, task, options.seeds[0], rate).folder(options.out)
        if outcome(folder, task) is not None:
            losses[rate] = metrics_file.latest(folder / metrics_file.NAME)[f"validation/{task}/loss"]
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finite, key=finite.__getitem__) if finite else rates[0]


def train_all(options: argparse.Namespace) -> tuple[Runs, list[str]]:
    """Train what is missing, the search for rates first.

    Returns:
        The runs of the table, and a sentence for everything that failed.
    """

    def train(runs: Iterable[TuningRun]) -> list[str]:
        jobs = [job for job in (job_of(run, options) for run in runs) if job is not None]
        return side_by_side(jobs, options.jobs, options.threads, "run")

    pairs = [(method, task) for task in options.tasks for method in options.methods]
    first = options.seeds[0]
    failed = train(TuningRun(m, t, first, rate) for m, t in pairs if m != "none" for rate in rates_of(m, options))
    rates = {(method, task): chosen_rate(method, task, options) for method, task in pairs}
    # Seeds outermost: an interrupted suite has whole tables of fewer seeds.
    runs = {
        (m, t, s): TuningRun(m, t, first if m == "none" else s, rates[m, t]) for s in options.seeds for m, t in pairs
    }
    return runs, failed + [problem for problem in train(dict.fromkeys(runs.values())) if problem not in failed]
