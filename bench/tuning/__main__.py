"""Compare tuning methods: test accuracy over seeds, trained parameters, time of a step.

    python -m bench.tuning runs/books                                   # eight methods, two tasks, three seeds
    python -m bench.tuning runs/books train.steps=100 --methods lora lora_ensemble --tasks polarity --seeds 0 1
    python -m bench.tuning smollm2 base.routers=frozen train.steps=300 data.too_long=leave_out \\
        --tasks subjectivity polarity piqa arc_easy --rates 0.25 1 4 \\
        --methods none lora lora_ensemble dora dora_ensemble early_lora_ensemble early_lora_ensemble_half \\
        early_lora_ensemble_quarter ensemble_only

Every run is ``tune.train`` on a file of ``configs/`` in one process, in its own folder below ``--out``; finished runs
are not repeated, so an interrupted suite continues where it stopped. ``none`` is the base as it is, with one seed. With
``--rates`` every method on every task is run on the first seed with each of them, times the learning rate of its
config; the other seeds use the rate with the lowest final validation loss. Step times are measured afterwards, all
methods taking turns in one process (see ``bench/common/timing.py``), because those of concurrent runs mean nothing.

A task that has no TASK-train.jsonl in ``--data`` is a file of questions (``data/questions.py``) in the folder tasks/
beside it, split by the number of the question: even ones are for test, every fifth of the odd ones is for validation
and the rest for training. The parts are written to OUT/data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.common.options import parser, refuse
from bench.common.timing import take_turns
from bench.tuning.runs import CHOICES, METHODS, Runs, config_of, files_of, overrides, train_all
from bench.tuning.tables import PAIRED, paired, reached
from data.placeholders import texts
from data.tokenization import load_text_tokenizer
from model.config import EnsembleConfig
from model.schedules import Progress
from settings import path_argument, positive_number, user_errors, whole_number
from tune.preflight import require_base
from tune.resolve import load_file, resolve


def step_calls(options: argparse.Namespace, runs: Runs) -> dict[str, Callable[[], object]]:
    """One training step (forward, backward, AdamW) of every method on the same micro-batch of the first task."""
    import torch

    from trainer.distributed import ALONE
    from trainer.step import forward_at, to_device
    from tune.adapters import prepare
    from tune.base import load_base
    from tune.batches import TuningData

    calls: dict[str, Callable[[], object]] = {}
    for method in options.methods:
        run = runs[method, options.tasks[0], options.seeds[0]]
        file = load_file(config_of(method), overrides(run, options))
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
            forward_at(decoder, batch, config, Progress(1, 1)).loss.loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

        calls[method] = step
    return calls


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
        "--rates",
        nargs="+",
        type=positive_number(),
        default=[],
        help="learning rates to choose from, times the config's",
    )
    made.add_argument("--seeds", nargs="+", type=whole_number(0), default=[0, 1, 2])
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
    made.add_argument(
        "--per-token",
        action="store_true",
        help="compare a question's choices by nats per token instead of by the sum, which favours short ones",
    )
    made.add_argument("--markdown", type=path_argument, help="write the table there, too")
    options = made.parse_intermixed_args(arguments)
    with user_errors():
        refuse(options, {"repeats": 0, "jobs": 1, "threads": 1})
        require_base(Path(options.base))
        for task in options.tasks:
            files_of(task, options.data, options.out)
        runs, failed = train_all(options)
        import torch

        times = take_turns(step_calls(options, runs), options.repeats, torch.device("cpu")) if options.repeats else {}
        text = reached(options, runs, times)
        if len(options.methods) > 1:
            text += f"\n\n{paired(options, runs)}\n\n{PAIRED}"
    print(text)
    for problem in failed:
        print(problem, file=sys.stderr)
    if options.markdown is not None:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
