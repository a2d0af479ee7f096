"""Run by tests/tune/test_train.py under a launcher: several stage-two runs in one process, one after the other.

A start of two ranks costs ten seconds, so each takes many runs: a JSON list of lists of ``key.sub=value``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trainer.distributed import join, leave
from tune.resolve import load_file
from tune.train import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--local_rank")
    arguments = parser.parse_args()
    world = join(60.0)
    for overrides in json.loads(arguments.runs.read_text()):
        config = load_file(arguments.config, overrides)
        assert train(config, arguments.config, world.sharing_windows(config.deepspeed, 60.0)) == 0
    leave()


if __name__ == "__main__":
    main()
