"""The base of stage two: a stage-one checkpoint or a folder of weights, and its model as stage two runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from data.files import sha256_of
from model.config import BudgetConfig, ModelConfig
from model.decoder import Decoder
from model.schedules import Ramp
from trainer.checkpoints import manifest
from trainer.distributed import ALONE, World
from tune.config import BaseConfig, TuneFile
from tune.load import Loaded, chosen, load_model
from tune.preflight import base_folder, require_base


class Base(NamedTuple):
    """A decoder to tune."""

    loaded: Loaded
    """The decoder, and the checkpoint or folder of weights that it was read from."""
    description: str
    """One line for the log."""
    fingerprint: str
    """SHA-256 of the manifest that holds the hashes of all its files."""

    @property
    def decoder(self) -> Decoder:
        """fp32, on the CPU, in evaluation mode."""
        return self.loaded.decoder

    @property
    def model(self) -> ModelConfig:
        """The decoder's config, as it was trained."""
        return self.decoder.config


def base_of(file: TuneFile, world: World) -> Base:
    """The base of a start of ``file``, fresh or resumed; collective.

    Raises:
        ValueError: as :func:`load_base`; if the checkpoint that the run was tuned from is gone.
    """
    folder, problem = None, None
    if world.is_main:
        try:
            folder = base_folder(file)
        except ValueError as error:
            problem = str(error)
    folder, problem = world.broadcast_object((folder, problem))
    if problem:
        raise ValueError(problem)
    return load_base(folder, world)


def load_base(path: str | Path, world: World = ALONE) -> Base:
    """The decoder that ``base.path`` names, the same on all ranks of ``world``; collective.

    Raises:
        ValueError: if there is none, it is incomplete, or it was tuned already.
    """
    folder = Path(path)
    require_base(folder)
    loaded = load_model(chosen(folder, world))
    decoder, model = loaded.decoder, loaded.decoder.config
    if decoder.ensemble is not None:
        raise ValueError(
            f"{folder} was already tuned: it has an ensemble of its last {decoder.ensemble.config.layers} layers, and "
            "a second one cannot be added; give base.path the model that it was tuned from"
        )
    if loaded.step is None:
        what = f"{manifest.read(folder, ALONE).get('source', 'weights')} in {folder}"
    else:
        what = f"stage-one checkpoint {loaded.source}, step {loaded.step:,}"
    routers = "dense"
    if model.router is not None:
        routers = f"{model.router.kind} routers at density {model.router.density} on {len(model.sites)} sites"
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    description = f"{what}: {parameters:,} parameters, {model.layers} layers, {routers}"
    return Base(loaded, description, sha256_of(loaded.source / manifest.NAME))


def stage_two_model(model: ModelConfig, base: BaseConfig) -> ModelConfig:
    """A base's config as stage two runs it: its schedules stay at their ends, and frozen routers have no budget.

    Tuned routers are held at ``base.density``, reached by ``base.ramp``.

    Raises:
        ValueError: if the routers are not causal.
    """
    router = model.router
    if router is None:
        return model
    model.require_causal("a response would be seen before it is predicted")
    budget: dict[str, Any] = {**router.budget.model_dump(), **base.ramp.model_dump()}
    if base.routers == "frozen":
        budget |= {"coefficient": 0.0, "controller": "fixed"}
    ended: dict[str, Any] = {
        "noise": _standing(router.noise),
        "temperature": _standing(router.temperature),
        "budget": BudgetConfig.model_validate(budget),
        "density": base.density or router.density,
    }
    if base.routers == "frozen":
        # Greedy and without a capacity, as in evaluation: nothing could adapt to noise or to dropped tokens.
        ended["explore"] = 0.0
        ended["noise"] = Ramp(start=0.0, end=0.0, until=1.0)
        ended["execution"] = "rounded" if router.execution == "capacity" else router.execution
    return model.model_copy(update={"router": router.model_copy(update=ended)})


def _standing(ramp: Ramp) -> Ramp:
    return Ramp(start=ramp.end, end=ramp.end, until=1.0)
