"""Checkpoints that are whole or not there.

    checkpoints/step-00001000/
      deepspeed/            the engine's own files: weights, optimiser state, per rank under ZeRO
      trainer.pt            step, samples consumed, budget prices
      rng-00000.pt          random-number generators of rank 0, and so on
      config.yaml           the run's config
      manifest.json         written last: size and SHA-256 of every file, world size, ZeRO stage, data fingerprint

DeepSpeed writes in place and names a checkpoint ``latest`` before every rank has finished, so a kill leaves a torn
one that looks whole. Here everything goes to ``step-N.partial``; when all ranks are done and the hashes are taken the
manifest is written and the folder renamed. Resume takes the newest folder whose files match its manifest.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from settings import to_yaml
from trainer import manifest
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.retention import check_room, newest_first, newest_name, remove
from trainer.rng import rng_state, set_rng_state


def save(
    engine: Any, folder: Path, step: int, state: dict[str, Any], fingerprint: str, config: StageConfig, world: World
) -> Path:
    """Save step ``step`` below ``folder``; collective.

    Args:
        engine: the DeepSpeed engine, at an accumulation boundary.
        folder: the run's ``checkpoints``.
        step: optimiser steps done.
        state: what the trainer must get back, the same on every rank; tensors, numbers, strings, lists and dicts.
        fingerprint: of the data and its order.

    Raises:
        ValueError: if it does not fit on the disk or cannot be written; older checkpoints are untouched.
    """
    name = f"step-{step:08d}"
    partial, final = folder / f"{name}.partial", folder / name
    if world.is_main:
        for stale in (*folder.glob("*.partial"), *folder.glob("*.removed")):
            shutil.rmtree(stale)  # before the check: what a full disk left behind takes room, too
    check_room(engine, folder, name, config.train.checkpoint.max_gb, world)
    if world.is_main:
        partial.mkdir(parents=True)
    world.barrier()
    try:
        engine.save_checkpoint(str(partial), tag="deepspeed", save_latest=False)
        torch.save(rng_state(), partial / _rng_name(world.rank))
        if world.is_main:
            torch.save(state, partial / "trainer.pt")
            (partial / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        world.barrier()
        facts = {"step": step, **_conditions(config, world), "data_fingerprint": fingerprint}
        expected = ["config.yaml", "trainer.pt", *(_rng_name(rank) for rank in range(world.size))]
        manifest.write(partial, facts, expected, world)
        if world.is_main:
            if final.exists():  # a torn one, or a run that was rewound and came here again
                remove(final)
            partial.rename(final)
            os.sync()
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("write|iostream|inline_container", str(error)):
            raise  # that is what torch's file writer says of a full disk; anything else is no matter of the disk
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"checkpoint {name} could not be written to {folder} ({reason}); make room there and resume: "
            f"{newest_name(folder)}"
        ) from error
    world.barrier()
    return final


def find(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and a sentence for each torn one that was passed over; collective.

    Every file's size and SHA-256 is compared with the manifest; the files are shared out over the ranks.
    """
    torn = [f"{p.name} was never finished" for p in sorted(folder.glob("*.partial"))] if world.is_main else []
    candidates = world.broadcast_object(newest_first(folder) if world.is_main else None)
    torn = world.broadcast_object(torn)
    for candidate in candidates:
        problem = manifest.problem_of(candidate, world)
        if problem is None:
            return candidate, torn
        torn.append(f"{candidate.name} is torn: {problem}")
    return None, torn


def to_resume(folder: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to start from, or None for a fresh start; torn ones are told and passed over; collective.

    Args:
        folder: the run's ``checkpoints``.
        resume: ``never``, ``auto`` or ``required``, as in the config.

    Raises:
        ValueError: where a silent start from step 0 would throw away or overwrite work.
    """
    there = world.broadcast_object([p.name for p in newest_first(folder)] if world.is_main else None)
    if resume == "never":
        if there:
            raise ValueError(
                f"{folder} already holds {there[0]}; set train.checkpoint.resume=auto to go on with that run, or "
                "give another train.run_dir"
            )
        return None
    found, torn = find(folder, world)
    if world.is_main:
        for sentence in torn:
            print(f"passed over: {sentence}", flush=True)
    if found is None and (there or resume == "required"):
        problem = f"none of {', '.join(there)} is whole" if there else "there is no checkpoint"
        raise ValueError(
            f"cannot resume from {folder}: {problem}; check train.run_dir, or remove that folder and start afresh "
            "with train.checkpoint.resume=never"
        )
    return found


def load(engine: Any, checkpoint: Path, fingerprint: str, config: StageConfig, world: World) -> dict[str, Any]:
    """Put everything back and return the trainer's ``state``; collective.

    Raises:
        ValueError: if the run's config, data or number of ranks do not fit the checkpoint.
    """
    _check_fit(manifest.read(checkpoint, world), checkpoint, fingerprint, config, world)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    with only_tensors(checkpoint):
        path, _ = engine.load_checkpoint(str(checkpoint), tag="deepspeed")
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        rng = torch.load(checkpoint / _rng_name(world.rank), map_location="cpu", weights_only=True)
    if path is None:
        raise ValueError(f"DeepSpeed found nothing to load in {checkpoint}; the checkpoint is not one of this project")
    # With an optimiser's state come the checkpoint's rates and decays; this run's are those of its config.
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    set_rng_state(rng)
    return state


def _conditions(config: StageConfig, world: World) -> dict[str, Any]:
    """What must be the same for an exact resume, besides the data and the model."""
    return {
        "world_size": world.size,
        "zero_stage": config.deepspeed.zero_stage,
        "precision": config.train.precision,
        "optimizer": config.train.optimizer.kind,
        "seed": config.train.seed,
    }


def _check_fit(written: dict[str, Any], checkpoint: Path, fingerprint: str, config: StageConfig, world: World) -> None:
    here = _conditions(config, world)
    differ = [f"{name} {written[name]} there, {value} here" for name, value in here.items() if written[name] != value]
    if differ:
        raise ValueError(
            f"{checkpoint} was written under other conditions ({'; '.join(differ)}); resume it with the same number of "
            "ranks, ZeRO stage, precision, optimizer and seed"
        )
    there = written["data_fingerprint"]
    if there != fingerprint and there[:12] != config.train.checkpoint.accept_data:
        raise ValueError(
            f"{checkpoint} was trained on other data or another order (its data fingerprint is {there[:12]}, this "
            f"config's is {fingerprint[:12]}); resume with the same shards, data.seed, sequence_tokens and weights, "
            f"start a new run_dir, or set train.checkpoint.accept_data={there[:12]} to go on with the other data"
        )
    blocks = yaml.safe_load((checkpoint / "config.yaml").read_text())
    model = blocks["model"]
    sizes = config.model.model_dump(mode="json")
    changed = [
        f"model.{key} {model.get(key)} there, {value} here"
        for key, value in sizes.items()
        if key != "router" and model.get(key) != value
    ]
    routers = model["router"] or {}, sizes["router"] or {}
    for key in ("granularity", "kind", "input", "always_on_first", "always_on_last"):
        then, now = (router.get(key) for router in routers)
        if then != now:
            changed.append(f"router {key} {then} there, {now} here")
    for name, value in config.structure().items():
        block, _, field = name.partition(".")
        there = (blocks.get(block) or {}).get(field)
        if there != value:
            changed.append(f"{name} {there} there, {value} here")
    if changed:
        raise ValueError(
            f"{checkpoint} holds another model ({'; '.join(changed)}); resume with the blocks that the run was started "
            "with, or start a new run_dir"
        )


def _rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


@contextmanager
def only_tensors(checkpoint: Path) -> Iterator[None]:
    """Let ``torch.load`` build tensors, plain containers and four DeepSpeed types, and nothing else.

    DeepSpeed itself asks for unrestricted unpickling, which would run whatever code a checkpoint holds.

    Raises:
        ValueError: for anything else in ``checkpoint``.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{checkpoint} holds more than tensors and numbers ({what[1] if what else 'an unknown object'}), which "
            "could run code when read; it was not written by this project or was changed since, so do not use it"
        ) from error
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
