"""From nothing to a trained decoder: what ``make demo`` runs.

    python -m launch.demo configs/demo.yaml --processes 2

Tokenizer, shards, stage one under DeepSpeed: each step is the command that a user would type, printed before it runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from settings import user_errors
from trainer.config import load_run


def main() -> int:
    """Run the demo; the exit status is that of the first command that fails."""
    parser = argparse.ArgumentParser(prog="launch.demo", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--processes", type=int, default=2, help="ranks on this machine (at most one a GPU)")
    arguments = parser.parse_args()
    with user_errors():
        run_dir = Path(str(load_run(arguments.config).train.run_dir))
    processes = arguments.processes
    if torch.cuda.is_available():
        processes = min(processes, torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find out by itself, with warnings
    if run_dir.exists():
        # A demo starts afresh; every other command refuses to run over an earlier run.
        run_dir.rename(run_dir.with_name(f"{run_dir.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
    started = time.monotonic()
    for command in commands(str(arguments.config), processes):
        print(f"\n$ {shlex.join([Path(command[0]).name, *command[1:]])}", flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    print(f"\ndemo done in {time.monotonic() - started:.0f} s; look at it with: tensorboard --logdir {run_dir}")
    return 0


def commands(config: str, processes: int) -> list[list[str]]:
    """The demo's commands, in order."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [
        [sys.executable, "-m", "data.tokenizer", config],
        [sys.executable, "-m", "data.prepare", config],
        [deepspeed, "--num_gpus", str(processes), "--log_level", "error", "--module", "pretrain.train", config],
    ]


if __name__ == "__main__":
    raise SystemExit(main())
