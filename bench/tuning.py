"""Tuning methods against each other: test accuracy over seeds, trained parameters, time of a step.

    python -m bench.tuning runs/books                                   # eight methods, two tasks, three seeds
    python -m bench.tuning runs/books --methods lora lora_ensemble --tasks polarity --seeds 0 1 train.steps=100

Every run is ``tune.train`` on ``configs/tune_METHOD.yaml`` with one process and one thread, in its own folder below
``--out``; what is done is not run again, so an interrupted suite goes on where it was. Step times are taken afterwards,
all methods taking turns in one process (see ``bench/common/timing.py``), because those of runs side by side mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.options import parser, refuse
from bench.common.paired import by_examples
from bench.common.timing import ratios, take_turns
from bench.isoflop.runs import Job, side_by_side
from data.places import texts
from data.tokenization import load_text_tokenizer
from model.config import EnsembleConfig, Progress
from settings import path_argument, user_errors
from settings.project import shipped
from settings.tables import markdown
from trainer.monitor import metrics_file
from tune.resolve import load_file, resolve

METHODS = [
    "full",
    "lora",
    "lora_norm",
    "lora_ensemble",
    "dora",
    "dora_ensemble",
    "ensemble_only",
    "early_lora_ensemble",
]
CHOICES = {"polarity": [" negative", " positive"], "subjectivity": [" objective", " subjective"]}


PAIRED = (
    "Intervals are a bootstrap over examples and seeds at once (bench/common/paired.py), the number of seeds behind "
    "them; one that holds 0 tells no difference."
)


class TuningRun(NamedTuple):
    """One method on one task with one seed."""

    method: str
    task: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Its run folder."""
        return out / f"{self.task}-{self.method}-{self.seed}"


class Outcome(NamedTuple):
    """What a run reached on its test set, shares of examples, and what it trained."""

    final: float
    voted: float
    best_layer: float
    oracle: float
    trained: int
    total: int


def _config(method: str) -> str:
    return shipped(f"configs/tune_{method}.yaml")


def overrides(run: TuningRun, base: str, data: Path, out: Path) -> list[str]:
    """The command line after the method's config."""
    block = {}
    for group, split in (("sources", "train"), ("validation", "validation"), ("test", "test")):
        source: dict[str, Any] = {"name": run.task, "files": [str(data / f"{run.task}-{split}.jsonl")]}
        if group != "sources":
            source["choices"] = CHOICES[run.task]
        block[group] = json.dumps([source])
    return [
        f"base.path={base}",
        *(f"data.{group}={value}" for group, value in block.items()),
        f"train.run_dir={run.folder(out)}",
        f"train.seed={run.seed}",
        f"data.seed={run.seed}",
    ]


def job_of(run: TuningRun, options: argparse.Namespace) -> Job | None:
    """What trains it; None if that is done."""
    folder = run.folder(options.out)
    if outcome(folder, run.task) is not None:
        return None
    arguments = [_config(run.method), *overrides(run, options.base, options.data, options.out)]
    arguments += ["train.checkpoint.resume=auto", *options.overrides]
    return Job(folder.name, ("tune.train", *arguments), options.out / "logs" / f"{folder.name}.log")


def outcome(folder: Path, task: str) -> Outcome | None:
    """What the run in ``folder`` reached; None if it is not done."""
    found = metrics_file.latest(folder / metrics_file.NAME)
    accuracies = {n.rpartition("/")[2]: v for n, v in found.items() if n.startswith(f"test/{task}/choice")}
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


def step_calls(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """One training step (forward, backward, AdamW) of every method on the same micro-batch of the first task."""
    import torch

    from trainer.distributed import ALONE
    from trainer.step import forward, to_device
    from tune.adapters import prepare
    from tune.base import load_base
    from tune.batches import TuningData

    calls: dict[str, Callable[[], object]] = {}
    for method in options.methods:
        run = TuningRun(method, options.tasks[0], 0)
        file = load_file(
            _config(method),
            [*overrides(run, options.base, options.data, options.out), *options.overrides],
        )
        base = load_base(options.base)
        config = resolve(file, base)
        decoder = base.decoder.train()
        if isinstance(config.ensemble, EnsembleConfig):
            decoder.add_ensemble(config.ensemble)
        prepare(decoder, config.adapter, config.base.routers, 0)
        data = TuningData(config.data, load_text_tokenizer(str(config.data.tokenizer)))
        batch = to_device(data.batch(range(config.train.micro_batch_samples)), ALONE.device)
        optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], fused=True)

        def step(decoder: Any = decoder, batch: Any = batch, config: Any = config, optimizer: Any = optimizer) -> None:
            forward(decoder, batch, config, Progress(1, 1)).loss.loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

        calls[method] = step
    return calls


def tables(options: argparse.Namespace, times: dict[str, list[float]]) -> str:
    """Markdown: a row a method."""
    header = ["method", "trained", "share", f"step / {options.methods[0]}"]
    for task in options.tasks:
        header += [f"{task}: final layer, %", "vote, %", "best layer, %", "oracle, %"]
    rows = [header]
    for method in options.methods:
        cells, trained = [], ["", ""]
        for task in options.tasks:
            found = [outcome(TuningRun(method, task, seed).folder(options.out), task) for seed in options.seeds]
            done = [one for one in found if one is not None]
            cells += [
                _spread(getattr(one, field) for one in done) for field in ("final", "voted", "best_layer", "oracle")
            ]
            if done:
                trained = [f"{done[0].trained:,}", f"{done[0].trained / done[0].total:.2%}"]
        ratio = f"{ratios(times[method], times[options.methods[0]]).median:.2f}" if times else ""
        rows.append([method, *trained, ratio, *cells])
    return markdown(rows)


def paired(options: argparse.Namespace) -> str:
    """Markdown: each method's vote against the first method's, on the same examples and seeds."""
    first, *others = options.methods
    rows = [["method", *(f"{task}: vote minus {first}, points (95 %)" for task in options.tasks)]]
    for method in others:
        cells = []
        for task in options.tasks:
            pairs = [(_answers(options, m, task, seed) for m in (method, first)) for seed in options.seeds]
            done = [(a, b) for a, b in pairs if a is not None and b is not None]
            cells.append(_difference([[x - y for x, y in zip(a, b, strict=True)] for a, b in done]))
        rows.append([method, *cells])
    return markdown(rows)


def _answers(options: argparse.Namespace, method: str, task: str, seed: int) -> list[int] | None:
    """Which test examples a run's vote gets right, the final layer's where there is none; None if it is not done."""
    from tune.evaluate import ENSEMBLE
    from tune.tuner import ANSWERS

    path = TuningRun(method, task, seed).folder(options.out) / ANSWERS.format(task)
    if not path.is_file():
        return None
    found: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
    return found[ENSEMBLE] if ENSEMBLE in found else next(reversed(found.values()))


def _difference(differences: Sequence[Sequence[float]]) -> str:
    """Mean and interval of differences by seed and example, in points."""
    if not differences:
        return "-"
    mean, low, high = (100 * value for value in by_examples(differences))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}; {len(differences)})"


def _spread(shares: Iterable[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    values = [100 * share for share in shares]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table; status 1 if a run failed."""
    made = parser("bench.tuning", str(__doc__))
    made.add_argument("base", help="stage-one run, checkpoint or weights folder")
    made.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="for every run, for example train.steps=100"
    )
    made.add_argument("--methods", nargs="+", choices=[*METHODS, "full_ensemble"], default=METHODS)
    made.add_argument("--tasks", nargs="+", choices=CHOICES, default=list(CHOICES))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="of each run (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=10, help="rounds of step times, 0 for none (default: %(default)s)")
    made.add_argument(
        "--out", type=path_argument, default=Path("runs/tuning"), help="run folders (default: %(default)s)"
    )
    made.add_argument(
        "--data",
        type=path_argument,
        default=Path(texts()) / "tuning",
        help="folder of TASK-SPLIT.jsonl (default: %(default)s)",
    )
    made.add_argument("--markdown", type=path_argument, help="write the table there, too")
    options = made.parse_intermixed_args(arguments)
    with user_errors():
        refuse(options, {"repeats": 0, "jobs": 1, "threads": 1})
        # Seeds outermost: an interrupted suite has whole tables of fewer seeds.
        runs = [TuningRun(m, t, s) for s in options.seeds for t in options.tasks for m in options.methods]
        jobs = [job for job in (job_of(run, options) for run in runs) if job is not None]
        failed = side_by_side(jobs, options.jobs, options.threads, "run")
        import torch

        times = take_turns(step_calls(options), options.repeats, torch.device("cpu")) if options.repeats else {}
        text = tables(options, times)
        if len(options.methods) > 1:
            text += f"\n\n{paired(options)}\n\n{PAIRED}"
    print(text)
    for problem in failed:
        print(problem, file=sys.stderr)
    if options.markdown is not None:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
