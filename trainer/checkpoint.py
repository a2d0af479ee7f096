"""Checkpoints that are whole or not there.

    checkpoints/step-00001000/
      deepspeed/            the engine's own files: weights, optimiser state, per rank under ZeRO
      trainer.pt            step, samples consumed, budget prices, counts
      rng-00000.pt          random-number generators of rank 0, and so on
      config.yaml           the run's config
      manifest.json         written last: size and SHA-256 of every file, world size, ZeRO stage, data fingerprint

DeepSpeed writes in place and names a checkpoint ``latest`` before every rank has finished, so a kill leaves a torn
one that looks whole. Here everything goes to ``step-N.partial``; when all ranks are done and the hashes are taken the
manifest is written and the folder renamed. Resume takes the newest folder whose files match its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from data.files import write_json
from settings import to_yaml
from trainer.config import CheckpointConfig, RunConfig
from trainer.distributed import World

FORMAT = 1
_MANIFEST = "manifest.json"


def save(
    engine: Any, folder: Path, step: int, state: dict[str, Any], fingerprint: str, config: RunConfig, world: World
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
    _check_space(engine, folder, name, world)
    if world.is_main:
        for stale in folder.glob("*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    world.barrier()
    try:
        engine.save_checkpoint(str(partial), tag="deepspeed", save_latest=False)
        torch.save(_rng_state(), partial / f"rng-{world.rank:05d}.pt")
        if world.is_main:
            torch.save(state, partial / "trainer.pt")
            (partial / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        world.barrier()
        hashes = _hash_share(partial, sorted(_files_in(partial)), world)
        if world.is_main:
            manifest = {
                "format": FORMAT,
                "step": step,
                "world_size": world.size,
                "zero_stage": config.deepspeed.zero_stage,
                "precision": config.train.precision,
                "data_fingerprint": fingerprint,
                "files": hashes,
            }
            write_json(partial / _MANIFEST, manifest)
            if final.exists():  # a run that was rewound and came here again
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint {name} could not be written to {folder} ({reason}); make room there and resume: "
            f"{newest_name(folder)}"
        ) from error
    world.barrier()
    return final


def prune(folder: Path, config: CheckpointConfig, world: World) -> None:
    """Remove checkpoints beyond the newest ``keep``, sparing multiples of ``keep_every_steps`` (rank 0 does)."""
    if not world.is_main:
        return
    for old in _newest_first(folder)[config.keep :]:
        if config.keep_every_steps and _step_of(old) % config.keep_every_steps == 0:
            continue
        # Renamed first: a kill during the removal leaves a name that nobody takes for a checkpoint.
        doomed = old.with_name(old.name + ".partial")
        old.rename(doomed)
        shutil.rmtree(doomed)


def find(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and a sentence for each torn one that was passed over; collective.

    Every file's size and SHA-256 is compared with the manifest; the files are shared out over the ranks.
    """
    torn = [f"{p.name} was never finished" for p in sorted(folder.glob("*.partial"))] if world.is_main else []
    candidates = world.broadcast_object(_newest_first(folder) if world.is_main else None)
    torn = world.broadcast_object(torn)
    for candidate in candidates:
        problem = _problem(candidate, world)
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
    there = world.broadcast_object(sorted(p.name for p in folder.glob("step-*")) if world.is_main else None)
    if resume == "never":
        if there:
            raise ValueError(
                f"{folder} already holds {there[-1]}; set train.checkpoint.resume=auto to go on with that run, or "
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


def load(engine: Any, checkpoint: Path, fingerprint: str, config: RunConfig, world: World) -> dict[str, Any]:
    """Put everything back and return the trainer's ``state``; collective.

    Raises:
        ValueError: if the run's config, data or number of ranks do not fit the checkpoint.
    """
    _check_fit(json.loads((checkpoint / _MANIFEST).read_text()), checkpoint, fingerprint, config, world)
    with _only_tensors():
        path, _ = engine.load_checkpoint(str(checkpoint), tag="deepspeed")
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        rng = torch.load(checkpoint / f"rng-{world.rank:05d}.pt", map_location="cpu", weights_only=True)
    if path is None:
        raise ValueError(f"DeepSpeed found nothing to load in {checkpoint}; the checkpoint is not one of this project")
    _set_rng_state(rng)
    return state


def _check_fit(manifest: dict[str, Any], checkpoint: Path, fingerprint: str, config: RunConfig, world: World) -> None:
    here = {
        "world_size": world.size,
        "zero_stage": config.deepspeed.zero_stage,
        "precision": config.train.precision,
    }
    differ = [f"{name} {manifest[name]} there, {value} here" for name, value in here.items() if manifest[name] != value]
    if differ:
        raise ValueError(
            f"{checkpoint} was written under other conditions ({'; '.join(differ)}); resume it with the same number of "
            "ranks, ZeRO stage and precision"
        )
    if manifest["data_fingerprint"] != fingerprint:
        raise ValueError(
            f"{checkpoint} was trained on other data or another order (its data fingerprint is "
            f"{manifest['data_fingerprint'][:12]}, this config's is {fingerprint[:12]}); resume with the same shards, "
            "data.seed, sequence_tokens and weights, or start a new run_dir"
        )
    written = yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]
    sizes = config.model.model_dump(mode="json")
    changed = [
        f"model.{key} {written.get(key)} there, {value} here"
        for key, value in sizes.items()
        if key != "router" and written.get(key) != value
    ]
    sites = (written["router"] or {}).get("granularity"), (sizes["router"] or {}).get("granularity")
    if sites[0] != sites[1]:
        changed.append(f"router granularity {sites[0]} there, {sites[1]} here")
    if changed:
        raise ValueError(f"{checkpoint} holds another model ({'; '.join(changed)}); resume with the same model block")


def _check_space(engine: Any, folder: Path, name: str, world: World) -> None:
    """Refuse, before anything is written, a save that the disk has no room for; all ranks agree."""
    shortage = None
    if world.is_main:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        weight_bytes = next(engine.module.parameters()).element_size()
        needed = parameters * (weight_bytes + 12)  # fp32 master and two moments
        free = shutil.disk_usage(folder).free
        if free < needed:
            shortage = (
                f"checkpoint {name} needs about {needed / 1e9:.3f} GB in {folder}, where {free / 1e9:.3f} GB are "
                f"free; make room there and resume: {newest_name(folder)}"
            )
    shortage = world.broadcast_object(shortage)
    if shortage:
        raise ValueError(shortage)


def newest_name(folder: Path) -> str:
    """Which checkpoint a run could go on from, as half a sentence."""
    names = [p.name for p in _newest_first(folder)]
    return f"{names[0]} is whole" if names else "no earlier checkpoint was written"


def _problem(checkpoint: Path, world: World) -> str | None:
    """Why a checkpoint cannot be trusted, or None; the same answer on every rank."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError) as error:
        return f"its {_MANIFEST} cannot be read ({error})"
    own = None
    for name in sorted(files)[world.rank :: world.size]:
        path = checkpoint / name
        if not path.is_file():
            own = f"{name} is missing"
        elif path.stat().st_size != files[name]["bytes"]:
            own = f"{name} has {path.stat().st_size} bytes instead of {files[name]['bytes']}"
        elif _sha256(path) != files[name]["sha256"]:
            own = f"the contents of {name} do not match its SHA-256"
        if own:
            break
    return next((problem for problem in world.gather_objects(own) if problem), None)


def _hash_share(folder: Path, names: list[str], world: World) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, each rank doing its share and flushing it to disk."""
    own = {}
    for name in names[world.rank :: world.size]:
        path = folder / name
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        own[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return {name: entry for part in world.gather_objects(own) for name, entry in part.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_in(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]


def _newest_first(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _only_tensors() -> Any:
    """Let ``torch.load`` build tensors, plain containers and four DeepSpeed types, and nothing else.

    DeepSpeed itself asks for unrestricted unpickling, which would run whatever code a checkpoint holds.
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
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _rng_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # a tuple: the legacy form
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
