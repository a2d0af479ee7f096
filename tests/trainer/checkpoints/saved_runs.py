"""Run folders with one checkpoint each, of every ZeRO stage and both precisions, and what the engines held.

``python -m tests.trainer.checkpoints.saved_runs CONFIG CASES OUT`` is what the ranks run: train, save, and write down
the engines' weights; one start for all cases.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel
from torch import Tensor

from settings import load
from tests.launching import run
from tests.trainer.one_rank import save_now, take_steps
from trainer.checkpoints.manifest import entry_of
from trainer.config import PretrainConfig
from trainer.distributed import World, join, leave
from trainer.engine import build_engine

Config = TypeVar("Config", bound=BaseModel)

STAGES = (0, 1, 2, 3)
STEPS = 2
TIED = ["train.precision=bf16", "model.tied_head=true", "model.router.granularity=module"]
CASES = {f"fp32-{stage}": [f"deepspeed.zero_stage={stage}"] for stage in STAGES} | {
    f"bf16-{stage}": [f"deepspeed.zero_stage={stage}", *TIED] for stage in STAGES
}
SHUFFLED = "deepspeed.extra={zero_optimization: {round_robin_gradients: true}}"


def save_runs(
    folder: Path,
    data: dict[str, Any],
    cases: dict[str, list[str]],
    ranks: int,
    module: str = "tests.trainer.checkpoints.saved_runs",
) -> Path:
    """A folder below ``folder`` with what ``module`` makes of each case; odd sizes: two partitions need padding."""
    config = {
        "model": {
            "vocab_size": 400, "layers": 2, "width": 33, "heads": 2, "kv_heads": 1, "head_width": 6, "ffn_width": 21,
            "router": {"density": 0.5},
        },
        "data": data,
        "train": {
            "steps": 4, "global_batch_samples": 4, "micro_batch_samples": 1, "precision": "fp32",
            "optimizer": {"lr": 0.003}, "evaluation": {"samples": 5},
        },
        "deepspeed": {"persistence_threshold": 0},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(folder / name) for name in ("run.yaml", "cases.json", "out")]
    done = run(module, *arguments, processes=ranks)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder / "out"


def rehash(saved: Path, name: str) -> None:
    """Make the manifest agree with a changed file."""
    parsed = json.loads((saved / "manifest.json").read_text())
    parsed["files"][name] = entry_of(saved / name)
    (saved / "manifest.json").write_text(json.dumps(parsed))


def masters_of(engine: Any, config: PretrainConfig) -> dict[str, Tensor]:
    """The engine's own fp32 weights, whole, by name; collective."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    if config.deepspeed.zero_stage == 0 and config.train.precision == "fp32":
        return {name: p.detach().clone() for name, p in named.items()}
    if config.deepspeed.zero_stage == 0:
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        master = {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}
        return {name: master[p].detach().clone() for name, p in named.items()}
    found = {name: deepspeed.utils.safe_get_full_fp32_param(p) for name, p in named.items()}
    return {name: whole.reshape(getattr(named[name], "ds_shape", named[name].shape)) for name, whole in found.items()}


def _train_and_save(config: PretrainConfig, folder: Path, world: World) -> None:
    engine = build_engine(config, world)
    take_steps(engine, config, world, STEPS)
    if world.is_main:
        (folder / "checkpoints").mkdir(parents=True)
    world.barrier()
    save_now(engine, folder / "checkpoints", STEPS, {"step": STEPS}, "f" * 64, config, world)
    masters = masters_of(engine, config)
    if world.is_main:
        torch.save(masters, folder / "masters.pt")
    engine.destroy()


def save_cases(schema: type[Config], save: Callable[[Config, Path, World], None]) -> None:
    """What the ranks run: ``save`` each case's config into a folder of its name."""
    parser = argparse.ArgumentParser()
    for name in ("config", "cases", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--local_rank")
    arguments = parser.parse_args()
    world = join(60.0)
    for name, overrides in json.loads(arguments.cases.read_text()).items():
        save(load(arguments.config, overrides, schema), arguments.out / name, world)
    leave()


if __name__ == "__main__":
    save_cases(PretrainConfig, _train_and_save)
