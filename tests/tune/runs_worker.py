"""Run by tests/tune/test_train.py under a launcher: several stage-two runs in one process, one after the other.

A start of two ranks costs ten seconds, so each takes many runs: a JSON list of lists of ``key.sub=value``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trainer import trainer
from trainer.distributed import join, leave
from trainer.engine import build_engine
from tune.resolve import load_file
from tune.train import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--local_rank")
    arguments = parser.parse_args()
    world = join(60.0)
    engines: list[Any] = []

    def build(*given: Any) -> Any:
        engines.append(build_engine(*given))
        return engines[-1]

    trainer.build_engine = build  # type: ignore[attr-defined]
    for overrides in json.loads(arguments.runs.read_text()):
        assert train(load_file(arguments.config, overrides), arguments.config, world) == 0
        engines.pop().destroy()  # so that the next one finds no hooks of it
    leave()


if __name__ == "__main__":
    main()
