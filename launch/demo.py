"""From nothing to a tuned decoder in Hugging Face's format: what ``make demo`` runs.

    python -m launch.demo configs/demo.yaml configs/tune_demo.yaml --processes 2

Tokenizer, shards, stage one and stage two under DeepSpeed, export, a sentence from the export: each step is the command
that a user would type, printed before it runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from settings import user_errors
from trainer.config import load_run
from trainer.start import deepspeed_launcher, free_port
from tune.resolve import load_file

EXPORT = Path("runs/demo-hf")


def main() -> int:
    """Run the demo; the exit status is that of the first command that fails."""
    parser = argparse.ArgumentParser(prog="launch.demo", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML of stage one")
    parser.add_argument("tune_config", type=Path, help="YAML of stage two")
    parser.add_argument("--processes", type=int, default=2, help="ranks on this machine (at most one a GPU)")
    arguments = parser.parse_args()
    with user_errors():
        import torch

        run_dirs = [
            Path(str(load_run(arguments.config).train.run_dir)),
            Path(str(load_file(arguments.tune_config).train.run_dir)),
            EXPORT,
        ]
    processes = arguments.processes
    if torch.cuda.is_available():
        processes = min(processes, torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find out by itself, with warnings
    for run_dir in run_dirs:
        if run_dir.exists():
            # A demo starts afresh; every other command refuses to run over an earlier run.
            earlier = run_dir.with_name(f"{run_dir.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
            run_dir.rename(earlier)
            print(f"{run_dir} of an earlier demo is now {earlier}; remove it when you like")
    started = time.monotonic()
    for command in commands(str(arguments.config), str(arguments.tune_config), processes, free_port()):
        print(f"\n$ {shlex.join([Path(command[0]).name, *command[1:]])}", flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    took_s = time.monotonic() - started
    logs = ",".join(f"{path.name}:{path}" for path in run_dirs[:2])
    print(
        f"\ndemo done in {took_s:.0f} s; the export is {EXPORT}; look at both runs with: "
        f".venv/bin/tensorboard --logdir_spec {logs}"
    )
    return 0


def commands(config: str, tune_config: str, processes: int, port: int) -> list[list[str]]:
    """The demo's commands, in order; the ranks meet at ``port``."""
    launcher = deepspeed_launcher(processes, port)
    return [
        [sys.executable, "-m", "data.tokenizer", config],
        [sys.executable, "-m", "data.prepare", config],
        [*launcher, "--module", "pretrain.train", config],
        [sys.executable, "-m", "launch.demo_examples", "runs/demo-data"],
        [*launcher, "--module", "tune.train", tune_config],
        [sys.executable, "-m", "convert.to_hf", str(load_file(tune_config).train.run_dir), str(EXPORT)],
        [sys.executable, "-m", "launch.demo_sentence", str(EXPORT)],
    ]


if __name__ == "__main__":
    raise SystemExit(main())
