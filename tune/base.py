"""What stage two starts from: a stage-one checkpoint or a folder of weights, and its model as stage two runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from data.files import read_json, sha256_of
from model.config import BudgetConfig, ModelConfig, Ramp
from model.decoder import Decoder
from settings import parse_yaml
from trainer import manifest
from trainer.distributed import ALONE
from trainer.weights import load_decoder
from trainer.weights_folder import is_weights_folder, read_weights

_WHAT = "give base.path a stage-one run, one of its checkpoints, or what convert.from_hf wrote"


class Base(NamedTuple):
    """A decoder to tune."""

    decoder: Decoder
    """fp32, on the CPU, in evaluation mode."""
    model: ModelConfig
    """Its config, as it was trained."""
    tokenizer_folder: Path
    """Holds ``tokenizer.model`` or ``tokenizer.json``."""
    description: str
    """One line for the log."""
    fingerprint: str
    """SHA-256 of the manifest that holds the hashes of all its files."""


def load_base(path: str | Path) -> Base:
    """The decoder that ``base.path`` names.

    Raises:
        ValueError: if there is none, it is not whole, or it was tuned already.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; {_WHAT}")
    if is_weights_folder(folder):
        return _from_weights(folder)
    if (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json"):
        raise ValueError(
            f"{folder} is a Hugging Face checkpoint; import it with: python -m convert.from_hf {folder} OUT, and give "
            "base.path that folder"
        )
    blocks = _blocks(folder / "config.yaml")
    if "base" in blocks:
        fix = f"merge them first with: python -m tune.merge {folder} OUT, and give base.path that folder"
        if blocks.get("ensemble") is not None:
            fix = "no second ensemble goes on top of its own, so give base.path what it was tuned from"
        raise ValueError(f"{folder} is a stage-two run, whose weights lie on top of its own base; {fix}")
    decoder, config, step = load_decoder(folder)
    checkpoint = folder / "checkpoints" / f"step-{step:08d}" if (folder / "checkpoints").is_dir() else folder
    return _base(decoder, Path(config.data.dir), f"stage-one checkpoint {checkpoint}, step {step:,}", checkpoint)


def stage_two_model(model: ModelConfig, routers: Literal["frozen", "tuned"]) -> ModelConfig:
    """A base's config as stage two runs it: its schedules stand where they ended, and frozen routers have no budget.

    Raises:
        ValueError: if the routers look at later tokens.
    """
    router = model.router
    if router is None:
        return model
    if router.kind == "expert_choice":
        raise ValueError(
            "router.kind expert_choice picks tokens by looking at later ones, so a response would be seen before it is "
            "predicted; tune a base with a causal kind: learned, random or stride, or a dense one"
        )
    budget: dict[str, Any] = {**router.budget.model_dump(), "dense_until": 0.0, "reach_by": 0.0}
    if routers == "frozen":
        budget |= {"coefficient": 0.0, "controller": "fixed"}
    ended: dict[str, Any] = {
        "noise": _standing(router.noise),
        "temperature": _standing(router.temperature),
        "budget": BudgetConfig.model_validate(budget),
    }
    if routers == "frozen":
        # Greedy and complete, as in evaluation: nothing could adapt to noise, nor to tokens that find no room.
        ended["explore"] = 0.0
        ended["noise"] = Ramp(start=0.0, end=0.0, until=1.0)
        ended["execution"] = "rounded" if router.execution == "capacity" else router.execution
    return model.model_copy(update={"router": router.model_copy(update=ended)})


def _from_weights(folder: Path) -> Base:
    decoder = read_weights(folder)
    if decoder.ensemble is not None:
        raise ValueError(
            f"{folder} was tuned already: it has an ensemble of its last {decoder.ensemble.config.layers} layers, and "
            "no second one goes on top; give base.path what it was tuned from"
        )
    source = manifest.read(folder, ALONE).get("source", "weights")
    return _base(decoder, folder, f"{source} in {folder}", folder)


def _base(decoder: Decoder, tokenizer_folder: Path, what: str, folder: Path) -> Base:
    """``folder`` is the one with the manifest."""
    model = decoder.config
    routers = "dense"
    if model.router is not None:
        routers = f"{model.router.kind} routers at density {model.router.density} on {len(model.sites)} sites"
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    description = f"{what}: {parameters:,} parameters, {model.layers} layers, {routers}"
    return Base(decoder, model, tokenizer_folder, description, sha256_of(folder / manifest.NAME))


def _standing(ramp: Ramp) -> Ramp:
    return Ramp(start=ramp.end, end=ramp.end, until=1.0)


def _blocks(path: Path) -> dict[str, Any]:
    """The blocks of a YAML file; none if it is missing or no mapping, about which others know more to say."""
    try:
        blocks = parse_yaml(path.read_bytes()) if path.is_file() else None
    except yaml.YAMLError:
        blocks = None
    return blocks if isinstance(blocks, dict) else {}
