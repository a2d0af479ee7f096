"""The demo's examples are functions, cut between docstring and body, and come from packages that stage one left out."""

from __future__ import annotations

import ast
import json
import textwrap
from pathlib import Path

import pytest
import yaml

from launch.demo_examples import SETS, functions, main
from tests.launching import ROOT

SOURCE = '''
def with_both(x):
    """Say what."""
    return x + 1


class Inside:
    def deeper(self):
        """Two

        lines."""
        y = 2
        return y

    def no_docstring(self):
        return 3


def no_body():
    """Nothing follows."""
'''


def test_prompt_and_response_are_the_source_cut_in_two() -> None:
    found = list(functions(SOURCE))
    assert [ast.parse(textwrap.dedent(f["prompt"] + f["response"])).body[0].name for f in found] == [
        "with_both",
        "deeper",
    ]
    assert found[0] == {"prompt": 'def with_both(x):\n    """Say what."""\n', "response": "    return x + 1\n"}
    assert all(f["prompt"] + f["response"] in SOURCE for f in found)
    assert list(functions("def broken(:\n")) == []


def test_the_command_writes_what_the_demos_config_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["launch.demo_examples", str(tmp_path)])
    assert main() == 0
    for name in SETS:
        lines = [json.loads(line) for line in (tmp_path / f"functions-{name}.jsonl").read_text().splitlines()]
        assert len(lines) > 100 and all(line.keys() == {"prompt", "response"} for line in lines)
    config = yaml.safe_load((ROOT / "configs/tune_demo.yaml").read_text())["data"]
    assert config["sources"][0]["files"] == ["runs/demo-data/functions-train.jsonl"]
    assert config["validation"][0]["files"] == ["runs/demo-data/functions-validation.jsonl"]


def test_what_validates_was_held_out_in_stage_one() -> None:
    held_out = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())["data"]["validation"][0]["files"]
    packages = {pattern.split("/")[1] for pattern in held_out}
    assert {pattern.split("/")[0] for pattern in SETS["validation"]} == packages
