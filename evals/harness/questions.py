"""Question files (``data/questions.py``) as configs of lm-evaluation-harness; ``one_shot`` is a folder of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.questions import (
    ANSWER,
    ANSWER_TOKENS,
    CHOICES,
    CONTINUATION,
    OPTIONS,
    Fields,
    contexts,
    continuations,
    read_questions,
)

ONE_SHOT, QUESTIONS = "one_shot", Path("tasks")
"""All files of the folder ``tasks`` in DATA, after one example each."""


def question_files(data: Path | None) -> dict[str, Path]:
    """The question files in DATA by task name."""
    return {} if data is None else {path.stem: path for path in sorted((data / QUESTIONS).glob("*.jsonl"))}


def question_task(name: str, path: Path, shots: int) -> dict[str, Any]:
    """The config of one file's task.

    Args:
        name: of the task.
        path: its file.
        shots: examples before each question, others of the same file.

    Raises:
        ValueError: if a line is not of the first line's shape, or there are too few for the examples.
    """
    asked = read_questions(path)
    asked.require_examples(shots, "give fewer --shots")
    examples = {"fewshot_split": "test", "num_fewshot": shots}
    return {"task": name, **dataset([path], test=asked.lines), **examples, **_CONFIGS[asked.shape]}


def dataset(files: Sequence[Path], **splits: list[Fields]) -> dict[str, Any]:
    """The part of a config about its documents, read from ``files`` by our own readers.

    The ``datasets`` library would turn text that looks like a timestamp into one, and cannot read UTF-16.
    """

    def as_datasets(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {name: Dataset.from_list(rows) for name, rows in splits.items()}

    return {
        "custom_dataset": as_datasets,
        "test_split": "test",
        "metadata": {"version": 1.0, "files": [str(path.resolve()) for path in files]},
    }


def _first(texts: Any, fields: Fields) -> str:
    found: str = texts(fields)[0]
    return found


_CHOICE = {
    "output_type": "multiple_choice",
    "target_delimiter": " ",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
# Functions, not templates: the harness would parse a template's text that looks like a number or a list.
_CONFIGS: dict[tuple[str, ...], dict[str, Any]] = {
    CHOICES: {
        **_CHOICE,
        "doc_to_text": partial(_first, partial(contexts, CHOICES)),
        "doc_to_choice": lambda fields: fields["choices"],
        "doc_to_target": lambda fields: fields["gold"],
    },
    OPTIONS: {
        **_CHOICE,
        "doc_to_text": lambda fields: fields["gold"],
        "doc_to_choice": partial(contexts, OPTIONS),
        "doc_to_target": partial(_first, partial(continuations, OPTIONS)),
        "metric_list": _CHOICE["metric_list"][:1],  # same continuation for all: no length to normalise by
    },
    CONTINUATION: {
        "output_type": "loglikelihood",
        "doc_to_text": partial(_first, partial(contexts, CONTINUATION)),
        "doc_to_target": lambda fields: " " + continuations(CONTINUATION, fields)[0],
        "target_delimiter": "",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    ANSWER: {
        "output_type": "generate_until",
        "doc_to_text": partial(_first, partial(contexts, ANSWER)),
        "doc_to_target": partial(continuations, ANSWER),
        "target_delimiter": " ",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": ANSWER_TOKENS},
        "filter_list": [{"name": "answer", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
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
}
