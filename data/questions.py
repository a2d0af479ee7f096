"""Question files: tasks of the user's own, one JSON object per line.

The fields of a line determine what is asked, the same for all lines of a file:

    query, choices, gold                 which of the choices is the likeliest after the query
    context_options, continuation, gold  after which of the contexts the continuation is the likeliest
    context, continuation                how likely the continuation is, and whether greedy decoding gives it
    context, answer[, aliases]           whether greedy decoding gives the answer, or one of its aliases

``gold`` counts from 0. The parts are joined by a single space. A query with a line ``Question:`` but none with
``Answer:`` gets one, as in the published versions of sets with such queries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from data.containers import json_records
from data.discovery import find_files

SUFFIX = ".jsonl"
CHOICES, OPTIONS = ("query", "choices", "gold"), ("context_options", "continuation", "gold")
CONTINUATION, ANSWER = ("context", "continuation"), ("context", "answer")
ANSWER_TOKENS = 24
"""Maximum number of tokens of a generated answer."""
_EXAMPLES_SEED = 1234  # lm-evaluation-harness's own: both show the same examples
Fields = dict[str, Any]


class QuestionFile(NamedTuple):
    """The questions of a file."""

    path: Path
    shape: tuple[str, ...]
    """The fields that every line has, which determine the kind of task: one of ``SHAPES``."""
    lines: list[Fields]
    """Those fields, and an answer's aliases; others are left out."""

    @property
    def different(self) -> int:
        """Number of distinct lines."""
        return len({json.dumps(fields, sort_keys=True) for fields in self.lines})

    def require_examples(self, shots: int, fix: str) -> None:
        """Raise ValueError, with ``fix``, if a question cannot have ``shots`` others before it."""
        if self.different <= shots:
            raise ValueError(
                f"{self.path} has {self.different} different lines, but each question takes {shots} of the others as "
                f"examples; {fix}"
            )

    def examples(self, count: int, shots: int) -> list[str]:
        """The few-shot examples before each of the first ``count`` questions: ``shots`` others, with their answers.

        Drawn as lm-evaluation-harness draws them, from all of the file.
        """
        drawn, texts = Random(_EXAMPLES_SEED), []
        for fields in self.lines[:count]:
            shown = [other for other in drawn.sample(self.lines, shots + 1) if other != fields][:shots] if shots else []
            if len(shown) < shots:  # the line occurs more than once
                shown = drawn.sample([other for other in self.lines if other != fields], shots)
            texts.append("".join(f"{solved(self.shape, other)}\n\n" for other in shown))
        return texts


def read_questions(path: Path) -> QuestionFile:
    """Read and check all of a file.

    Raises:
        ValueError: if a line is not of the first line's shape, or there is none.
    """
    shape, found = None, []
    for place, fields in _objects(path):
        shape = shape or next((each for each in SHAPES if all(field in fields for field in each)), None)
        if shape is None:
            shapes = "; ".join(", ".join(each) for each in SHAPES)
            raise ValueError(f"{path}, {place} has the fields {', '.join(fields)}; a question has {shapes}")
        problem = (
            SHAPES[shape](fields) if all(field in fields for field in shape) else "has other fields than the first line"
        )
        if problem:
            raise ValueError(f"{path}, {place} {problem}; all lines of a file have {', '.join(shape)}")
        found.append({field: fields[field] for field in shape})
        if shape == ANSWER:
            found[-1]["aliases"] = fields.get("aliases") or []
    if shape is None:
        raise ValueError(f"{path} is empty; a file of questions has one on every line")
    return QuestionFile(path, shape, found)


def read_texts(path: Path, *names: str) -> list[Fields]:
    """The fields ``names`` of every line of a file, each a text.

    Raises:
        ValueError: if a line lacks one, or there is no line.
    """
    found = []
    for place, fields in _objects(path):
        for name in names:
            if not isinstance(fields.get(name), str) or not fields[name].strip():
                raise ValueError(f"{path}, {place} has no text in {name}; every line has {' and '.join(names)}")
        found.append({name: fields[name] for name in names})
    if not found:
        raise ValueError(f"{path} is empty; every line has {' and '.join(names)}")
    return found


def _objects(path: Path) -> Iterator[tuple[str, Fields]]:
    """The place and the object of each line of a file."""
    try:
        records = list(json_records(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for place, fields in records:
        if not isinstance(fields, dict):
            raise ValueError(f"{path}, {place} is not a JSON object; every line must be one")
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{path}, {place} is not valid Unicode (bytes of another encoding, or half a surrogate pair); save the "
                "file as UTF-8, or correct the line"
            ) from None
        yield place, fields


def find_tasks(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The question files among the task ``names``, with patterns expanded, and the other names.

    Raises:
        ValueError: there is no such file, or two tasks have the same name; a file's task has the file's name.
    """
    files = [name for name in names if name.endswith(SUFFIX)]
    found = find_files(files, as_given=True) if files else []
    others = [name for name in names if name not in files]
    tasks = [path.stem for path in found] + [Path(name).stem for name in others]
    if twice := next((task for task in tasks if tasks.count(task) > 1), None):
        raise ValueError(
            f"two tasks are called '{twice}', so their metrics would have one name; leave one out, or rename it"
        )
    return found, others


def contexts(shape: tuple[str, ...], fields: Fields) -> list[str]:
    """The context of what is scored: one text, or for ``OPTIONS`` one per option."""
    if shape == CHOICES:
        query: str = fields["query"].rstrip()
        asks = any(line.startswith("Question:") for line in query.splitlines())
        return [f"{query}\nAnswer:" if asks and "Answer:" not in query else query]
    return [text.rstrip() for text in (fields["context_options"] if shape == OPTIONS else [fields["context"]])]


def continuations(shape: tuple[str, ...], fields: Fields) -> list[str]:
    """What is scored, without the space before it: one text, or for ``CHOICES`` one per choice.

    For ``ANSWER`` the right answer, followed by its aliases.
    """
    if shape == CHOICES:
        return list(fields["choices"])
    if shape == ANSWER:
        return [fields["answer"], *(fields.get("aliases") or [])]
    return [fields["continuation"].lstrip()]


def solved(shape: tuple[str, ...], fields: Fields) -> str:
    """A question with its answer, as an example."""
    before, after = contexts(shape, fields), continuations(shape, fields)
    context = before[fields["gold"]] if shape == OPTIONS else before[0]
    return f"{context} {after[fields['gold']] if shape == CHOICES else after[0]}"


def _choices_problem(options: str) -> Callable[[Fields], str]:
    def problem(fields: Fields) -> str:
        texts, gold = fields[options], fields["gold"]
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
            return f"has no list of two or more texts in {options}"
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(texts):
            return f"has gold {gold!r}, which is not the index of one of its {len(texts)} {options}, counted from 0"
        if texts.count(texts[gold]) > 1:
            return f"has its right answer twice in {options}, so it has no single right one"
        other = "query" if options == "choices" else "continuation"
        return "" if isinstance(fields[other], str) and fields[other].strip() else f"has no text in {other}"

    return problem


def _text_problem(*names: str) -> Callable[[Fields], str]:
    def problem(fields: Fields) -> str:
        empty = [name for name in names if not isinstance(fields[name], str) or not fields[name].strip()]
        if empty:
            return f"has no text in {empty[0]}"
        aliases = fields.get("aliases") or []
        if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
            return "has no list of texts in aliases"
        return ""

    return problem


SHAPES: dict[tuple[str, ...], Callable[[Fields], str]] = {
    CHOICES: _choices_problem("choices"),
    OPTIONS: _choices_problem("context_options"),
    CONTINUATION: _text_problem(*CONTINUATION),
    ANSWER: _text_problem(*ANSWER),
}
"""The fields that a line may have, and a function that says what is wrong with a line: a few words, or nothing."""
