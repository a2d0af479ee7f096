"""lm-evaluation-harness on our checkpoints, on one device or many, and on their exports beside them.

    python -m evals.harness runs/books --data $HOPSCOTCH_TEXTS
    python -m evals.harness runs/books --tasks blimp_causative perplexity --data $HOPSCOTCH_TEXTS --limit 100 \\
        --against runs/books-hf --trust-remote-code
    python -m evals.harness runs/books --tasks my_task --include my_tasks --shots 1
    deepspeed --module evals.harness runs/books --tasks one_shot --hub --dtype bf16 --json scores.json

Four kinds of tasks come from local files. ``blimp`` is every minimal pair in DATA/blimp/*.jsonl, ``blimp_NAME`` one of
its paradigms: the sentence with the larger likelihood wins. ``classify_NAME`` asks for the label of each prompt in
DATA/tuning/NAME-test.jsonl, after one example of NAME-train.jsonl. ``perplexity`` is that of a text, JSON lines,
Parquet or CSV, DATA/books/test.jsonl.xz unless ``--text`` names another, in windows that share no token;
``evals.perplexity`` has sliding ones. ``one_shot`` is all files of questions in DATA/tasks, after one example each, and
NAME one of them, DATA/tasks/NAME.jsonl; ``data/questions.py`` says what a line holds. Task files in the harness's own
format are found through ``--include``. With ``--hub`` every task that the harness defines has a name, and ``one_shot``
is its tasks of that kind; their data come from the Hub.

With ``--json`` the scores of each task are kept as it ends, in OUT's name with ``.tasks.jsonl``; the same command goes
on there.

``--against`` runs the same tasks on a Hugging Face folder, through the harness's own loader, and reports each task's
largest difference of a log-likelihood, in nats: of a sentence, or of a whole text, which is a sum over many windows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import write_atomically
from evals.harness.questions import ONE_SHOT, QUESTIONS
from evals.harness.tasks import BLIMP, CLASSIFY, HUB_ONE_SHOT, PERPLEXITY, TEXT, local_tasks
from evals.placement import IN_FP32, add_batch, add_placement, check_placement, placed
from settings import (
    command_parser,
    path_argument,
    rank_by_environment,
    ranks_by_environment,
    require_writable,
    user_errors,
)
from trainer import preflight

if TYPE_CHECKING:
    from evals.harness.finished import Done, Finished
    from evals.placement import Placement
    from evals.scoring import Opened
    from trainer.tasks.harness import CountsCuts

_EXPORT_BATCH = 16  # windows, of the harness's own loader


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evals.harness", __doc__)
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="a run, a checkpoint or a folder of weights")
    parser.add_argument("--tasks", nargs="+", default=[BLIMP, PERPLEXITY], metavar="TASK", help="blimp perplexity ...")
    parser.add_argument(
        "--data",
        type=path_argument,
        metavar="DATA",
        help=f"folder with {BLIMP}/, tuning/, {QUESTIONS}/ and {TEXT}",
    )
    parser.add_argument(
        "--text", type=path_argument, metavar="FILE", help=f"text for {PERPLEXITY}, instead of DATA/{TEXT}"
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="its field or column (default: text)")
    parser.add_argument(
        "--hub", action="store_true", help="also find the harness's own tasks, whose data is on the Hub"
    )
    parser.add_argument("--include", type=path_argument, metavar="FOLDER", help="folder with task files of your own")
    parser.add_argument(
        "--shots",
        type=int,
        metavar="N",
        help="examples before each question (default: 1 for classify and one_shot, else 0)",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens of a window (default: as in training)")
    parser.add_argument("--limit", type=int, metavar="N", help="first documents of each task (default: all)")
    add_batch(parser)
    parser.add_argument("--against", type=path_argument, metavar="HF_DIR", help="an export to run the same tasks on")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the modelling code in HF_DIR")
    add_placement(parser)
    parser.add_argument(
        "--json", type=path_argument, metavar="OUT", help="write metrics and log-likelihoods to this file, too"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("shots", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if options.include is not None and not options.include.is_dir():
        raise ValueError(f"there is no folder {options.include}; --include names one with task files")
    if options.json is not None:
        require_writable(options.json, "--json")
    check_placement(options, ranks=True)
    if options.against and ranks_by_environment() > 1:
        raise ValueError("--against runs the harness's own loader, in one process; start it with python")
    preflight.require_harness()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tasks, on both models if there are two, print, write."""
    options = _parser().parse_args(arguments)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if not options.hub:
            os.environ.setdefault(name, "1")  # all that is read lies here
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if rank_by_environment():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars
    with user_errors():
        _check(options)
        named = (options.data, options.text, options.shots)
        tasks = local_tasks(options.tasks, *named, options.hub, options.text_field)
        preflight.open_model(options.model)
        with placed(options) as placement:
            _run(options, tasks, placement)
    return 0


def _run(options: argparse.Namespace, tasks: Sequence[dict[str, Any] | str], placement: Placement) -> None:
    from evals.harness.finished import Finished
    from evals.perplexity import check_windows, trained_tokens
    from evals.scoring import open_model

    known = _known(options, tasks)
    opened = open_model(options.model, placement)
    window = trained_tokens(opened) if options.window is None else options.window
    check_windows(window, window, opened.decoder.config.max_positions)
    finished = Finished(options.json, _tell if opened.world.is_main else lambda _: None)
    runner = _Runner(options, opened, placement, window)
    done = runner.all(tasks, known, finished)
    if opened.world.is_main:
        _report(options, opened, runner, list(done.values()))


def _known(options: argparse.Namespace, tasks: Sequence[dict[str, Any] | str]) -> Any:
    """What knows the tasks that are names; None where there is none."""
    names = [task for task in tasks if isinstance(task, str)]
    if not names:
        return None
    from trainer.tasks.harness import known_tasks, no_such_task

    known = known_tasks(options.include, options.hub)
    for name in names:
        if name not in known.all_tasks:
            others = [BLIMP, f"{CLASSIFY}NAME", ONE_SHOT, PERPLEXITY]
            more = "--include names a folder of task files" + ("" if options.hub else ", --hub finds the harness's own")
            raise ValueError(f"{no_such_task(name, known, others)}; {more}")
    return known


class _Runner:
    """Runs tasks one after another, and keeps what is finished."""

    def __init__(self, options: argparse.Namespace, opened: Opened, placement: Placement, window: int) -> None:
        from evals.harness.finished import weights_of
        from trainer.tasks.harness import OurModel
        from trainer.tasks.scorer import Scorer

        batch_tokens = placement.batch_tokens if options.batch_tokens is None else options.batch_tokens
        self.options, self.world = options, opened.world
        self.scorer = Scorer(opened.decoder, batch_tokens, opened.world)
        self.model = OurModel(self.scorer, opened.tokenizer, window)
        self.export = None
        if options.against is not None:
            from evals.harness.model import open_export

            how = (window, _EXPORT_BATCH, options.trust_remote_code, placement)
            self.export = open_export(options.against, opened, *how)
        source = opened.loaded.source
        self.key = {"model": str(source.resolve()), "weights": weights_of(source), "limit": options.limit}
        self.key |= {"window": window, "dtype": options.dtype, "tokenizer": opened.tokenizer.sha256}
        self.key["against"] = options.against and [str(options.against), weights_of(options.against)]

    def all(self, tasks: Sequence[dict[str, Any] | str], known: Any, finished: Finished) -> dict[str, Done]:
        """By task, what was found now or before."""
        from evals.harness.finished import files_of

        found = {}
        for task in tasks:
            name, shots = (
                (task, self._shots(task)) if isinstance(task, str) else (task["task"], task.get("num_fewshot"))
            )
            key = {**self.key, "shots": shots, "files": files_of(task, self.options.include)}
            key["text field"] = self.options.text_field if name == PERPLEXITY else None
            kept = self.world.broadcast_object(finished.get(name, key) if self.world.is_main else None)
            found[name] = kept or self._one(task, known, shots)
            if kept is None and self.world.is_main:
                finished.add(name, key, found[name])
        return found

    def _shots(self, name: str) -> int | None:
        """Of a task of the harness; None for what it says itself."""
        one = self.options.hub and ONE_SHOT in self.options.tasks and name in HUB_ONE_SHOT
        return 1 if one and self.options.shots is None else self.options.shots

    def _one(self, task: dict[str, Any] | str, known: Any, shots: int | None) -> Done:
        from evals.harness.finished import Done
        from trainer.tasks.harness import evaluate, load

        loaded = load(task, known) if isinstance(task, str) else [task]
        rest = (loaded, self.options.limit, shots if isinstance(task, str) else None)
        before = self.scorer.flops
        start_s = time.perf_counter()
        ours = evaluate(self.model, *rest, self.world)
        _require_finite(self.model, self.options.model)
        middle_s = time.perf_counter()
        export = None
        if self.export is not None:
            export = evaluate(self.export, *rest)
            _require_finite(self.export, self.options.against)
        end_s = time.perf_counter()
        executed, dense = (now - then for now, then in zip(self.scorer.flops, before, strict=True))
        return Done(ours, export, (executed, dense), (middle_s - start_s, end_s - middle_s))


def _require_finite(model: CountsCuts, name: Path) -> None:
    """Raise ValueError, naming a task and a document, if ``model`` has given logits that are not finite."""
    for task, document in model.not_finite.items():
        raise ValueError(
            f"{task}, document {document} (the first is 0): the logits of {name} are not finite (NaN or infinite), so "
            f"they choose no answer; {IN_FP32}"
        )


def _report(options: argparse.Namespace, opened: Opened, runner: _Runner, done: Sequence[Done]) -> None:
    from evals.harness.report import cuts, differences, table, together

    ours = together([each.ours for each in done])
    export = together([each.export for each in done if each.export is not None]) if options.against else None
    print("\n".join([table(ours, export), *cuts(ours, export, runner.model.max_length)]), flush=True)
    spent = zip(*((*each.flops, *each.seconds) for each in done), strict=True)
    flops, dense, own_s, export_s = (sum(values) for values in spent)
    content: dict[str, Any] = {"model": str(opened.loaded.source), "ours": ours._asdict(), "seconds": own_s}
    if dense:
        print(f"executed {flops / dense:.1%} of the FLOPs of the same windows without routers, generation left out")
        content["flops_share"] = flops / dense
    ranks = f"{opened.world.size} ranks, " if opened.world.size > 1 else ""
    summary = f"{own_s:,.1f} s, {ranks}{options.dtype} on {opened.world.device}"
    if runner.scorer.routed.tokens:
        summary += f", batches of up to {runner.scorer.batch_tokens:,} tokens with {runner.scorer.padding:.1%} padding"
    print(f"{summary}; the export {export_s:,.1f} s" if export else summary)
    if export is not None:
        apart = differences(ours, export)
        content |= {"against": str(options.against), "export": export._asdict(), "differences": apart}
        content["export_seconds"] = export_s
    if options.json is not None:
        write_atomically(options.json, (json.dumps(content, indent=1) + "\n").encode())
        print(f"wrote {options.json}")


def _tell(sentence: str) -> None:
    print(sentence, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
