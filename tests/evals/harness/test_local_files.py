"""Local files are read as all commands read them, and what cannot be used is told by file and line."""

from __future__ import annotations

import json
import lzma
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from evals.harness.__main__ import main
from evals.harness.tasks import local_tasks
from evals.perplexity import perplexity
from evals.scoring import open_model
from evals.texts import texts_of
from tests.evals.harness.plain import answer_likelihood, likelihood, our_model, refused
from tests.evals.tiny import POSITIONS, weights_folder
from trainer.tasks.harness import evaluate

TEXT = "def add(a, b):\n    return a\n"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    return weights_folder(tmp_path_factory.mktemp("files") / "weights", "layer", corpus)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "is empty; a file of questions has one on every line"),
        (["{"], "bad.jsonl: line 1 is not JSON"),
        (['{"text": "a"}'], "has the fields text; a question has query, choices, gold; context_options, "),
        (['{"query": "a", "choices": ["b"], "gold": 0}'], "has no list of two or more texts in choices"),
        (
            ['{"query": "a", "choices": ["b", "c"], "gold": 2}'],
            "has gold 2, which is not the index of one of its 2 choices, counted",
        ),
        (['{"query": "a", "choices": ["b", "b"], "gold": 1}'], "has its right answer twice in choices"),
        (['{"query": "a", "choices": ["b", 3], "gold": 0}'], "has no list of two or more texts in choices"),
        (['{"query": "a", "choices": "bc", "gold": 0}'], "has no list of two or more texts in choices"),
        (['{"query": "a", "choices": ["b", ""], "gold": 0}'], "has no list of two or more texts in choices"),
        (
            ['{"query": "a", "choices": ["b", "c"], "gold": "0"}'],
            "has gold '0', which is not the index of one of its 2 choices",
        ),
        (['{"query": 3, "choices": ["b", "c"], "gold": 0}'], "bad.jsonl, line 1 has no text in query"),
        (['{"context_options": ["a"], "continuation": "b", "gold": 0}'], "two or more texts in context_options"),
        (['{"context": null, "continuation": "b"}'], "bad.jsonl, line 1 has no text in context"),
        (["[]"], "is empty; a file of questions has one on every line"),
        (["3"], "bad.jsonl, line 1 is not a JSON object"),
        (['{"context": "a", "answer": "\\ud800"}'], "bad.jsonl, line 1 is not valid Unicode"),
        (['{"context": "a", "answer": ""}'], "has no text in answer; all lines of a file have context, answer"),
        (['{"context": "a", "answer": "b"}'] * 2, "has 1 different lines, but each question takes 1 of the others as"),
        (
            ['{"context": "a", "answer": "b"}', '{"query": "a"}'],
            "bad.jsonl, line 2 has other fields than the first line; all lines",
        ),
    ],
)
def test_questions_that_cannot_be(
    weights: Path, lines: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/bad.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert sentence in refused(capsys, str(weights), "--tasks", "bad", "--data", str(tmp_path), "--shots", "1")


def test_texts_are_read_by_their_names(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the readers of all other commands: bits per byte are those of ``evals.perplexity`` on the same file."""
    line = json.dumps({"text": TEXT})
    for name, content in (
        ("Novel.TXT", TEXT.encode()),
        ("marked.rst", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()),
        ("wide.txt", TEXT.encode("utf-16")),
        ("list.txt", b"[1, 2]"),
        ("a.text.jsonl", f'{line}\r\n{{"text": ""}}\r\n'.encode()),
        ("time.md.jsonl.xz", lzma.compress(b'{"text": "2020-01-01T00:00:00"}\n')),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        outcome = evaluate(our_model(weights), local_tasks(["perplexity"], None, path, 0))
        own = perplexity(open_model(weights), texts_of(path), name, POSITIONS, POSITIONS)
        assert outcome.metrics["perplexity"]["bits_per_byte"] == pytest.approx(own.bits_per_byte, rel=1e-5), name
    for name, content, told in (
        ("plain", b"", "plain cannot be inferred from its name; rename it"),
        ("latin.txt", b"na\xefve", "latin.txt cannot be read: document 1 is not valid Unicode"),
        ("empty.jsonl", b'{"text": ""}\n', "empty.jsonl holds no text to score; name another with --text"),
        ("field.jsonl", b'{"body": "x"}\n', "line 1 has no field 'text' (found: body); name the one with the text"),
    ):
        (tmp_path / name).write_bytes(content)
        assert told in refused(capsys, str(weights), "--tasks", "perplexity", "--text", str(tmp_path / name))
    field = ["--tasks", "perplexity", "--text", str(tmp_path / "field.jsonl"), "--text-field", "body"]
    assert main([str(weights), *field]) == 0


def test_what_looks_like_a_number_a_time_or_a_list_is_a_text(weights: Path, tmp_path: Path) -> None:
    """In questions, pairs and labels, with marks of encodings and line ends of other systems."""
    odd = ["1", "2020-01-01", "[1]", "3"]
    for folder in ("tasks", "blimp", "tuning"):
        (tmp_path / folder).mkdir()

    def write(name: str, *lines: dict[str, Any], encoding: str = "utf-8-sig") -> None:
        (tmp_path / name).write_bytes("".join(json.dumps(line) + "\r\n" for line in lines).encode(encoding))

    write("tasks/go_on.jsonl", *({"context": a, "continuation": b} for a, b in pairwise(odd)), encoding="utf-16")
    write("tasks/choose.jsonl", {"query": "1", "choices": odd[1:], "gold": 0, "id": 1})
    write("tasks/fill.jsonl", {"context_options": odd[:2], "continuation": odd[2], "gold": 1, "id": "b"})
    write("blimp/pairs.jsonl", {"sentence_good": odd[0], "sentence_bad": odd[1]})
    write("tuning/label-test.jsonl", *({"prompt": a, "response": b} for a, b in pairwise(odd)))
    found = evaluate(
        our_model(weights), local_tasks(["go_on", "choose", "fill", "blimp", "classify_label"], tmp_path, None, 0)
    ).loglikelihoods
    expected = {
        "go_on": [(a, f" {b}") for a, b in pairwise(odd)],
        "choose": [("1", f" {choice}") for choice in odd[1:]],
        "fill": [(context, f" {odd[2]}") for context in odd[:2]],
        "classify_label": [(prompt, label) for prompt in odd[:3] for label in sorted(odd[1:])],
    }
    for task, asked in expected.items():
        assert found[task] == pytest.approx([answer_likelihood(weights, *parts) for parts in asked], abs=1e-3), task
    assert found["blimp_pairs"] == pytest.approx([likelihood(weights, text) for text in odd[:2]], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("blimp/bad.jsonl", b"{", "bad.jsonl: line 1 is not JSON"),
        ("blimp/bad.jsonl", b"", "bad.jsonl is empty; every line has sentence_good and sentence_bad"),
        ("blimp/bad.jsonl", b"3", "bad.jsonl, line 1 is not a JSON object; every line must be one"),
        (
            "blimp/bad.jsonl",
            b'{"sentence_good": "a", "sentence_bad": "b"}\n\n{"sentence_good": "a", "sentence_bad": 3}',
            "bad.jsonl, line 3 has no text in sentence_bad",
        ),
        ("tuning/bad-test.jsonl", b'{"prompt": "a", "response": 0}', "bad-test.jsonl, line 1 has no text in response"),
        ("tuning/bad-test.jsonl", b'{"prompt": "a", "response": "\\ud800"}', "bad-test.jsonl, line 1 is not valid Uni"),
    ],
)
def test_lines_that_cannot_be(
    weights: Path, tmp_path: Path, name: str, content: bytes, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(content)
    task = "blimp" if name.startswith("blimp") else "classify_bad"
    assert sentence in refused(capsys, str(weights), "--tasks", task, "--data", str(tmp_path))
