"""What a run and a checkpoint are is decided in one file, by names that stand nowhere else."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.launching import ROOT
from tests.test_imports import MAY_IMPORT
from trainer.checkpoints import layout
from trainer.monitor import metrics_file

LAYOUT = ROOT / "trainer/checkpoints/layout.py"


@functools.cache
def _strings(path: Path) -> set[str]:
    """String constants of a Python file, docstrings left out."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs)
    return {node.value for node in constants if isinstance(node.value, str)}


@pytest.mark.parametrize("name", ["checkpoints", "step-", ".partial", ".removed", "abandoned-", "trainer.pt"])
def test_a_name_stands_in_one_file(name: str) -> None:
    files = [path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")]
    adapters = ROOT / "tune/adapter_files.py"  # its own folder's .partial
    assert [path for path in files if name in _strings(path) and path != adapters] == [LAYOUT]
    assert not any(text.startswith("step-*") for path in files for text in _strings(path))


def test_names_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "runs/my"
    folder = layout.checkpoints_of(run)
    checkpoint = layout.checkpoint_at(folder, 1000)
    assert checkpoint == run / "checkpoints/step-00001000" and layout.step_of(checkpoint) == 1000
    assert not layout.is_run(run) and layout.run_of(run) is None and layout.newest_first(folder) == []
    assert layout.newest_name(folder) == "no earlier checkpoint was written"
    for path in (checkpoint, layout.checkpoint_at(folder, 2000), layout.partial_of(layout.checkpoint_at(folder, 3000))):
        path.mkdir(parents=True)
    (folder / "step-final").mkdir()
    layout.removed_of(layout.checkpoint_at(folder, 500)).mkdir()
    assert layout.is_run(run) and layout.run_of(run) == run and layout.run_of(checkpoint) == run
    assert layout.run_of(tmp_path) is None and layout.run_of(tmp_path / "copied" / checkpoint.name) is None
    assert [layout.step_of(path) for path in layout.newest_first(folder)] == [2000, 1000]
    assert layout.newest_name(folder) == "the newest checkpoint is step-00002000"
    assert [path.name for path in layout.unfinished(folder)] == ["step-00003000.partial"]
    assert [path.name for path in layout.leftovers(folder)] == ["step-00003000.partial", "step-00000500.removed"]
    assert layout.next_abandoned(folder).name == "abandoned-1"
    (folder / "abandoned-7").mkdir()
    assert layout.next_abandoned(folder).name == "abandoned-8"


def test_the_run_of_a_checkpoint_is_named_as_the_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "runs/my/checkpoints/step-00001000"
    checkpoint.mkdir(parents=True)
    (tmp_path / "linked").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert layout.run_of(checkpoint.relative_to(tmp_path)) == Path("runs/my")  # right where all is moved, too
    assert layout.run_of(Path("linked")) == tmp_path.resolve() / "runs/my"
    monkeypatch.chdir(checkpoint)
    assert layout.run_of(Path()) == tmp_path.resolve() / "runs/my"


def test_metrics_of_a_run_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / metrics_file.NAME
    assert metrics_file.read(path) == [] and metrics_file.latest(path) == {}
    lines = [{"step": 1, "a": 1.5}, {"step": 2, "b": None}, {"step": 3, "a": 2.5}]
    path.write_bytes(metrics_file.content_of(lines) + b'{"step": 4, "a": 3')
    assert metrics_file.read(path) == lines
    assert metrics_file.read(path, tail_bytes=40) == lines[2:]
    assert metrics_file.latest(path) == {"step": 3, "a": 2.5, "b": None}
    assert metrics_file.latest(path, 2) == {"step": 2, "a": 1.5, "b": None}


def test_what_is_there_instead_of_a_run_or_checkpoint(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert layout.what_is_there(runs) == layout.what_is_there(runs / "my") == ""
    for name in ("my", "demo"):
        layout.checkpoints_of(runs / name).mkdir(parents=True)
    (runs / "demo-data").mkdir()
    assert layout.what_is_there(runs) == layout.what_is_there(runs / "ym") == f"; {runs} holds demo, my"
    checkpoints = layout.checkpoints_of(runs / "my")
    for step in (20, 40, 60, 80):
        layout.checkpoint_at(checkpoints, step).mkdir()
    listed = f"; {checkpoints} holds step-00000080, step-00000060, step-00000040, ..."
    assert layout.what_is_there(checkpoints) == layout.what_is_there(checkpoints / "step-00000019") == listed
    assert layout.what_is_there(checkpoints / "step-00000020") == ""  # exists, and holds neither
