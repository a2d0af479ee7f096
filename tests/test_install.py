"""The project is installed as it lies here and no other way, and its commands work from any folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.isoflop.suite import load_suite, plan
from settings.project import ROOT, install_command, program_path, resolve_shipped
from tests.launching import command, environment

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def _install(checkout: Path, prefix: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Below ``prefix``, offline: what the build needs, setuptools, is here already."""
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", str(prefix)]
    words = [sys.executable, "-m", "pip", "install", *options, *what]
    return subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation reads, and a package."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "build_backend.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "data").mkdir()
    (folder / "data/__init__.py").touch()
    return folder


def test_an_editable_installation_is_this_folder_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    done = _install(checkout, tmp_path, "--editable", ".")
    assert done.returncode == 0, done.stderr
    (site,) = tmp_path.glob("lib/*/site-packages")
    (path,) = (entry for entry in site.iterdir() if entry.suffix != ".dist-info")
    assert path.suffix == ".pth" and path.read_text().split() == [str(checkout)]
    (metadata,) = (Parser().parsestr(path.read_text()) for path in site.glob("*.dist-info/METADATA"))
    assert metadata["Version"] == VERSION
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert metadata.get_all("Requires-Dist") == pins


def test_a_plain_installation_is_refused_with_a_sentence(checkout: Path, tmp_path: Path) -> None:
    done = _install(checkout, tmp_path, ".")
    assert done.returncode != 0 and list(tmp_path.iterdir()) == []
    assert re.search("error: Hopscotch is installed from its checkout only, .*: pip install --editable .", done.stderr)


@pytest.mark.parametrize("hook", ["build_wheel", "build_sdist", "get_requires_for_build_wheel"])
def test_every_way_to_an_archive_is_refused(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    import build_backend

    with pytest.raises(SystemExit, match="installed from its checkout only"):
        getattr(build_backend, hook)("dist")


def test_the_changelog_begins_with_the_version() -> None:
    (newest, *_) = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == VERSION


def test_a_run_from_an_empty_folder(corpus: dict[str, Any], tiny: dict[str, Any], tmp_path: Path) -> None:
    """Config, data and run folder are found where one stands; the code where it is installed, whatever lies beside."""
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "data").mkdir()  # no package, so it does not hide ours
    (tmp_path / "prepared").symlink_to(corpus["dir"])
    config = {**tiny, "data": {**tiny["data"], "dir": "prepared"}}
    del config["train"]["run_dir"]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))

    def run(words: Sequence[str]) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=variables, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(command("pretrain.train", "my.yaml", "train.steps=2", launcher="deepspeed"))
    assert (tmp_path / "runs/my/metrics.jsonl").is_file() and (tmp_path / "runs/my/checkpoints/step-00000002").is_dir()
    site = ["--site", str(ROOT / "launch/slurm/site.yaml"), "--tasks-per-node", "2"]
    script = run(command("launch.slurm", "my.yaml", "train.run_dir=runs/other", "--dry-run", *site))
    assert f"--chdir={tmp_path}" in script and "\nrun=runs/other\n" in script
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "my.yaml", "prepared", "runs"]


@pytest.mark.parametrize("path", sorted((ROOT / "bench/suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_suite_finds_its_backbone_from_any_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = load_suite(path)
    assert plan(suite, tmp_path) and Path(suite.backbone).is_relative_to(ROOT)
    own = tmp_path / os.path.relpath(suite.backbone, ROOT)
    own.parent.mkdir()
    shutil.copyfile(suite.backbone, own)
    assert not Path(load_suite(path).backbone).is_absolute()  # what lies where one stands comes first


def test_what_is_to_be_typed_can_be_typed_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv/bin/python"))
    monkeypatch.chdir(ROOT)
    assert install_command("requirements-dev.txt") == ".venv/bin/python -m pip install -r requirements-dev.txt"
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / program_path("tensorboard")).resolve().parent == (ROOT / ".venv/bin").resolve()
    assert (tmp_path / install_command("requirements.txt").split()[-1]).samefile(ROOT / "requirements.txt")
    assert resolve_shipped("configs/tune_lora.yaml") == str(ROOT / "configs/tune_lora.yaml")
