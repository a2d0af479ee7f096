"""Weights & Biases: online, or into ``RUN/wandb`` with ``WANDB_MODE=offline``, which ``wandb sync`` sends later.

Its own variables set server and account: ``WANDB_API_KEY``, ``WANDB_ENTITY``, ``WANDB_BASE_URL``. The library starts a
process of its own for sending, which also handles a server that goes away. If the server cannot be reached at the
start, or rejects the key, the run is kept offline.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from trainer.exit_status import EXIT_PREEMPTED
from trainer.log import logger_of_run
from trainer.monitor.trackers.interface import Opening

_INIT_TIMEOUT_S, _FINISH_TIMEOUT_S = 30.0, 45.0


class ToWandb:
    """A tracker, see :class:`trainer.monitor.trackers.interface.Tracker`.

    Metrics are plotted over ``step``, not over wandb's count of calls, which cannot go back: a resumed run begins at
    its checkpoint's step.
    """

    name = "wandb"

    def open(self, opening: Opening) -> None:
        own = opening.kept_id(self.name) or uuid.uuid4().hex[:8]
        try:
            self._run = _start(opening, own)
        except wandb.errors.CommError as error:
            reason, kept = str(error).splitlines()[0], opening.folder / "wandb"
            logger_of_run().warning(f"tracker wandb: {reason}; the run is kept in {kept}, to be sent with `wandb sync`")
            wandb.teardown()  # of the first attempt, which still has the id
            self._run = _start(opening, own, mode="offline")
        opening.keep_id(self.name, own)
        if self._run.url:
            logger_of_run().info(f"tracker wandb: {self._run.url}")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, at_s: float, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, "_timestamp": at_s, **scalars})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({"step": step, name: text})

    def image(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        self._run.log({"step": step, name: wandb.Image(Image.open(io.BytesIO(png)))})

    def files(self, folder: Path, paths: Sequence[Path]) -> None:
        """Saved under the run's name, because ``config.yaml`` at the top is the library's own."""
        for path in paths:
            self._run.save(str(path), base_path=str(folder.parent), policy="now", glob=False)

    def close(self, phase: str) -> None:
        self._run.finish(exit_code={"ended": 0, "stopped": EXIT_PREEMPTED}.get(phase, 1))


def _start(opening: Opening, own: str, **options: Any) -> Any:
    """Begin or continue the run with the id ``own``."""
    return wandb.init(
        project=opening.project,
        name=opening.folder.name,
        id=own,
        resume="allow",
        dir=str(opening.folder),
        config=opening.config | {"code": {"commit": opening.commit}},
        allow_val_change=True,
        settings=wandb.Settings(
            console="off", silent=True, init_timeout=_INIT_TIMEOUT_S, finish_timeout=_FINISH_TIMEOUT_S
        ),
        **options,
    )
