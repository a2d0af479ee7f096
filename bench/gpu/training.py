"""A short real run with ZeRO 1 and with ZeRO 3, each stopped half-way and resumed, against an unbroken one on the CPU.

    python -m bench.gpu.training --device cuda --json training.json

All three have the same seed, data and sizes, in fp32, so that their losses must agree: the device's with the CPU's,
ZeRO 3's with ZeRO 1's, and both, also after resuming, with the unbroken run. The text is Python's own source code.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.common.options import parser
from data.files import write_json
from settings import path_argument, to_yaml, user_errors
from trainer.config import PretrainConfig
from trainer.device import find_device
from trainer.local_ranks import environment_alone
from trainer.monitor import metrics_file

SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "model": {"layers": 8, "width": 256, "heads": 4, "kv_heads": 2, "ffn_width": 768},
        "sequence_tokens": 256,
        "files": ["{stdlib}/[a-d]*.py", "{stdlib}/[t-z]*.py"],
        "samples": 16,
        "steps": 20,
    },
    "cpu": {
        "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn_width": 48},
        "sequence_tokens": 32,
        "files": ["{stdlib}/argparse.py"],
        "samples": 4,
        "steps": 6,
    },
}
"""By device."""
VOCAB = 1024
REFERENCE = "cpu"
STAGES = {"zero-1": 1, "zero-3": 3}
ALLOWED_NATS = {"device": 3e-3, "stage": 1e-3}
"""Largest difference of a step's loss: from summation order, and the few router decisions that depend on it."""


def config(device: str, folder: Path) -> PretrainConfig:
    """Config of all three runs, with their data in ``folder``."""
    sizes = SIZES[device]
    steps: int = sizes["steps"]
    router = {"density": 0.5, "explore": 0.1, "budget": {"controller": "adaptive"}}
    positions = {"vocab_size": VOCAB, "max_positions": sizes["sequence_tokens"]}
    return PretrainConfig.model_validate(
        {
            "model": {**sizes["model"], **positions, "router": router},
            "data": {
                "dir": str(folder / "data"),
                "sequence_tokens": sizes["sequence_tokens"],
                "tokenizer": {"vocab_size": VOCAB, "train_bytes": 200_000},
                "sources": [{"name": "python", "format": "text", "files": sizes["files"]}],
                "validation": [{"name": "python", "format": "text", "files": ["{stdlib}/heapq.py"]}],
            },
            "train": {
                "steps": steps,
                "global_batch_samples": sizes["samples"],
                "micro_batch_samples": sizes["samples"] // 2,
                "precision": "fp32",
                "optimizer": {"lr": 2e-3},
                "evaluation": {"every_steps": steps, "samples": 8},
                "checkpoint": {"every_steps": steps, "resume": "auto"},
                "log": {"every_steps": 1, "peak_tflops": 1.0, "images": False},
            },
        }
    )


def prepare(config: PretrainConfig) -> None:
    """Train the tokenizer and write the shards."""
    from data.prepare.run import prepare
    from data.tokenizer import train_tokenizer

    train_tokenizer(config.data)
    prepare(config.data, workers=1)


def train(name: str, config_path: Path, device: str, *overrides: str) -> None:
    """Start the run ``name`` and wait for its end.

    Raises:
        ValueError: if it failed; its last lines have been printed.
    """
    run_dir = config_path.parent / name
    stage = STAGES.get(name, 1)
    words = [f"train.run_dir={run_dir}", f"deepspeed.zero_stage={stage}", *overrides]
    command = [sys.executable, "-m", "pretrain.train", str(config_path), *words]
    log = run_dir.with_suffix(".log")
    print(f"{name}: {' '.join(words)}", flush=True)
    with log.open("ab") as file:
        own = environment(name, device)
        done = subprocess.run(command, env=own, stdout=file, stderr=subprocess.STDOUT, check=False)
    last = log.read_text(errors="replace").splitlines()[-15:]
    print("\n".join(f"{name}: {line}" for line in last), flush=True)
    if done.returncode:
        raise ValueError(f"the run {name} ended with status {done.returncode}")


def environment(name: str, device: str) -> dict[str, str]:
    """Environment of a run: the reference has all cores but two, and no GPU."""
    if name != REFERENCE and device == "cuda":
        return environment_alone(1)
    threads = max((os.cpu_count() or 1) - 2, 1)
    return environment_alone(threads) | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def measure(device: str) -> dict[str, Any]:
    """Prepare, train, compare.

    Raises:
        ValueError: if a run failed or did not learn.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path, asked = folder / "run.yaml", config(device, folder)
        path.write_text(to_yaml(asked), encoding="utf-8")
        prepare(asked)
        half = asked.train.steps // 2
        with ThreadPoolExecutor() as pool:
            reference = pool.submit(train, REFERENCE, path, device)
            list(pool.map(lambda name: train(name, path, device, f"train.stop_at_step={half}"), STAGES))
            list(pool.map(lambda name: train(name, path, device, "train.checkpoint.resume=required"), STAGES))
            reference.result()
        lines = {name: metrics_file.read(folder / name / metrics_file.NAME) for name in (REFERENCE, *STAGES)}
    return compare({name: by_step(read, asked.train.steps) for name, read in lines.items()}, half)


def by_step(lines: Sequence[Mapping[str, Any]], steps: int) -> list[float]:
    """Training loss of every step of a run.

    Raises:
        ValueError: if one is missing or not finite, or the run has not learned.
    """
    found = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    losses = [found.get(step, math.nan) for step in range(1, steps + 1)]
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise ValueError(f"every step must have a finite loss, and the last a lower one than the first; got {losses}")
    return losses


def compare(losses: Mapping[str, Sequence[float]], half: int) -> dict[str, Any]:
    """Key figures, and a row for each pair of runs and half."""
    rows = []
    for name, other, allowed in (
        ("zero-1", REFERENCE, ALLOWED_NATS["device"]),
        ("zero-3", REFERENCE, ALLOWED_NATS["device"]),
        ("zero-3", "zero-1", ALLOWED_NATS["stage"]),
    ):
        apart = [abs(a - b) for a, b in zip(losses[name], losses[other], strict=True)]
        rows.append(
            {
                "run": name,
                "compared with": other,
                "first loss": losses[name][0],
                "last loss": losses[name][-1],
                "apart before resume": max(apart[:half]),
                "apart after": max(apart[half:]),
                "allowed, nats": allowed,
            }
        )
    to_device, to_stage = max(map(_apart, rows[:2])), _apart(rows[2])
    return {"key": f"losses apart: ZeRO 3 to ZeRO 1 {to_stage:.1e} nats, both to the CPU {to_device:.1e}", "rows": rows}


def _apart(row: Mapping[str, Any]) -> float:
    """Largest difference in a row."""
    return max(row["apart before resume"], row["apart after"])


def require(rows: Sequence[Mapping[str, Any]]) -> None:
    """Pass only if all pairs of runs agree.

    Raises:
        ValueError: naming those that do not.
    """
    wrong = [
        f"{row['run']} is {_apart(row):.2e} nats from {row['compared with']} (at most {row['allowed, nats']:g})"
        for row in rows
        if _apart(row) > row["allowed, nats"]
    ]
    if wrong:
        raise ValueError(f"losses must agree at every step: {'; '.join(wrong)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write, judge."""
    with user_errors():
        options = parse(arguments)
        found = measure(find_device(options.device).partition(":")[0])
        print(found["key"])
        if options.json is not None:
            write_json(options.json, found)
        require(found["rows"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    options_parser = parser("bench.gpu.training", __doc__)
    options_parser.add_argument("--device", help="cpu (tiny sizes) or cuda (default: cuda if there is one)")
    options_parser.add_argument("--json", type=path_argument, help="write the comparison to this file")
    return options_parser.parse_args(arguments)


if __name__ == "__main__":
    main()
