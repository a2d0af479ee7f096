"""Files of questions (``data/questions.py``) as tasks, without lm-evaluation-harness: the same requests and metrics.

    choices                    acc, acc_norm (log-likelihood per character)
    contexts to choose from    acc
    a continuation             acc, perplexity
    an answer                  exact_match, ignoring case and punctuation

Contexts that do not fit into the window are truncated at the start, as in the harness, and counted. If any logits are
not finite, the metrics of their task are NaN.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from data.questions import (
    ANSWER,
    ANSWER_TOKENS,
    CHOICES,
    CONTINUATION,
    Fields,
    contexts,
    continuations,
    read_questions,
)
from data.tokenization import TextTokenizer
from trainer.tasks.answers import Prompt
from trainer.tasks.scorer import Window, WindowScore

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Score(NamedTuple):
    """One task's metrics."""

    metrics: dict[str, float]
    """By name; the first one is shown where there is room for only one."""
    errors: dict[str, float]
    """Standard errors, of the metrics that are means."""
    questions: int

    def unknown(self) -> Score:
        """The same metrics, each NaN."""
        return Score(dict.fromkeys(self.metrics, math.nan), dict.fromkeys(self.errors, math.nan), self.questions)


class FileTask:
    """A file of questions, read and encoded.

    Args:
        path: the file.
        tokenizer: the model's.
        window_tokens: most tokens that the model reads at once.
        limit: use only this many questions, the first ones.
        shots: number of few-shot examples, from the same file, before each question.

    Attributes:
        name: the file's, without its ending.
        windows: to score, in the questions' order.
        prompts: to answer, of files whose answers are generated.
        cut: number of questions whose context was truncated.

    Raises:
        ValueError: if the file cannot be read, or something in it does not fit.
    """

    def __init__(
        self, path: Path, tokenizer: TextTokenizer, window_tokens: int, limit: int | None = None, shots: int = 0
    ) -> None:
        asked = read_questions(path)
        asked.require_examples(shots, "lower train.evaluation.task_shots")
        self.name, self.shape, self.lines = path.stem, asked.shape, asked.lines[:limit]
        self.windows: list[Window] = []
        self.prompts: list[Prompt] = []
        self.cut = 0
        self._ends = [0]
        for number, (fields, before) in enumerate(zip(self.lines, asked.examples(len(self.lines), shots), strict=True)):
            room = self._add(fields, before, tokenizer, window_tokens)
            if room < 0:
                raise ValueError(
                    f"{path}: the answer to question {number + 1} takes {-room} tokens more than a window of "
                    f"{window_tokens} holds; raise data.sequence_tokens, or leave the task out"
                )
            self._ends.append(len(self.windows))

    def _add(self, fields: Fields, before: str, tokenizer: TextTokenizer, window_tokens: int) -> int:
        """Encode one question; return the tokens left for its context, negative if there is no room."""
        asked = [before + context for context in contexts(self.shape, fields)]
        if self.shape == ANSWER:
            ids = tokenizer.prefix + tokenizer.encode(asked[0]) or [tokenizer.eos_id]
            room = window_tokens - ANSWER_TOKENS
            self.cut += len(ids) > room
            self.prompts.append(Prompt(ids[-max(room, 1) :], ANSWER_TOKENS, ["\n"]))
            return room - 1
        sought = [f" {text}" for text in continuations(self.shape, fields)]
        pairs = [(context, text) for context in asked for text in sought]
        rows = [_window(tokenizer, context, text, window_tokens) for context, text in pairs]
        self.windows += [row for row, _ in rows]
        self.cut += any(cut for _, cut in rows)
        return window_tokens - max(len(row.targets) for row, _ in rows)

    def judge(self, scores: Sequence[WindowScore], answers: Sequence[str | None]) -> Score:
        """The task's metrics, from the scores of ``windows`` and the answers to ``prompts``."""
        likely = [score.loglikelihood for score in scores]
        found = self._judged(scores, likely, [answer or "" for answer in answers])
        return found if all(map(math.isfinite, likely)) and None not in answers else found.unknown()

    def _judged(self, scores: Sequence[WindowScore], likely: Sequence[float], answers: Sequence[str]) -> Score:
        if self.shape == ANSWER:
            return _means({"exact_match": [_is_right(a, f) for a, f in zip(answers, self.lines, strict=True)]})
        if self.shape == CONTINUATION:
            found = _means({"acc": [bool(score.hit.all()) for score in scores]})
            perplexity = math.exp(min(-sum(likely) / len(likely), 700.0))
            return found._replace(metrics=found.metrics | {"perplexity": perplexity})
        right: dict[str, list[bool]] = {name: [] for name in ["acc", "acc_norm"][: 1 + (self.shape == CHOICES)]}
        for fields, (first, last) in zip(self.lines, pairwise(self._ends), strict=True):
            own = likely[first:last]
            right["acc"].append(own.index(max(own)) == fields["gold"])
            if self.shape == CHOICES:
                each = [value / len(text) for value, text in zip(own, fields["choices"], strict=True)]
                right["acc_norm"].append(each.index(max(each)) == fields["gold"])
        return _means(right)


def _window(tokenizer: TextTokenizer, context: str, continuation: str, window_tokens: int) -> tuple[Window, bool]:
    """A continuation after its context, and whether the context was truncated."""
    if not context:
        first, whole = tokenizer.prefix or [tokenizer.eos_id], tokenizer.encode(continuation)
        ids = first + whole
        return Window(ids[:-1][-window_tokens:], whole), len(ids) > window_tokens + 1
    before = tokenizer.prefix + tokenizer.encode(context)
    ids = tokenizer.prefix + tokenizer.encode(context + continuation)
    return Window(ids[:-1][-window_tokens:], ids[len(before) :]), len(ids) > window_tokens + 1


def _is_right(given: str, fields: Fields) -> bool:
    plain: Callable[[str], str] = lambda text: text.strip().lower().translate(_NO_PUNCTUATION)  # noqa: E731
    return plain(given) in [plain(text) for text in continuations(ANSWER, fields)]


def _means(right: dict[str, list[bool]]) -> Score:
    """Means, and their standard errors as in the harness, with n - 1."""
    count = len(next(iter(right.values())))
    shares = {name: sum(found) / count for name, found in right.items()}
    errors = {name: math.sqrt(s * (1 - s) / (count - 1)) if count > 1 else 0.0 for name, s in shares.items()}
    return Score(shares, errors, count)
