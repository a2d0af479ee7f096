"""Resuming from a checkpoint: choose it, check that it fits, and restore everything.

Resume takes the newest folder whose files match its manifest (``manifest.py``). ``save.py`` writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.init import generator_of
from settings import flatten, peek
from trainer.checkpoints import manifest
from trainer.checkpoints.compatibility import conditions, differences, refuse_taken
from trainer.checkpoints.fetch import fetch, mirrored_names
from trainer.checkpoints.layout import CONFIG, ENGINE, STATE, newest_first, rng_name
from trainer.checkpoints.reshard import reshard
from trainer.checkpoints.rng import set_rng_state
from trainer.checkpoints.zero_files import only_tensors
from trainer.config import StageConfig
from trainer.distributed import World


def find_checkpoint(
    folder: Path, resume: str, world: World, mirror: str | None = None, metrics: Path | None = None
) -> Path | None:
    """The checkpoint to start from, or None for a fresh start; torn ones are reported and skipped; collective.

    Where ``folder`` has no whole one, the newest whole one of the mirror is copied there first.

    Args:
        folder: the run's ``checkpoints``.
        resume: ``never``, ``auto`` or ``required``, as in the config.
        world: this process among all ranks.
        mirror: URL of the run's mirror, if it has one.
        metrics: the run's file of metrics, which is copied from there too.

    Raises:
        ValueError: where a silent start from step 0 would throw away or overwrite work.
    """
    there = world.broadcast_object([p.name for p in newest_first(folder)] if world.is_main else None)
    away = mirrored_names(mirror, world) if mirror is not None and not there else []
    if away and resume == "never":
        refuse_taken(str(mirror), away, resume, "train.checkpoint.mirror")
    refuse_taken(folder, there or away, resume)
    if resume == "never":
        return None
    found, torn = manifest.newest_whole(folder, world)
    manifest.report_torn(torn, world)
    if found is None and mirror is not None:
        assert metrics is not None
        found = _fetched(mirror, away or mirrored_names(mirror, world), folder, metrics, world)
    if found is None and (there or away):
        where = f"{folder}, or {mirror}" if mirror else str(folder)
        names = ", ".join(dict.fromkeys([*there, *away]))
        raise ValueError(
            f"cannot resume from {where}: none of {names} is whole; check train.run_dir, or remove that folder and "
            "start from scratch with train.checkpoint.resume=never"
        )
    return found


def _fetched(mirror: str, names: list[str], folder: Path, metrics: Path, world: World) -> Path | None:
    """Copy the newest whole one of the mirror's checkpoints into ``folder``; None if none is whole."""
    for name in names:
        if world.is_main:
            print(f"{folder} has no whole checkpoint; copying {name} from {mirror}", flush=True)
        torn = fetch(mirror, name, folder, metrics, world)
        if torn is None:
            return folder / name
        manifest.report_torn([f"{name} of {mirror} is torn: {torn}"], world)
    return None


def origin_of(checkpoint: Path | None, world: World) -> str | None:
    """What the run of ``checkpoint`` started from, in words; None for randomly initialised weights; collective."""
    return None if checkpoint is None else manifest.read(checkpoint, world).get("init")


def load(
    engine: Any, checkpoint: Path, fingerprint: str | None, config: StageConfig, world: World
) -> tuple[dict[str, Any], str]:
    """Restore everything; return the trainer's ``state``, and how its layout differs here, in words; collective.

    ``fingerprint`` is that of the run's data; None for a fork, which may have other data.

    With the same number of ranks, ZeRO stage and precision the state is restored bit for bit. Otherwise weights and
    optimiser state are resharded, and the run continues to float tolerance; see ``reshard.py``.

    Raises:
        ValueError: if the run's config or data do not fit the checkpoint.
    """
    written = manifest.read(checkpoint, world)
    blocks = peek(checkpoint / CONFIG)
    change = _check_fit(written, blocks, checkpoint, fingerprint, config, world)
    with only_tensors(checkpoint):
        if change:
            reshard(engine, checkpoint / ENGINE, written, world)
        else:
            _load_as_it_is(engine, checkpoint)
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        rng = None
        if written["world_size"] == world.size:
            rng = torch.load(checkpoint / rng_name(world.rank), map_location="cpu", weights_only=True)
    if rng is None:  # there are none for these ranks: dropout goes on with others, the same at every such resume
        name = f"resume/{state['step']}/{world.rank}/{world.size}"
        torch.manual_seed(generator_of(config.train.seed, name).initial_seed())
    else:
        set_rng_state(rng)
    return state, ", ".join(filter(None, (change, _sharing_change(blocks, config))))


def changed_settings(checkpoint: Path, config: StageConfig) -> list[str]:
    """In words, the settings that have other values here than in the start that wrote ``checkpoint``."""
    before, now = (flatten(blocks) for blocks in (peek(checkpoint / CONFIG), config.model_dump(mode="json")))
    blocks = {name.rpartition(".")[0] for name in before}  # of one that only one of them has: it was null, or is new
    names = [name for name in now if name in before or name.rpartition(".")[0] not in blocks]
    names += [name for name in before if name not in now]
    return [
        f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in names
        if before.get(name) != now.get(name) and name != "train.checkpoint.resume"
    ]


def _sharing_change(blocks: dict[str, Any], config: StageConfig) -> str:
    """How the sharing of windows differs from a checkpoint's, in words; the layout of its state is the same."""
    there = (blocks["deepspeed"] or {}).get("sequence_parallel", 1)
    here = config.deepspeed.sequence_parallel
    return "" if there == here else f"ranks that share a window {there} there and {here} here"


def _layout_change(written: dict[str, Any], blocks: dict[str, Any], config: StageConfig, world: World) -> str:
    """How the layout of a checkpoint's state differs from this run's, in words; empty if it does not."""
    here = conditions(config, world)
    names = {"world_size": "ranks", "zero_stage": "ZeRO stage", "precision": "precision"}
    if written["zero_stage"] == here["zero_stage"] == 0:
        del names["world_size"]  # every rank has everything
    pairs = {word: (written[name], here[name]) for name, word in names.items()}
    extra = (blocks["deepspeed"] or {}).get("extra", {})
    for name in ("zero_optimization", "data_types"):  # order and cuts of the partitions, class of the optimiser
        pairs[f"deepspeed.extra.{name}"] = extra.get(name), config.deepspeed.extra.get(name)
    return ", ".join(f"{word} {there} there and {own} here" for word, (there, own) in pairs.items() if there != own)


def _load_as_it_is(engine: Any, checkpoint: Path) -> None:
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    path, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE)
    if path is None:
        raise ValueError(f"DeepSpeed found nothing to load in {checkpoint}; the checkpoint is not one of this project")
    # With an optimiser's state come the checkpoint's rates and decays; this run's are those of its config.
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)


def _check_fit(
    written: dict[str, Any],
    blocks: dict[str, Any],
    checkpoint: Path,
    fingerprint: str | None,
    config: StageConfig,
    world: World,
) -> str:
    """Refuse a checkpoint that cannot be resumed; return how the layout of its state differs from this run's."""
    _refuse_other_stage(blocks, checkpoint, config)
    _refuse_other_conditions(written, checkpoint, config, world)
    change = _layout_change(written, blocks, config, world)
    if change and written["optimizer"] != "adamw":
        raise ValueError(
            f"{checkpoint} has the state of {written['optimizer']}, which cannot be resharded ({change}); resume it "
            "with the same number of ranks, ZeRO stage and precision"
        )
    if fingerprint is not None:
        _refuse_other_data(written["data_fingerprint"], fingerprint, checkpoint, config)
    _refuse_other_model(blocks, checkpoint, config)
    return change


def _refuse_other_stage(blocks: dict[str, Any], checkpoint: Path, config: StageConfig) -> None:
    if ("base" in blocks) != hasattr(config, "base"):
        writer, reader = ("tune.train", "pretrain.train") if "base" in blocks else ("pretrain.train", "tune.train")
        raise ValueError(f"{checkpoint} was written by {writer}, but this is {reader}; give each its own train.run_dir")


def _refuse_other_conditions(written: dict[str, Any], checkpoint: Path, config: StageConfig, world: World) -> None:
    here = conditions(config, world)
    differ = [f"{n} {written.get(n)} there, {here[n]} here" for n in ("optimizer", "seed") if written.get(n) != here[n]]
    if differ:
        raise ValueError(
            f"{checkpoint} was written with other settings ({'; '.join(differ)}); resume it with the same optimizer "
            "and seed"
        )


def _refuse_other_data(trained_on: str, fingerprint: str, checkpoint: Path, config: StageConfig) -> None:
    """Both are fingerprints; ``train.checkpoint.accept_data`` may name the checkpoint's."""
    if fingerprint == trained_on or trained_on[:12] == config.train.checkpoint.accept_data:
        return
    raise ValueError(
        f"{checkpoint} was trained on other data or another order (its data fingerprint is {trained_on[:12]}, this "
        f"config's is {fingerprint[:12]}); resume with the same shards, data.seed, sequence_tokens, weights and "
        "data.stages (where they begin at shares of the run, another train.steps moves them: take the run folder's "
        f"config.yaml), start a new run_dir, or set train.checkpoint.accept_data={trained_on[:12]} to go on with the "
        "other data; where weights change, no text is repeated if the new ones are a stage of their own, added to "
        "data.stages from the checkpoint's token on"
    )


def _refuse_other_model(blocks: dict[str, Any], checkpoint: Path, config: StageConfig) -> None:
    changed = differences(blocks["model"], config.model)
    for name, value in config.structure().items():
        block, _, field = name.partition(".")
        before = (blocks.get(block) or {}).get(field)
        if before != value and name == "base.sha256":
            changed.append(f"another base: base.path has other weights than {blocks['base']['path']}, which was tuned")
        elif before != value:
            changed.append(f"{name} {before} there, {value} here")
    if changed:
        raise ValueError(
            f"{checkpoint} holds a different model ({'; '.join(changed)}); resume with the blocks that the run was "
            "started with, or start a new run_dir"
        )
