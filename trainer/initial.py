"""What a fresh run starts from, other than randomly initialised weights; opened by ``pretrain/initial.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.roles import role_of
from model.router import LearnedRouter, Router
from trainer.checkpoints.reshard import put
from trainer.checkpoints.zero_files import StoredParameter, whole_weights
from trainer.distributed import World


@dataclass(frozen=True)
class Fork:
    """A checkpoint to continue in another run folder.

    Attributes:
        checkpoint: the folder of a whole checkpoint.
        description: a line for the log and the checkpoints' manifests.
    """

    checkpoint: Path
    description: str


@dataclass(frozen=True)
class GivenWeights:
    """Weights without an optimiser's state.

    Attributes:
        model: the config of their model.
        folder: where they are stored.
        tokenizer: a folder with the tokenizer of their training data, if it still exists.
        stored: yields them, one parameter at a time; called once, on every rank.
        description: a line for the log and the checkpoints' manifests.
        thresholds: on their routers' margins, fp32 [S]; None for 0.
    """

    model: ModelConfig
    folder: Path
    tokenizer: Path
    stored: Callable[[], Iterable[StoredParameter]]
    description: str
    thresholds: Tensor | None = None

    def put_into(self, engine: Any, world: World) -> None:
        """Load the weights into an engine that has not trained yet; collective.

        Learned routers that are not among them get zero weights: margins are 0, a tie executes, and any preference is
        learned, not drawn. Routers of other kinds keep their initial values.

        Raises:
            ValueError: if the files hold another model than their config says.
        """
        engine.module.thresholds = self.thresholds
        left = put(engine, self.stored(), self.folder, world)
        routers = {f"{name}.weight": m for name, m in engine.module.named_modules() if isinstance(m, Router)}
        if missing := [name for name in left if name not in routers]:
            raise ValueError(f"{self.folder} has no {missing[0]}, so its files do not belong together; copy it again")
        shape = (2, self.model.width)
        closed = [name for name in left if isinstance(routers[name], LearnedRouter)]
        put(engine, whole_weights({name: torch.zeros(shape) for name in closed}), self.folder, world)


Initial = Fork | GivenWeights


def weights_to_draw(checkpoint: Path | None, given: Initial | None) -> Callable[[str], bool]:
    """Which weights, by name, are initialised randomly at the start: those that are not read from files."""
    if isinstance(given, GivenWeights):
        return lambda name: role_of(name) == "router"  # theirs may have none
    return lambda name: checkpoint is None
