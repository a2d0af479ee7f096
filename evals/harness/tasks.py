"""lm-evaluation-harness tasks that read local files, as its configs.

blimp            DATA/blimp/*.jsonl, ``blimp_NAME`` one file of them: of two sentences the likelier one
classify_NAME    DATA/tuning/NAME-test.jsonl: of a few labels the likeliest after the prompt
perplexity       a text, or documents, as ``evals.perplexity`` reads them
one_shot         DATA/tasks/*.jsonl, NAME one file of them: ``data/questions.py``

Also the names of the harness's own tasks of ``one_shot``'s kind, with their data on the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.discovery import format_of
from data.questions import read_texts
from evals.harness.questions import ONE_SHOT, QUESTIONS, dataset, question_files, question_task
from evals.texts import texts_of
from settings import did_you_mean

BLIMP, CLASSIFY, PERPLEXITY = "blimp", "classify_", "perplexity"
PAIRS, TEXT = Path("tuning"), Path("books/test.jsonl.xz")
"""In DATA: the folder of prompts and responses, and what ``perplexity`` reads by default."""
MOST_LABELS = 20
HUB_ONE_SHOT = (
    *("triviaqa", "nq_open", "webqs", "hellaswag", "lambada_openai", "wsc273", "winogrande", "race", "piqa"),
    *("arc_easy", "arc_challenge", "openbookqa", "boolq", "copa", "rte", "wic", "multirc", "wsc", "record", "cb"),
    *("anli_r1", "anli_r2", "anli_r3", "squadv2", "drop", "coqa"),
)
"""Tasks of the kind that Zeng et al. 2023 evaluate one-shot, of those that the harness defines."""
_PERPLEXITIES = {
    "bits_per_byte": "bits_per_byte",
    "byte_perplexity": "weighted_perplexity",
    "word_perplexity": "weighted_perplexity",
}
"""Metrics of ``perplexity``, and the harness's aggregation of each."""


def local_tasks(
    names: Sequence[str],
    data: Path | None,
    text: Path | None,
    shots: int | None,
    hub: bool = False,
    text_field: str = "text",
) -> list[dict[str, Any] | str]:
    """The configs of the tasks that read local files; other names stay names.

    Args:
        names: ``blimp``, ``blimp_NAME``, ``classify_NAME``, ``perplexity``, ``one_shot``, a file of ``tasks/``, or a
            user-defined task.
        data: holds ``blimp/``, ``tuning/``, ``tasks/`` and ``books/``.
        text: of ``perplexity``, if it is not ``TEXT`` in ``data``.
        shots: examples before each question; unless given 1 for ``one_shot`` and before what is classified, the
            setting of Zeng et al. 2023, and otherwise 0.
        hub: ``one_shot`` is ``HUB_ONE_SHOT`` instead of files.
        text_field: field or column of what ``perplexity`` reads.

    Raises:
        ValueError: if there are no such files, a line of one cannot be used, or labels are not 2 to ``MOST_LABELS``.
    """
    found: dict[str, dict[str, Any] | str] = {}
    questions = question_files(data)
    for name in names:
        if name == PERPLEXITY:
            found[name] = _perplexity(_text_file(data, text), text_field)
        elif name == BLIMP or name.startswith(f"{BLIMP}_"):
            files = _blimp_files(data)
            for chosen in sorted(files) if name == BLIMP else [name]:
                found[chosen] = _blimp(chosen, _file(chosen, files, f"{data}/{BLIMP}"), shots or 0)
        elif name.startswith(CLASSIFY):
            path = _file(name, _pair_files(data), f"{data}/{PAIRS}")
            found[name] = _classify(name, path, 1 if shots is None else shots)
        elif name == ONE_SHOT and hub:
            found |= {task: task for task in HUB_ONE_SHOT}
        elif name == ONE_SHOT or name in questions:
            if not questions:
                where = "DATA, which --data names" if data is None else data
                raise ValueError(
                    f"{ONE_SHOT} reads {QUESTIONS}/*.jsonl in {where}, but there is none; see docs/evaluation.md, or "
                    "read the harness's own from the Hub with --hub"
                )
            few = shots if shots is not None else int(name == ONE_SHOT)
            for task in questions if name == ONE_SHOT else [name]:
                found[task] = question_task(task, questions[task], few)
        else:
            found[name] = name
    return list(found.values())


def _file(name: str, files: dict[str, Path], where: str) -> Path:
    if name not in files:
        raise ValueError(f"there is no task '{name}' in {where}; {did_you_mean(name, files)}")
    return files[name]


def _blimp_files(data: Path | None) -> dict[str, Path]:
    if data is None:
        raise ValueError(f"{BLIMP} reads DATA/{BLIMP}/*.jsonl; say with --data where DATA is")
    files = {f"{BLIMP}_{path.stem}": path for path in sorted((data / BLIMP).glob("*.jsonl"))}
    if not files:
        raise ValueError(f"{data / BLIMP} holds no *.jsonl with minimal pairs; give another folder with --data")
    return files


def _pair_files(data: Path | None) -> dict[str, Path]:
    if data is None:
        raise ValueError(f"{CLASSIFY}NAME reads DATA/{PAIRS}/NAME-test.jsonl; say with --data where DATA is")
    files = sorted((data / PAIRS).glob("*-test.jsonl"))
    if not files:
        raise ValueError(f"{data / PAIRS} holds no NAME-test.jsonl to classify; give another folder with --data")
    return {f"{CLASSIFY}{path.name.removesuffix('-test.jsonl')}": path for path in files}


def _text_file(data: Path | None, text: Path | None) -> Path:
    if text is None and data is None:
        raise ValueError(f"{PERPLEXITY} reads a text; name it with --text, or a folder with {TEXT} with --data")
    path = text or (data or Path()) / TEXT
    if not path.is_file():
        raise ValueError(f"there is no file {path} for {PERPLEXITY}; name another with --text")
    return path


def _blimp(name: str, path: Path, shots: int) -> dict[str, Any]:
    pair = ("sentence_good", "sentence_bad")
    return {
        "task": name,
        **dataset([path], test=read_texts(path, *pair)),
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "num_fewshot": shots,
        "doc_to_text": "",
        "doc_to_choice": lambda fields: [fields[sentence] for sentence in pair],
        "doc_to_target": 0,
        **_ACCURACY,
    }


def _classify(name: str, test: Path, shots: int) -> dict[str, Any]:
    rows, files, more = read_texts(test, "prompt", "response"), [test], {}
    labels = sorted({fields["response"] for fields in rows})
    if not 2 <= len(labels) <= MOST_LABELS:
        raise ValueError(
            f"{name}: {test} has {len(labels)} different responses, but labels to choose from must be 2 to "
            f"{MOST_LABELS}; take a set with few labels"
        )
    if shots:
        files.append(test.with_name(test.name.removesuffix("-test.jsonl") + "-train.jsonl"))
        if not files[-1].is_file():
            raise ValueError(f"{name} takes its examples from {files[-1]}, which is missing; add it, or give --shots 0")
        more["train"] = read_texts(files[-1], "prompt", "response")
        if len(more["train"]) < shots:
            raise ValueError(f"{files[-1]} has {len(more['train'])} examples, fewer than --shots {shots}; lower it")
    return {
        "task": name,
        **dataset(files, test=rows, **more),
        "output_type": "multiple_choice",
        "fewshot_split": "train" if shots else None,
        "num_fewshot": shots,
        "doc_to_text": lambda fields: fields["prompt"],
        "doc_to_choice": labels,
        "doc_to_target": lambda fields: labels.index(fields["response"]),
        **_ACCURACY,
    }


def _perplexity(path: Path, text_field: str) -> dict[str, Any]:
    if format_of(path) is None:
        raise ValueError(
            f"the format of --text {path} cannot be inferred from its name; rename it, or measure it with python -m "
            "evals.perplexity --format text"
        )
    rows = [{"text": text} for text in texts_of(path, text_field=text_field) if text]
    if not rows:
        raise ValueError(f"{path} holds no text to score; name another with --text")
    return {
        "task": PERPLEXITY,
        **dataset([path], test=rows),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": lambda fields: fields["text"],
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": False}
            for name, aggregation in _PERPLEXITIES.items()
        ],
    }


_ACCURACY: dict[str, Any] = {
    "target_delimiter": "",  # the default is a space, which would be scored with the answer
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
