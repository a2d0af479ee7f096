"""Small corpora and prepared folders for the data tests."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.prepare.run import prepare
from data.tokenizer import train_tokenizer

LINE = "the quick brown fox jumps over a lazy dog while seven wizards quietly count 1234 stars in winter"


def document(rng: random.Random, words: int) -> str:
    """A few lines of random words."""
    pieces = LINE.split()
    return "".join(rng.choice(pieces) + rng.choice([" ", " ", " ", ", ", ".\n"]) for _ in range(words))


def documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [document(rng, rng.randint(1, longest)) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config_of(folder: Path, **changes: Any) -> DataConfig:
    """A config over ``folder/raw.jsonl`` with small everything; keyword arguments replace fields."""
    fields: dict[str, Any] = {
        "dir": str(folder / "data"),
        "sequence_tokens": 16,
        "shard_tokens": 1000,
        "sources": [{"name": "main", "files": [str(folder / "raw.jsonl")]}],
        "tokenizer": {"vocab_size": 320, "train_bytes": 20_000},
    }
    return DataConfig.model_validate(fields | changes)


def prepared(folder: Path, texts: list[str] | None = None, **changes: Any) -> DataConfig:
    """Write a corpus, train a tokenizer, prepare, and return the config."""
    write_jsonl(folder / "raw.jsonl", documents(200) if texts is None else texts)
    config = config_of(folder, **changes)
    train_tokenizer(config)
    prepare(config, workers=1)
    return config


class Renames:
    """``os.replace`` until the rename number ``stop_after``, in place of which the command is interrupted."""

    def __init__(self, stop_after: int) -> None:
        self._left, self._rename = stop_after, os.replace

    def __call__(self, old: Path, new: Path) -> None:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        self._rename(old, new)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
