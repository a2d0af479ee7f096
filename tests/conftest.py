"""Fixtures that several folders share: a tiny prepared corpus and a tiny run's config."""

from __future__ import annotations

import atexit
import copy
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.config import DataConfig
from data.prepare.run import prepare
from data.tokenizer import train_tokenizer
from tests import launching, ranks
from tests.once import once
from tests.trainer.checkpoints.saved_runs import CASES, SHUFFLED, save_runs

VOCAB = 400
# Nothing of the user's is read or written, and two processes do not write the same file of an export's code.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
if "ATEN_CPU_CAPABILITY" in os.environ:  # its cache mixes up kernels of several instruction sets
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/inductor-{os.environ['ATEN_CPU_CAPABILITY']}"
    )
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # on a GPU machine, too: only tests marked gpu use it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts processes or builds engines; skip, with a reason, what this machine cannot or should not run."""
    import torch

    chosen = config.getoption("-m")
    for item in items:
        if _starts_processes(item):
            item.add_marker("processes")
        if "world" in getattr(item, "fixturenames", ()):
            item.add_marker("engines")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))
    if "PYTEST_XDIST_WORKER" in os.environ:  # the long files first, so that the workers end at the same time
        items.sort(key=lambda item: "processes" not in item.keywords)


def _starts_processes(item: pytest.Item) -> bool:
    """Whether its file knows how to, or one of its fixtures does."""
    starters = (
        launching.run,
        launching.run_command,
        launching.start,
        ranks.Processes,
        ranks.Ranks,
        save_runs,
        subprocess,
    )
    names = vars(item.module).values() if isinstance(item, pytest.Function) else ()
    return any(name is starter for name in names for starter in starters) or bool(
        {"two_rank_runs", "base_run"} & set(getattr(item, "fixturenames", ()))
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ``data`` block of a prepared corpus: a few files of the standard library, 400 pieces, windows of 32."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    block: dict[str, Any] = {
        "sequence_tokens": 32,
        "tokenizer": {"vocab_size": VOCAB, "train_bytes": 100_000},
        "sources": [{"name": "code", "format": "text", "files": [str(stdlib / n) for n in ("argparse.py", "ast.py")]}],
        "validation": [{"name": "code", "format": "text", "files": [str(stdlib / "bisect.py")]}],
    }

    def make(folder: Path) -> None:
        config = DataConfig.model_validate(block | {"dir": str(folder)})
        train_tokenizer(config)
        prepare(config, workers=1)

    return block | {"dir": str(once(tmp_path_factory, "corpus", make))}


@pytest.fixture(scope="session")
def two_rank_runs(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    """What two ranks trained and saved at every ZeRO stage: see tests/trainer/checkpoints/saved_runs.py."""
    cases = {**CASES, "shuffled": [*CASES["bf16-2"], SHUFFLED]}
    return once(tmp_path_factory, "two-rank-runs", lambda folder: save_runs(folder, corpus, cases, ranks=2)) / "out"


@pytest.fixture
def tiny(tmp_path: Path, corpus: dict[str, Any]) -> dict[str, Any]:
    """A run's config as a dictionary: 3 routed layers, 8 windows a step, 4 steps, everything logged but pictures."""
    return {
        "model": {
            "vocab_size": VOCAB,
            "layers": 3,
            "width": 32,
            "heads": 2,
            "kv_heads": 1,
            "ffn_width": 48,
            "max_positions": 128,
            "router": {"density": 0.5},
        },
        "data": copy.deepcopy(corpus),
        "train": {
            "run_dir": str(tmp_path / "run"),
            "steps": 4,
            "global_batch_samples": 8,
            "micro_batch_samples": 2,
            "precision": "fp32",
            "optimizer": {"lr": 0.003},
            "evaluation": {"every_steps": 2, "samples": 5},
            "checkpoint": {"every_steps": 2},
            "log": {"every_steps": 1, "peak_tflops": 1.0, "images": False},
        },
        "deepspeed": {"zero_stage": 2, "persistence_threshold": 0},
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Write a config dictionary to a YAML file and return its path."""

    def write(config: dict[str, Any], name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write
