"""``~`` and variables in every path of every config and on every command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from pydantic import BaseModel

from data.config import DataConfig
from launch.slurm.config import SlurmConfig
from settings import path_argument, require_writable, shown
from settings.load import nested_schemas
from settings.paths import expand
from trainer.config import PretrainConfig
from tune.config import TuneFile


def test_home_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert expand("~/prep") == "/home/me/prep" and expand("$SCRATCH/r") == expand("${SCRATCH}/r") == "/scratch/me/r"
    assert expand("a~b/c d") == "a~b/c d" and expand("cost-5$") == "cost-5$"
    assert path_argument("~/x") == Path("/home/me/x")


@pytest.mark.parametrize("path", ["$NOT_SET_ANYWHERE/r", "${NOT_SET_ANYWHERE}", "${HOME", "~nobody-of-this-name/x"])
def test_what_cannot_be_expanded_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"is not set; set it|is not known"):
        expand(path)
    with pytest.raises(argparse.ArgumentTypeError):
        path_argument(path)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "x.json", "--json")
    with pytest.raises(
        ValueError, match=r"there is no folder .*/none to write x.json in; create it, or give another --o"
    ):
        require_writable(tmp_path / "none" / "x.json", "--out")
    with pytest.raises(ValueError, match=r"--json .* is a folder; give the name of a file in it"):
        require_writable(tmp_path, "--json")
    monkeypatch.setattr("settings.paths.os.access", lambda path, mode: False)  # a superuser may write everywhere
    with pytest.raises(ValueError, match=r"you may not write to the folder .*; give another --json"):
        require_writable(tmp_path / "x.json", "--json")


def test_bytes_that_are_not_utf8_are_shown() -> None:
    assert shown("caf\udce9.txt") == "caf\\xe9.txt" and shown("café") == "café"


def _path_fields(schema: type[BaseModel], place: str = "") -> dict[str, bool]:
    """Fields whose name says that they hold a path, and whether they expand."""
    found = {}
    for name, field in schema.model_fields.items():
        if name in ("dir", "run_dir", "path", "files", "venv", "tokenizer", "hub") and not nested_schemas(
            field.annotation
        ):
            found[f"{place}{name}"] = "expand" in repr((field.annotation, field.metadata))
        for nested in nested_schemas(field.annotation):
            found |= _path_fields(nested, f"{place}{name}.")
    return found


@pytest.mark.parametrize("schema", [PretrainConfig, TuneFile, DataConfig, SlurmConfig])
def test_every_path_of_every_config_expands(schema: type[BaseModel]) -> None:
    fields = _path_fields(schema)
    assert fields and all(fields.values()), [name for name, expands in fields.items() if not expands]
