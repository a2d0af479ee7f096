"""The demo's examples: brackets to close, to validate from packages that stage one left out; and the answers."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from launch.demo.answers import Answer, report
from launch.demo.examples import MOST, RESPONSES, SETS, balanced, cut_lines, main
from tests.launching import ROOT, run


def test_a_line_is_cut_where_each_bracket_closes() -> None:
    assert list(cut_lines(["    self.f(a[i], {k: (1)})"])) == [
        ("self.f(a[i", "])"),
        ("self.f(a[i], {k: (1", ")})"),
        ("self.f(a[i], {k: (1)", "})"),
        ("self.f(a[i], {k: (1)}", ")"),
    ]
    for code, response in cut_lines(["x = sorted(map(len, names[1:]))", "if f(g(h(x))) > y[0]:"]):
        whole = code + response
        ast.parse(whole + ": pass" if whole.startswith("if") else whole)


@pytest.mark.parametrize(
    "line", ["f(x", "f(x])", "f(a, ')')", "f(x)  # (", "f(x)", "f(" + "x" * 90 + ")", "f(ä, bcdef)"]
)
def test_what_is_left_out(line: str) -> None:
    """Brackets that do not match or stand in strings and comments, lines too short or too long, other alphabets."""
    assert list(cut_lines([line])) == []


def test_a_line_counts_once_and_no_response_is_commoner_than_asked() -> None:
    lines = ["first(x, y)", "first(x, y)", "second(x, y)", "third(x, y)", "table[key, 1]"]
    examples = balanced(cut_lines(lines), most=2)
    assert Counter(example["response"] for example in examples) == {")": 2, "]": 1}
    assert all(example["prompt"].endswith("\n") for example in examples)
    assert examples == balanced(cut_lines(lines), most=2)


def test_the_command_writes_what_the_demos_config_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["launch.demo.examples", str(tmp_path)])
    assert main() == 0
    for name in SETS:
        lines = [json.loads(line) for line in (tmp_path / f"brackets-{name}.jsonl").read_text().splitlines()]
        counts = Counter(line["response"] for line in lines)
        assert set(counts) == set(RESPONSES) and min(counts.values()) >= 20 and max(counts.values()) <= MOST[name]
    config = yaml.safe_load((ROOT / "configs/tune_demo.yaml").read_text())["data"]
    assert config["sources"][0]["files"] == ["runs/demo-data/brackets-train.jsonl"]
    assert config["validation"][0]["files"] == ["runs/demo-data/brackets-validation.jsonl"]
    assert tuple(config["validation"][0]["choices"]) == RESPONSES


def test_neither_stage_trains_on_what_validates() -> None:
    data = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())["data"]
    held_out = {pattern.removeprefix("{stdlib}/") for pattern in data["validation"][0]["files"]}
    trained = {pattern.removeprefix("{stdlib}/") for pattern in data["sources"][0]["files"]}
    assert set(SETS["validation"]) == held_out and set(SETS["train"]) == trained
    library = Path(ast.__file__).parent
    files = [{path for pattern in patterns for path in library.glob(pattern)} for patterns in (held_out, trained)]
    assert all(files) and not files[0] & files[1]


def test_answers_are_counted_and_shown_right_and_wrong() -> None:
    answers = [Answer("f(x\n", given, ")") for given in (")", "]", ")", "", "))", ")")]
    said = report(answers)
    assert said[0] == "3 of 6 right, for example:"
    assert [line.split()[0] for line in said[1:]] == ["right", "right", "wrong", "wrong"]
    assert "f(x" in said[1] and "]" in said[3] and ")" in said[3] and "nothing" in said[4]


def test_no_export_and_no_examples_are_one_sentence_each(tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    done = run("launch.demo.answers", "runs/no-such", str(examples))
    assert done.returncode == 1 and f"{examples} does not exist; write it with python -m launch.demo" in done.stdout
    examples.write_text('{"prompt": "f(x\\n", "response": ")"}\n')
    done = run("launch.demo.answers", "runs/no-such", str(examples))
    assert done.returncode == 1 and "runs/no-such is not an export: it has no config.json" in done.stdout
