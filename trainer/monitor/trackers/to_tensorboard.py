"""TensorBoard: event files in ``RUN/tensorboard``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trainer.monitor.trackers.interface import Opening

FOLDER = "tensorboard"


class ToTensorBoard:
    """A tracker, see :class:`trainer.monitor.trackers.interface.Tracker`; configs and files are beside it already."""

    name = "tensorboard"

    def open(self, opening: Opening) -> None:
        """Begin; events of a killed run from steps after ``resumed_at`` are hidden."""
        self._writer = SummaryWriter(str(opening.folder / FOLDER), purge_step=(opening.resumed_at or 0) + 1)

    def scalars(self, step: int, at_s: float, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step, at_s)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def image(self, step: int, name: str, png: bytes) -> None:
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def files(self, folder: Path, paths: Sequence[Path]) -> None:
        """Nothing: they are in the run folder, as the event files are."""

    def close(self, phase: str) -> None:
        self._writer.close()
