"""The table of ``evals.harness``, and the notes below it."""

from __future__ import annotations

from collections.abc import Sequence

from evals.harness.tasks import BLIMP
from trainer.tasks.harness import TaskScores

_OTHERS = "others"


def together(parts: Sequence[TaskScores]) -> TaskScores:
    """The scores of several tasks as one."""
    return TaskScores(*({k: v for part in field for k, v in part.items()} for field in zip(*parts, strict=True)))


def differences(one: TaskScores, other: TaskScores) -> dict[str, float]:
    """By task, the largest difference of a log-likelihood, nats; 0 for tasks that generate."""
    return {
        task: max((abs(a - b) for a, b in zip(values, other.loglikelihoods[task], strict=True)), default=0.0)
        for task, values in one.loglikelihoods.items()
    }


def table(ours: TaskScores, export: TaskScores | None = None) -> str:
    """The metrics as text, one per line, with standard errors.

    The export's are next to them, with the largest difference of a log-likelihood.
    """
    wide = max(len(name) for name in (*ours.metrics, BLIMP, _OTHERS)) + 2
    broad = max(18, *(len(metric) + 2 for own in ours.metrics.values() for metric in own))
    both = [ours] if export is None else [ours, export]
    apart = {} if export is None else differences(ours, export)

    def line(
        task: str, metric: str, values: list[float], error: float | None, documents: int, apart_nats: float
    ) -> str:
        cells = [*map(_number, values), "" if error is None else _number(error)]
        numbers = "".join(f"{number:>12}" for number in cells)
        difference = "" if export is None else f"{apart_nats:>18.1e}"
        return f"{task:<{wide}}{metric:<{broad}}{numbers}{documents:>12,}{difference}"

    names = f"{'ours':>12}" if export is None else f"{'ours':>12}{'export':>12}"
    last = "" if export is None else "  difference, nats"
    lines = [f"{'task':<{wide}}{'metric':<{broad}}{names}{'std. error':>12}{'documents':>12}{last}"]
    for task, metrics in ours.metrics.items():
        for metric in metrics:
            values = [outcome.metrics[task][metric] for outcome in both]
            error = ours.errors[task].get(metric)
            lines.append(line(task, metric, values, error, ours.documents[task], apart.get(task, 0.0)))
    scored = [task for task, metrics in ours.metrics.items() if "acc" in metrics]
    paradigms = [task for task in scored if task.startswith(f"{BLIMP}_")]
    for name, tasks in ((BLIMP, paradigms), (_OTHERS, [task for task in scored if task not in paradigms])):
        if len(tasks) > 1:
            means = [sum(outcome.metrics[task]["acc"] for task in tasks) / len(tasks) for outcome in both]
            errors = [ours.errors[task]["acc"] for task in tasks if "acc" in ours.errors[task]]  # one document has none
            error = sum(e**2 for e in errors) ** 0.5 / len(tasks) if len(errors) == len(tasks) else None
            count, most = sum(ours.documents[task] for task in tasks), max(apart.get(task, 0.0) for task in tasks)
            lines.append(line(name, "acc, mean", means, error, count, most))
    return "\n".join(lines)


def _number(value: float) -> str:
    """For a column of twelve characters."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def cuts(ours: TaskScores, export: TaskScores | None, window_tokens: int) -> list[str]:
    """A line for each task with requests that were truncated for a model."""
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
