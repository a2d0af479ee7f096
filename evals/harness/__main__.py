"""lm-evaluation-harness on our checkpoints, offline, and on their exports beside them.

    python -m evals.harness runs/books --data $HOPSCOTCH_TEXTS
    python -m evals.harness runs/books --tasks blimp_causative perplexity --data $HOPSCOTCH_TEXTS --limit 100 \\
        --against runs/books-hf --trust-remote-code
    python -m evals.harness runs/books --tasks my_task --include my_tasks --shots 1

Four kinds of tasks come from local files. ``blimp`` is every minimal pair in DATA/blimp/*.jsonl, ``blimp_NAME`` one of
its paradigms: the sentence with the larger likelihood wins. ``classify_NAME`` asks for the label of each prompt in
DATA/tuning/NAME-test.jsonl, after one example of NAME-train.jsonl. ``perplexity`` is that of a text file or of JSON
lines, DATA/books/test.jsonl.xz unless ``--text`` names another, in windows that share no token; ``evals.perplexity``
has sliding ones. ``one_shot`` is all files of questions in DATA/tasks, after one example each, and NAME one of them,
DATA/tasks/NAME.jsonl; ``evals/harness/questions.py`` says what a line holds. Task files in the harness's own format are
found through ``--include``.

``--against`` runs the same tasks on a Hugging Face folder, through the harness's own loader, and reports each task's
largest difference of a log-likelihood, in nats: of a sentence, or of a whole text, which is a sum over many windows.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.files import write_atomically
from data.hub_cache import ensure_hub_cache
from evals.harness.questions import ONE_SHOT, QUESTIONS
from evals.harness.tasks import BLIMP, CLASSIFY, PERPLEXITY, TEXT, local_tasks
from settings import did_you_mean, path_argument, user_errors
from settings.project import installing
from trainer import opening

_STDERR = "_stderr"
_BOOTSTRAPS = 100  # of the few metrics whose standard error has no formula
_INSTALL = f"lm_eval is not installed; install it with: {installing('requirements-dev.txt')}"


class TaskScores(NamedTuple):
    """What one model did on some tasks."""

    metrics: dict[str, dict[str, float]]
    """By task, then by metric."""
    documents: dict[str, int]
    """By task."""
    loglikelihoods: dict[str, list[float]]
    """By task, of every request in order, nats; empty for tasks that generate."""
    errors: dict[str, dict[str, float]]
    """Standard errors of the metrics that have one, by task and metric."""
    cut: dict[str, int]
    """Requests that lost the start of their context, as they did not fit into the window; by task, where there are."""


def evaluate(
    model: Any,
    tasks: Sequence[dict[str, Any] | str],
    include: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> TaskScores:
    """Run ``tasks`` on ``model``, a model of the harness.

    Args:
        model: as :mod:`evals.harness.model` makes them.
        tasks: configs, or names in ``include``.
        include: folder of the user's task files.
        limit: the first documents of each task only.
        shots: for the tasks in ``include``; what they say themselves unless given.

    Raises:
        ValueError: if a name is no task there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model.cut.clear()
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=False)
    for task in tasks:
        if isinstance(task, str) and task not in manager.all_tasks:
            known = [*manager.all_tasks, BLIMP, f"{CLASSIFY}NAME", ONE_SHOT, PERPLEXITY]
            raise ValueError(
                f"there is no task '{task}'; {did_you_mean(task, known)}; --include names a folder of task files"
            )
    done = simple_evaluate(
        model, tasks=list(tasks), num_fewshot=shots, limit=limit, bootstrap_iters=_BOOTSTRAPS, task_manager=manager
    )
    assert done is not None
    metrics, errors, documents, loglikelihoods = {}, {}, {}, {}
    for name, samples in done["samples"].items():
        values = {key.split(",")[0]: float(v) for key, v in done["results"][name].items() if isinstance(v, float)}
        metrics[name] = {key: v for key, v in values.items() if not key.endswith(_STDERR)}
        errors[name] = {key.removesuffix(_STDERR): v for key, v in values.items() if key.endswith(_STDERR)}
        documents[name] = len({sample["doc_id"] for sample in samples})
        loglikelihoods[name] = [float(value) for s in samples for value in _numbers(s["resps"])]
    return TaskScores(metrics, documents, loglikelihoods, errors, dict(model.cut))


def _numbers(answers: Any) -> list[float]:
    """The log-likelihoods in a sample's answers, which come in lists, with whether they are greedy or without."""
    if isinstance(answers, float):
        return [answers]
    if isinstance(answers, (list, tuple)):
        return [number for answer in answers for number in _numbers(answer)]
    return []


def differences(one: TaskScores, other: TaskScores) -> dict[str, float]:
    """By task, the largest difference of a log-likelihood, nats; 0 for tasks that generate."""
    return {
        task: max((abs(a - b) for a, b in zip(values, other.loglikelihoods[task], strict=True)), default=0.0)
        for task, values in one.loglikelihoods.items()
    }


def table(ours: TaskScores, export: TaskScores | None = None) -> str:
    """The metrics as text, a line each, with standard errors.

    The export's stand beside them, with the largest difference of a log-likelihood.
    """
    wide = max((len(name) for name in ours.metrics), default=0) + 2
    both = [ours] if export is None else [ours, export]
    apart = {} if export is None else differences(ours, export)

    def line(
        task: str, metric: str, values: list[float], error: float | None, documents: int, apart_nats: float
    ) -> str:
        told = [*map(_number, values), "" if error is None else _number(error)]
        numbers = "".join(f"{number:>12}" for number in told)
        difference = "" if export is None else f"{apart_nats:>18.1e}"
        return f"{task:<{wide}}{metric:<18}{numbers}{documents:>12,}{difference}"

    names = f"{'ours':>12}" if export is None else f"{'ours':>12}{'export':>12}"
    last = "" if export is None else "  difference, nats"
    lines = [f"{'task':<{wide}}{'metric':<18}{names}{'std. error':>12}{'documents':>12}{last}"]
    for task, metrics in ours.metrics.items():
        for metric in metrics:
            values = [outcome.metrics[task][metric] for outcome in both]
            error = ours.errors[task].get(metric)
            lines.append(line(task, metric, values, error, ours.documents[task], apart.get(task, 0.0)))
    scored = [task for task, metrics in ours.metrics.items() if "acc" in metrics]
    paradigms = [task for task in scored if task.startswith(f"{BLIMP}_")]
    for name, tasks in ((BLIMP, paradigms), ("others", [task for task in scored if task not in paradigms])):
        if len(tasks) > 1:
            means = [sum(outcome.metrics[task]["acc"] for task in tasks) / len(tasks) for outcome in both]
            error = sum(ours.errors[task]["acc"] ** 2 for task in tasks) ** 0.5 / len(tasks)
            count, most = sum(ours.documents[task] for task in tasks), max(apart.get(task, 0.0) for task in tasks)
            lines.append(line(name, "acc, mean", means, error, count, most))
    return "\n".join(lines)


def _number(value: float) -> str:
    """For a column of twelve characters."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def cuts(ours: TaskScores, export: TaskScores | None, window_tokens: int) -> list[str]:
    """A line for each task of which a model did not see all that was asked."""
    lines = []
    for name, outcome in (("ours", ours), ("the export", export)):
        if outcome is None:
            continue
        for task, count in outcome.cut.items():
            asked = len(outcome.loglikelihoods[task]) or outcome.documents[task]
            lines.append(
                f"{task}: {count:,} of {asked:,} requests did not fit into a window of {window_tokens:,} tokens and "
                f"reached {name} without the start of their context; raise --window, or give fewer --shots"
            )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evals.harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="a run, a checkpoint or a folder of weights")
    parser.add_argument("--tasks", nargs="+", default=[BLIMP, PERPLEXITY], metavar="TASK", help="blimp perplexity ...")
    parser.add_argument(
        "--data",
        type=path_argument,
        metavar="DATA",
        help=f"folder that holds {BLIMP}/, tuning/, {QUESTIONS}/ and {TEXT}",
    )
    parser.add_argument("--text", type=path_argument, metavar="FILE", help=f"of {PERPLEXITY}, instead of DATA/{TEXT}")
    parser.add_argument("--include", type=path_argument, metavar="FOLDER", help="of task files of your own")
    parser.add_argument(
        "--shots",
        type=int,
        metavar="N",
        help="examples before each question (unless given 1 for classify and one_shot, else 0)",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens; those of the training's windows unless given")
    parser.add_argument("--limit", type=int, metavar="N", help="first documents of each task; all unless given")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="windows that run at once (default 16)")
    parser.add_argument("--against", type=path_argument, metavar="HF_DIR", help="an export to run the same tasks on")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that HF_DIR brings")
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
    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"there is no folder {options.json.parent} to write to; make it, or give --json another")
    ensure_hub_cache()
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError(_INSTALL) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tasks, on both models if there are two, print, write."""
    options = _parser().parse_args(arguments)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")  # all that is read lies here
    with user_errors(), tempfile.TemporaryDirectory() as cache:
        _check(options)
        tasks = local_tasks(options.tasks, options.data, options.text, options.shots, Path(cache))
        opening.open_model(options.model)
        from evals.perplexity import check_windows, trained_tokens
        from evals.scoring import open_model

        opened = open_model(options.model)
        window = trained_tokens(opened) if options.window is None else options.window
        check_windows(window, window, opened.decoder.config.max_positions)
        from evals.harness.model import OurModel, open_export

        how = (opened, window, options.batch)
        against = options.against and open_export(options.against, *how, options.trust_remote_code)
        rest = (tasks, options.include, options.limit, options.shots)
        model = OurModel(*how)
        ours = evaluate(model, *rest)
        flops, dense = model.scorer.flops
        export = evaluate(against, *rest) if against else None
        print("\n".join([table(ours, export), *cuts(ours, export, window)]), flush=True)
        content: dict[str, Any] = {"model": str(opened.loaded.source), "ours": ours._asdict()}
        if dense:
            print(f"executed {flops / dense:.1%} of the FLOPs of the same windows without routers, generation left out")
            content["flops_share"] = flops / dense
        if export is not None:
            apart = differences(ours, export)
            content |= {"against": str(options.against), "export": export._asdict(), "differences": apart}
        if options.json is not None:
            write_atomically(options.json, (json.dumps(content, indent=1) + "\n").encode())
            print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
