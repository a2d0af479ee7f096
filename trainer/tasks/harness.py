"""An adapter of our decoders for lm-evaluation-harness, and its tasks during training.

Importing this file imports ``lm_eval``, which takes a second, so import it late.

A request is a context and a continuation. An empty context is replaced by the token that every document begins with; a
text that is scored whole is preceded by one such token too, never by two.

A context that does not fit into the window is truncated at the start, as in the harness: of several few-shot examples
the first are dropped. This changes the question, so truncations are counted.

A NaN likelihood compares as false with every other, so that an arbitrary choice would win. A task with a likelihood
that is not finite gets NaN metrics instead.

Every rank makes all requests and gets all answers; the work in between is shared (``scorer.py``, ``answers.py``).
"""

from __future__ import annotations

import difflib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data.tokenization import TextTokenizer
from settings import did_you_mean, one_line
from trainer.distributed import ALONE, World
from trainer.tasks.answers import Prompt, answer
from trainer.tasks.files import Score
from trainer.tasks.scorer import Scorer, Window

# For a config that reads its documents itself the harness logs a hint about another of its commands.
logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.getMessage())
_STDERR = "_stderr"
_FEW = 100  # task names in an error; the harness has thousands
_FEWSHOT_SEED = 1234  # the harness's own
_BOOTSTRAPS = 100  # for the few metrics whose standard error has no formula


class CountsCuts:
    """Counts the requests of each task that were truncated, and notes those without a finite likelihood."""

    max_length: int
    tok_encode: Any
    widen = "raise --window"
    """What the user can do about a window that is too small."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cut: Counter[str] = Counter()
        """Requests whose context was truncated, by task."""
        self.not_finite: dict[str, int] = {}
        """By task, the first document with logits that are not finite, counted from 0; other tasks are absent."""
        self._tasks: list[str] = []

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """As in the harness, counting truncations."""
        self._tasks = [request.task_name for request in requests]
        try:
            found = super().loglikelihood(requests, disable_tqdm)  # type: ignore[misc]
        finally:
            self._tasks = []
        self.note_finite(requests, [math.isfinite(value) for value, _ in found])
        return found

    def note_finite(self, requests: Sequence[Any], finite: Sequence[bool]) -> None:
        """Remember the first document of each task whose result is not finite."""
        for request, is_finite in zip(requests, finite, strict=True):
            if not is_finite:
                self.not_finite.setdefault(request.task_name, request.doc_id)

    def count_scored(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> None:
        """Count truncated contexts; those of whole texts, which are split into windows of their own, are not counted.

        Raises:
            ValueError: if a continuation alone does not fit.
        """
        for place, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit into a window of {self.max_length}; "
                    f"{self.widen}, or choose a task with shorter ones"
                )
            if self._tasks and len(context) + len(continuation) > self.max_length + 1:
                self.cut[self._tasks[place]] += 1

    def count_generated(self, requests: Sequence[Any]) -> None:
        """Count prompts that leave no room for as many tokens as the task may generate.

        Raises:
            ValueError: if those alone fill the window.
        """
        for request in requests:
            context, options = request.args
            new_tokens = normalize_gen_kwargs(options)["max_gen_toks"]
            if new_tokens >= self.max_length:
                raise ValueError(
                    f"{request.task_name} generates up to {new_tokens} tokens, which leaves no room for its prompts in "
                    f"a window of {self.max_length}; lower max_gen_toks in its generation_kwargs, or {self.widen}"
                )
            if len(self.tok_encode(context)) > self.max_length - new_tokens:
                self.cut[request.task_name] += 1


class OurModel(CountsCuts, TemplateLM):
    """One of our decoders, in this process.

    Args:
        scorer: the decoder's, with the ranks that share the work.
        tokenizer: the model's.
        window_tokens: most tokens that the model reads at once.
        lockstep: run the same number of passes on every rank, as ZeRO 3 requires.
        progress: called after each batch, with its number of rows, instead of a bar.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: TextTokenizer,
        window_tokens: int,
        lockstep: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__()
        self.scorer, self.tokenizer, self.lockstep = scorer, tokenizer, lockstep
        self._told = progress
        self.max_length = window_tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return (self.tokenizer.prefix or [self.tokenizer.eos_id])[-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of ``string``, after a begin-of-document token if the model has one and the caller allows it."""
        ids = self.tokenizer.encode(string)
        return ids if add_special_tokens is False else self.tokenizer.prefix + ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-likelihoods, whether greedy decoding gives the same) of continuations after their contexts."""
        self.count_scored(requests)
        rows = []
        for _text, context, continuation in requests:
            inputs = (context + continuation)[:-1]
            rows.append(Window(inputs[-self.max_length :], continuation))
        with self._progress(len(rows), "scoring", disable_tqdm) as progress:
            scored = self.scorer.score(rows, progress)
        return [(score.loglikelihood, bool(score.hit.all())) for score in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that share no token, as the harness cuts them."""
        rows: list[tuple[Any, list[int], list[int]]] = []
        ends = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            rows += [(None, *make_disjoint_window(pair)) for pair in cut]
            ends.append(len(rows))
        parts = [value for value, _ in self._loglikelihood_tokens(rows, disable_tqdm)]
        found = [sum(parts[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self.note_finite(requests, list(map(math.isfinite, found)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the stop sequences."""
        self.count_generated(requests)
        prompts = [self._prompt(*request.args) for request in requests]
        with self._progress(len(prompts), "answering", disable_tqdm) as progress:
            found = answer(
                self.scorer.engine, self.tokenizer, prompts, self.scorer.world, self.lockstep, progress=progress
            )
        self.note_finite(requests, [text is not None for text in found])
        return [text or "" for text in found]

    def _prompt(self, context: str, options: dict[str, Any]) -> Prompt:
        wanted: Any = normalize_gen_kwargs(options)
        new_tokens = wanted["max_gen_toks"]
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - new_tokens) :]
        temperature = float(wanted.get("temperature", 1.0)) if wanted["do_sample"] else 0.0
        stops = handle_stop_sequences(wanted["until"], eos=None)
        return Prompt(ids, new_tokens, stops, temperature, float(wanted.get("top_p", 1.0)))

    @contextmanager
    def _progress(self, total: int, what: str, disabled: bool) -> Iterator[Callable[[int], object]]:
        quiet = disabled or self._told is not None or not self.scorer.world.is_main
        with tqdm(total=total, desc=what, disable=quiet or None, leave=False) as bar:
            yield self._told or bar.update


class TaskScores(NamedTuple):
    """One model's results on some tasks."""

    metrics: dict[str, dict[str, float]]
    """By task, then by metric; by ``METRIC/FILTER`` where a task judges each answer in several ways."""
    documents: dict[str, int]
    """By task."""
    loglikelihoods: dict[str, list[float]]
    """By task, of every request in order, nats; empty for tasks that generate."""
    errors: dict[str, dict[str, float]]
    """Standard errors of the metrics that have one, by task and metric."""
    cut: dict[str, int]
    """Requests whose context was truncated to fit into the window, by task; tasks without any are absent."""


def evaluate(
    model: Any, tasks: Sequence[Any], limit: int | None = None, shots: int | None = None, world: World = ALONE
) -> TaskScores:
    """Run ``tasks`` on ``model``, a model of the harness; the same on every rank, collective.

    Args:
        model: one that counts truncations: :class:`OurModel`, or an export.
        tasks: configs, or tasks of :func:`load`.
        limit: use only this many documents of each task, the first ones.
        shots: few-shot examples, for loaded tasks; each task's own number unless given.
        world: ranks that run the model.
    """
    model.cut.clear()
    model.not_finite.clear()
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):  # a task's own 0 is kept
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    # Not simple_evaluate, which seeds every generator of the process, and runs pip and a compiler to describe the
    # machine: a second or more for each call.
    done = lm_eval.evaluate(model, loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS)
    # Rank 0's result, as sums differ between ranks in the last digit.
    scores: TaskScores = world.broadcast_object(_scores(done, model) if world.is_main else None)
    return scores


def _scores(done: Any, model: CountsCuts) -> TaskScores:
    """A metric keeps its name if the task has one filter; else the filter's name is appended."""
    metrics: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    documents, loglikelihoods = {}, {}
    for name, samples in done["samples"].items():
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        samples = [sample for sample in samples if sample["filter"] == filters[0]]
        metrics[name], errors[name] = {}, {}
        for key, value in done["results"][name].items():
            metric, _, way = key.partition(",")
            if isinstance(value, float):
                kind = errors if metric.endswith(_STDERR) else metrics
                metric_name = metric.removesuffix(_STDERR)
                kind[name][metric_name if len(filters) == 1 else f"{metric_name}/{way}"] = float(value)
        documents[name] = len({sample["doc_id"] for sample in samples})
        loglikelihoods[name] = [float(value) for s in samples for value in _numbers(s["resps"])]
        if name in model.not_finite:
            metrics[name], errors[name] = (dict.fromkeys(own[name], math.nan) for own in (metrics, errors))
    return TaskScores(metrics, documents, loglikelihoods, errors, dict(model.cut))


def load(name: str, manager: TaskManager) -> list[Any]:
    """Load the tasks that ``name`` stands for (one, or those of a group or a tag), with their data.

    Raises:
        ValueError: if one of them cannot be loaded.
    """
    try:
        return list(manager.load([name])["tasks"].values())
    except Exception as error:  # network, permission, a package of the task's own: all mean that it cannot be loaded
        raise ValueError(
            f"task '{name}' cannot be loaded ({type(error).__name__}: {one_line(error)}); its data comes from the Hub, "
            "so check that it can be reached, or leave the task out, or take files of questions (docs/evaluation.md)"
        ) from error


def known_tasks(include: Path | None = None, hub: bool = False) -> TaskManager:
    """A manager of the tasks in the folder ``include`` and, with ``hub``, of the harness's own, which takes seconds."""
    return TaskManager(include_path=None if include is None else str(include), include_defaults=hub)


class HarnessTasks:
    """Tasks of the harness during training, loaded once.

    Args:
        names: of tasks of the harness, or task files in its format (YAML).
        limit: use only this many documents of each, the first ones.
        shots: few-shot examples before each question; each task's own number if 0.

    Raises:
        ValueError: if there is no such task, or it cannot be loaded.
    """

    def __init__(self, names: Sequence[str], limit: int | None, shots: int) -> None:
        manager = known_tasks(hub=any(not is_file(name) for name in names))
        for name in names:
            if not is_file(name) and name not in manager.all_tasks:
                raise ValueError(
                    f"train.evaluation.tasks: {no_such_task(name, manager)}; files of questions end in .jsonl, task "
                    "files of the harness in .yaml"
                )
        self._tasks = [task for name in names for task in load(name, manager)]
        self._limit, self._shots = limit, shots or None

    def run(
        self,
        scorer: Scorer,
        tokenizer: TextTokenizer,
        window_tokens: int,
        lockstep: bool,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> dict[str, Score]:
        """Scores by task, the same on every rank; ``progress`` as of :class:`OurModel`; collective."""
        model = OurModel(scorer, tokenizer, window_tokens, lockstep, progress)
        model.widen = "raise data.sequence_tokens"
        found = evaluate(model, self._tasks, self._limit, self._shots, scorer.world)
        return {task: Score(own, found.errors[task], found.documents[task]) for task, own in found.metrics.items()}


def no_such_task(name: str, manager: TaskManager, others: Sequence[str] = ()) -> str:
    """The error for an unknown task, with the nearest name; ``others`` are further known names. Lists all if few."""
    known = [*manager.all_tasks, *others]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    shown = known if len(known) < _FEW else near
    hint = did_you_mean(name, shown) if shown else "python -m lm_eval ls tasks lists them"
    return f"there is no task '{name}'; {hint}"


def is_file(name: str) -> bool:
    """Whether ``name`` is that of a task file in the harness's format."""
    return name.endswith((".yaml", ".yml"))


def _numbers(answers: Any) -> list[float]:
    """The log-likelihoods in a sample's answers, which are nested lists, with or without an is-greedy flag."""
    if isinstance(answers, float):
        return [answers]
    if isinstance(answers, (list, tuple)):
        return [number for answer in answers for number in _numbers(answer)]
    return []
