"""Files of questions (``data/questions.py``) as configs of lm-evaluation-harness; ``one_shot`` is a folder of them."""

from __future__ import annotations

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
    asked = read_questions(path)
    asked.require_examples(shots, "give fewer --shots")
    return {"task": name, **dataset, "fewshot_split": "test", "num_fewshot": shots, **_CONFIGS[asked.shape]}


def _first(texts: Any, fields: Fields) -> str:
    found: str = texts(fields)[0]
    return found


_CHOICE = {
    "output_type": "multiple_choice",
    "target_delimiter": " ",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
_CONFIGS: dict[tuple[str, ...], dict[str, Any]] = {
    CHOICES: {
        **_CHOICE,
        "doc_to_text": partial(_first, partial(contexts, CHOICES)),
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    },
    OPTIONS: {
        **_CHOICE,
        "doc_to_text": lambda fields: fields["gold"],
        "doc_to_choice": partial(contexts, OPTIONS),
        "doc_to_target": partial(_first, partial(continuations, OPTIONS)),
        "metric_list": _CHOICE["metric_list"][:1],  # all choices end alike: there is no length to make up for
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
