"""Every shipped config loads, and every field of every block is described and read (invariant 8)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from settings import load, to_yaml
from tests.config_reads import blocks_of, unread
from tests.launching import ROOT
from trainer.config import PretrainConfig, load_run
from trainer.config_blocks import TrainConfig
from tune.config import TuneConfig, TuneFile
from tune.resolve import load_file

TUNE = sorted((ROOT / "configs").glob("tune_*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - set(TUNE))


def _sources() -> list[Path]:
    """Everything but the tests."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    assert {"data", "model", "pretrain", "trainer"} <= {package.name for package in packages}
    return [path for package in packages for path in sorted(package.rglob("*.py"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_names_its_run_and_survives_being_saved(path: Path, tmp_path: Path) -> None:
    config = load_run(path)
    assert config.train.run_dir == f"runs/{path.stem}"
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load(saved, [], PretrainConfig) == load_run(saved) == config
    assert path.read_text().startswith("# ")  # says what it is for


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_config_divides_over_common_numbers_of_ranks(path: Path, ranks: int) -> None:
    config = load_run(path)
    if ranks * config.train.micro_batch_samples > config.train.global_batch_samples:
        with pytest.raises(ValueError, match="micro_batch_samples x ranks"):
            config.accumulation(ranks)
    else:
        assert config.accumulation(ranks) >= 1


@pytest.mark.parametrize("path", TUNE, ids=lambda path: path.stem)
def test_every_stage_two_config_loads_and_survives_being_saved(path: Path, tmp_path: Path) -> None:
    file = load_file(path)
    assert file.train.run_dir == ("runs/demo-tuned" if path.stem == "tune_demo" else f"runs/{path.stem}")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(file))
    assert load_file(saved) == file
    assert path.read_text().startswith("# ")
    assert file.train.global_batch_samples % (2 * file.train.micro_batch_samples) == 0


def test_the_tuning_methods_differ_by_method_alone() -> None:
    files = [load_file(path) for path in TUNE if path.stem not in ("tune_demo", "tune_mine")]
    methods = {(f.adapter.kind, f.adapter.layers, f.ensemble is not None) for f in files if not f.adapter.final_norm}
    with_and_without = {(kind, "all", ensemble) for kind in ("full", "lora", "dora") for ensemble in (True, False)}
    assert methods == with_and_without | {("none", "all", True), ("lora", "early", True)}
    assert {f.adapter.kind for f in files if f.base.routers == "frozen"} == {"none"}
    rest = []
    for file in files:
        dumped = file.model_dump(exclude={"adapter", "ensemble"})
        del dumped["train"]["run_dir"], dumped["train"]["optimizer"]["lr"], dumped["base"]["routers"]
        rest.append(dumped)
    assert all(one == rest[0] for one in rest)


def test_dense_and_skip_differ_by_the_router_block_and_nothing_else() -> None:
    dense, skip = (yaml.safe_load((ROOT / f"configs/{name}_160m.yaml").read_text()) for name in ("dense", "skip"))
    router = skip["model"].pop("router")
    assert router["kind"] == "learned" and dense == skip
    one, other = (load_run(ROOT / f"configs/{name}_160m.yaml").model_dump() for name in ("dense", "skip"))
    assert one["model"].pop("router") is None and other["model"].pop("router") is not None
    assert one["train"].pop("run_dir") != other["train"].pop("run_dir")  # from the file's name
    assert one == other


@pytest.mark.parametrize(
    ("name", "block"), (blocks_of(PretrainConfig) | blocks_of(TuneConfig) | blocks_of(TuneFile)).items()
)
def test_every_field_says_what_it_is(name: str, block: Any) -> None:
    for field, info in block.model_fields.items():
        assert info.description and info.description.rstrip().endswith("."), f"{name}.{field}"


def test_every_field_is_read() -> None:
    assert unread(PretrainConfig, _sources()) == []
    # Of stage two some fields are read before the config is resolved, the others after.
    assert set(unread(TuneConfig, _sources())) & set(unread(TuneFile, _sources())) == set()


PLANTED = """
from __future__ import annotations
from pydantic import BaseModel, model_validator

class Inner(BaseModel):
    kind: str = "a"
    size: int = 0
    by_method: int = 0
    by_idle_method: int = 0
    by_validator: int = 0
    written_only: int = 0
    in_list: int = 0
    in_zip: int = 0
    by_alias: int = 0
    of_self: int = 0

    def used(self) -> int:
        return self.by_method

    def idle(self) -> int:
        return self.by_idle_method

    @model_validator(mode="after")
    def check(self) -> Inner:
        assert self.by_validator == 0
        return self

class Other(BaseModel):
    kind: str = "b"

class Run(BaseModel):
    inner: Inner = Inner()
    other: Other | None = None
    several: list[Inner] = []

class User:
    def __init__(self, run: Run):
        self.kept = run.inner

    def go(self) -> int:
        return self.kept.of_self

def use(config: Run, anything) -> object:
    here, _ = config.inner, 1
    for one, _ in zip(config.several, range(3)):
        print(one.in_zip)
    print([each.in_list for each in config.several if each])
    here.written_only = 3
    print(config.other.kind, anything.size, "size", here.by_alias, here.used())
"""


def test_the_detector_finds_what_is_dead_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Other.kind`` does not keep ``Inner.kind`` alive, nor does ``anything.size`` keep ``Inner.size``."""
    path = tmp_path / "planted.py"
    path.write_text(PLANTED)
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planted", module)
    spec.loader.exec_module(module)
    dead = ["kind", "size", "by_idle_method", "by_validator", "written_only"]
    assert unread(module.Run, [path]) == [f"Inner.{field}" for field in dead]


def test_a_field_added_to_a_real_block_without_a_reader_is_found() -> None:
    """One that shares its name with a live field of another block."""

    class MoreTrain(TrainConfig):
        density: float = 0.5

    class MoreRun(PretrainConfig):
        train: MoreTrain

    assert unread(MoreRun, _sources()) == ["MoreTrain.density"]
