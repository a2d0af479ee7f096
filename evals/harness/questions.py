"""Tasks of the user's own, each a file of JSON lines, as configs of lm-evaluation-harness; ``one_shot`` is all of them.

What a line holds says what is asked, the same for all lines of a file:

    query, choices, gold                 which of the choices is the likeliest after the query
    context_options, continuation, gold  after which of the contexts the continuation is the likeliest
    context, continuation                how likely the continuation is, and whether greedy decoding gives it
    context, answer[, aliases]           whether greedy decoding gives the answer, or one of its aliases

``gold`` counts from 0. A space stands between the parts where none ends the first. A query with a line ``Question:``
and none of ``Answer:`` gets one, which is how the sets that have such queries are published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ONE_SHOT, QUESTIONS = "one_shot", Path("tasks")
"""All files of the folder ``tasks`` in DATA, after one example each."""
_ANSWER_TOKENS = 24


def question_files(data: Path | None) -> dict[str, Path]:
    """The files of questions in DATA by the name of their task."""
    return {} if data is None else {path.stem: path for path in sorted((data / QUESTIONS).glob("*.jsonl"))}


def question_task(name: str, path: Path, shots: int, dataset: dict[str, Any]) -> dict[str, Any]:
    """The config of one file's task.

    Args:
        name: of the task.
        path: its file.
        shots: examples before each question, others of the same file.
        dataset: what its config says of the file.

    Raises:
        ValueError: if a line is not of the first line's shape, or there are too few for the examples.
    """
    shape, different = _read(path)
    if different <= shots:
        raise ValueError(
            f"{path} has {different} different lines, and each question takes {shots} of the others for examples; give "
            "fewer --shots"
        )
    return {"task": name, **dataset, "fewshot_split": "test", "num_fewshot": shots, **_SHAPES[shape][1]}


def _read(path: Path) -> tuple[tuple[str, ...], int]:
    """The fields that decide, which every line has, and the number of different lines."""
    shape, different = None, set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                fields = None
            if not isinstance(fields, dict):
                raise ValueError(f"{path}:{number} is no JSON object; every line is one question")
            different.add(line.strip())
            shape = shape or next((each for each in _SHAPES if all(field in fields for field in each)), None)
            if shape is None:
                shapes = "; ".join(", ".join(each) for each in _SHAPES)
                raise ValueError(f"{path}:{number} has the fields {', '.join(fields)}; a question has {shapes}")
            problem = _SHAPES[shape][0](fields) if all(field in fields for field in shape) else "is of another kind"
            if problem:
                raise ValueError(f"{path}:{number} {problem}; all lines of a file have {', '.join(shape)}")
    if shape is None:
        raise ValueError(f"{path} is empty; a file of questions has one on every line")
    return shape, len(different)


def _choices_problem(options: str) -> Callable[[dict[str, Any]], str]:
    def problem(fields: dict[str, Any]) -> str:
        texts, gold = fields[options], fields["gold"]
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
            return f"has no list of two or more texts in {options}"
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(texts):
            return f"has gold {gold!r}, which is not one of its {len(texts)} {options}, counted from 0"
        return ""

    return problem


def _text_problem(*names: str) -> Callable[[dict[str, Any]], str]:
    def problem(fields: dict[str, Any]) -> str:
        empty = [name for name in names if not isinstance(fields[name], str) or not fields[name]]
        return f"has no text in {empty[0]}" if empty else ""

    return problem


def query_of(fields: dict[str, Any]) -> str:
    """What a choice is read after."""
    query: str = fields["query"].rstrip()
    asks = any(line.startswith("Question:") for line in query.splitlines())
    return f"{query}\nAnswer:" if asks and "Answer:" not in query else query


def _accepted(fields: dict[str, Any]) -> list[str]:
    return [fields["answer"], *(fields.get("aliases") or [])]


_CHOICE = {
    "output_type": "multiple_choice",
    "target_delimiter": " ",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
_SHAPES: dict[tuple[str, ...], tuple[Callable[[dict[str, Any]], str], dict[str, Any]]] = {
    ("query", "choices", "gold"): (
        _choices_problem("choices"),
        {**_CHOICE, "doc_to_text": query_of, "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
    ),
    ("context_options", "continuation", "gold"): (
        _choices_problem("context_options"),
        {
            **_CHOICE,
            "doc_to_text": lambda fields: fields["gold"],
            "doc_to_choice": lambda fields: [text.rstrip() for text in fields["context_options"]],
            "doc_to_target": lambda fields: fields["continuation"].lstrip(),
            "metric_list": _CHOICE["metric_list"][:1],  # all choices end alike: there is no length to make up for
        },
    ),
    ("context", "continuation"): (
        _text_problem("context", "continuation"),
        {
            "output_type": "loglikelihood",
            "doc_to_text": lambda fields: fields["context"].rstrip(),
            "doc_to_target": lambda fields: " " + fields["continuation"].lstrip(),
            "target_delimiter": "",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
    ),
    ("context", "answer"): (
        _text_problem("context", "answer"),
        {
            "output_type": "generate_until",
            "doc_to_text": lambda fields: fields["context"].rstrip(),
            "doc_to_target": _accepted,
            "target_delimiter": " ",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": _ANSWER_TOKENS},
            "filter_list": [
                {"name": "answer", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                    "ignore_case": True,
                    "ignore_punctuation": True,
                }
            ],
        },
    ),
}
