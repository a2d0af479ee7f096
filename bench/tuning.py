"""Tuning methods against each other: test accuracy over seeds, trained parameters, time of a step.

    python -m bench.tuning runs/books                                   # eight methods, two tasks, three seeds
    python -m bench.tuning runs/books train.steps=100 --methods lora lora_ensemble --tasks polarity --seeds 0 1
    python -m bench.tuning smollm2 base.routers=frozen train.steps=300 data.too_long=leave_out \\
        --tasks subjectivity polarity piqa arc_easy --rates 0.25 1 4 \\
        --methods none lora lora_ensemble dora dora_ensemble early_lora_ensemble early_lora_ensemble_half \\
        early_lora_ensemble_quarter ensemble_only

Every run is ``tune.train`` on a file of ``configs/`` with one process and one thread, in its own folder below
``--out``; what is done is not run again, so an interrupted suite goes on where it was. ``none`` is the base as it is,
with one seed. With ``--rates`` every method on every task is run with each of them, times the learning rate of its
config, and the first seed, and the other seeds with the rate whose last validation loss was least. Step times are taken
afterwards, all methods taking turns in one process (see ``bench/common/timing.py``), because those of runs side by side
mean nothing.

A task that has no TASK-train.jsonl in ``--data`` is a file of questions (``data/questions.py``) in the folder tasks/
beside it, split by the number of the question: even ones are the test, of the odd ones every fifth is for validation
and the rest is learned. The parts are written to OUT/data.
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
from bench.isoflop.runs import Job, refuse_other, side_by_side
from data.files import write_atomically
from data.places import texts
from data.tokenization import load_text_tokenizer
from model.config import EnsembleConfig
from model.schedules import Progress
from settings import path_argument, user_errors
from settings.project import shipped
from settings.tables import markdown
from trainer.checkpoints.layout import CONFIG
from trainer.monitor import metrics_file
from tune.resolve import load_file, resolve

METHODS: dict[str, tuple[str, list[str]]] = {
    **{
        name: (name, [])
        for name in (
            "full",
            "lora",
            "lora_norm",
            "lora_ensemble",
            "dora",
            "dora_ensemble",
            "ensemble_only",
            "early_lora_ensemble",
            "full_ensemble",
        )
    },
    "early_lora_ensemble_half": ("early_lora_ensemble", ["adapter.rank=4", "adapter.alpha=8"]),
    "early_lora_ensemble_quarter": ("early_lora_ensemble", ["adapter.rank=2", "adapter.alpha=4"]),
    "late_lora_ensemble": ("early_lora_ensemble", ["adapter.layers=late"]),
    # One step at a learning rate near zero: the adapters stay at zero.
    "none": ("lora", ["train.steps=1", "train.schedule.warmup_steps=0", "train.optimizer.lr=1e-12"]),
}
"""The config of each, and what else it takes; the first eight are the default."""
CHOICES = {"polarity": [" negative", " positive"], "subjectivity": [" objective", " subjective"]}


SPLITS = {"train": "sources", "validation": "validation", "test": "test"}
"""Parts of a task, and the config's group that reads each."""
_FILLED_IN = ("model", "base.sha256", "base.seed", "base.cache_states", "data.tokenizer")
"""Of a saved config: what the base says, and where states are kept."""
PAIRED = (
    "Intervals are a bootstrap over examples and seeds at once (bench/common/paired.py), the number of seeds behind "
    "them; one that holds 0 tells no difference."
)


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


class Outcome(NamedTuple):
    """What a run reached on its test set, shares of examples, and what it trained."""

    final: float
    voted: float
    best_layer: float
    oracle: float
    trained: int
    total: int


def _config(method: str) -> str:
    return shipped(f"configs/tune_{METHODS[method][0]}.yaml")


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
    folder, config = run.folder(options.out), _config(run.method)
    if (folder / CONFIG).is_file():
        refuse_other(folder, load_file, load_file(config, overrides(run, options)), _FILLED_IN)
    if outcome(folder, run.task) is not None:
        return None
    arguments = [config, *overrides(run, options), "train.checkpoint.resume=auto"]
    return Job(folder.name, ("tune.train", *arguments), options.out / "logs" / f"{folder.name}.log")


def outcome(folder: Path, task: str) -> Outcome | None:
    """What the run in ``folder`` reached; None if it is not done."""
    found = metrics_file.latest(folder / metrics_file.NAME)
    group = f"test/{task}/choice_accuracy/"
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
    own = load_file(_config(method), options.overrides).train.optimizer.lr
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
        run = options.runs[method, options.tasks[0], options.seeds[0]]
        file = load_file(_config(method), overrides(run, options))
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
        header += [f"{task}: rate"] if options.rates else []
        header += [f"{task}: final layer, %", "vote, %", "best layer, %", "oracle, %"]
    rows = [header]
    for method in options.methods:
        cells, trained = [], ["", ""]
        for task in options.tasks:
            runs = list(dict.fromkeys(options.runs[method, task, seed] for seed in options.seeds))
            found = [outcome(run.folder(options.out), task) for run in runs]
            done = [one for one in found if one is not None]
            cells += ["-" if runs[0].rate is None else f"{runs[0].rate:g}"] if options.rates else []
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
            pairs = [tuple(_answers(options, m, task, seed) for m in (method, first)) for seed in options.seeds]
            done = [(a, b) for a, b in pairs if a is not None and b is not None]
            cells.append(_difference([[x - y for x, y in zip(a, b, strict=True)] for a, b in done]))
        rows.append([method, *cells])
    return markdown(rows)


def _answers(options: argparse.Namespace, method: str, task: str, seed: int) -> list[int] | None:
    """Which test examples a run's vote gets right, the final layer's where there is none; None if it is not done."""
    from tune.evaluate import ENSEMBLE
    from tune.tuner import ANSWERS

    path = options.runs[method, task, seed].folder(options.out) / ANSWERS.format(task)
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


def _run_all(options: argparse.Namespace) -> list[str]:
    """Train what is missing, the search for rates first; a sentence for everything that failed.

    ``options.runs`` has the runs of the table from then on, by method, task and seed.
    """

    def train(runs: Iterable[TuningRun]) -> list[str]:
        jobs = [job for job in (job_of(run, options) for run in runs) if job is not None]
        return side_by_side(jobs, options.jobs, options.threads, "run")

    pairs = [(method, task) for task in options.tasks for method in options.methods]
    first = options.seeds[0]
    failed = train(TuningRun(m, t, first, rate) for m, t in pairs if m != "none" for rate in rates_of(m, options))
    rates = {(method, task): chosen_rate(method, task, options) for method, task in pairs}
    # Seeds outermost: an interrupted suite has whole tables of fewer seeds.
    options.runs = {
        (m, t, s): TuningRun(m, t, first if m == "none" else s, rates[m, t]) for s in options.seeds for m, t in pairs
    }
    return failed + [problem for problem in train(dict.fromkeys(options.runs.values())) if problem not in failed]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table; status 1 if a run failed."""
    made = parser("bench.tuning", str(__doc__))
    made.add_argument("base", help="stage-one run, checkpoint or weights folder")
    made.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="for every run, for example train.steps=100"
    )
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:8])
    made.add_argument("--tasks", nargs="+", metavar="TASK", default=list(CHOICES))
    made.add_argument(
        "--rates", nargs="+", type=float, default=[], help="learning rates to choose from, times the config's"
    )
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
        if any(rate <= 0 for rate in options.rates):
            raise ValueError(f"--rates must lie above 0, got {min(options.rates):g}")
        failed = _run_all(options)
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
