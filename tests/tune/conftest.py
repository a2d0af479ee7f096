"""A trained stage-one run, examples, and a stage-two config to go on from it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import VOCAB
from tests.launching import run
from tests.once import once

WORDS = ["for", "while", "import", "class", "return", "raise", "yield", "assert", "lambda", "global"]
CHOICES = [" even", " odd"]


@pytest.fixture(scope="session")
def base_run(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> str:
    """Run folder of a tiny skip-routed decoder after four steps on two ranks."""
    config: dict[str, Any] = {
        "model": {
            "vocab_size": VOCAB, "layers": 4, "width": 32, "heads": 2, "kv_heads": 1, "ffn_width": 48,
            "max_positions": 128, "router": {"density": 0.5},
        },
        "data": copy.deepcopy(corpus),
        "train": {
            "steps": 4, "global_batch_samples": 8, "micro_batch_samples": 4,
            "precision": "fp32", "optimizer": {"lr": 0.003}, "log": {"peak_tflops": 1.0, "images": False},
            "evaluation": {"every_steps": 4, "samples": 2},
        },
        "deepspeed": {"zero_stage": 2},
    }  # fmt: skip

    def make(folder: Path) -> None:
        config["train"]["run_dir"] = str(folder / "run")
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        done = run("pretrain.train", str(folder / "run.yaml"), processes=2)
        assert done.returncode == 0, done.stdout[-3000:]

    return str(once(tmp_path_factory, "base", make) / "run")


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.jsonl`` and ``held.jsonl``: is the number of words even or odd?"""
    folder = tmp_path_factory.mktemp("examples")
    for name, numbers in {"train": range(80), "held": range(80, 89)}.items():
        lines = []
        for number in numbers:
            words = [WORDS[(number * 7 + place * 3) % len(WORDS)] for place in range(1 + number % 5)]
            lines.append({"prompt": f"Words: {' '.join(words)}\nCount:", "response": CHOICES[len(words) % 2]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def tuning(base_run: str, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A stage-two config: LoRA and an ensemble of the last two layers, four steps; copy it before changing it."""
    held = {"name": "parity", "files": [str(examples / "held.jsonl")], "choices": CHOICES}
    return {
        "base": {"path": base_run},
        "ensemble": {"layers": 2, "final_weight": 0.8},
        "adapter": {"kind": "lora", "rank": 4},
        "data": {
            "sequence_tokens": 96,
            "sources": [{"name": "parity", "files": [str(examples / "train.jsonl")]}],
            "validation": [held],
            "test": [held],
        },
        "train": {
            "run_dir": str(tmp_path_factory.mktemp("tuned") / "run"), "steps": 4, "global_batch_samples": 4,
            "micro_batch_samples": 1, "precision": "fp32", "optimizer": {"lr": 0.01, "weight_decay": 0.0},
            "evaluation": {"every_steps": 2, "samples": 64}, "checkpoint": {"every_steps": 2, "keep": 9},
            "log": {"every_steps": 1, "peak_tflops": 1.0, "images": False},
        },
        "deepspeed": {"zero_stage": 2, "persistence_threshold": 0},
    }  # fmt: skip
