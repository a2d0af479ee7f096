"""Output of frozen layers for a window, computed once and read from disk from then on.

If no weight of the first layers is trained, their output is the same in every epoch, with every seed and at every
learning rate: ``base.cache_states`` names a folder for it. There is one file per window, found by the hash of the
layers' inputs (tokens, documents, positions), in a folder by base, layers and dtype. So runs that tune the same base
share them, even concurrently, and none reads the states of another base.

Dimension letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.files import write_atomically
from trainer.log import logger_of_run


class StateCache:
    """Residual streams after the last of the frozen layers, window by window.

    Args:
        folder: the config's ``base.cache_states``; created if missing.
        fingerprint: of the base.
        layers: how many of the first layers are frozen.

    Attributes:
        layers: the same.
        computed, read: windows so far.
    """

    def __init__(self, folder: Path, fingerprint: str, layers: int):
        self.layers, self._folder = layers, folder / fingerprint[:16]
        self.computed, self.read = 0, 0
        self._writes = True

    @torch.no_grad()
    def __call__(
        self, read: list[Tensor | None], states: int, dtype: torch.dtype, compute: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """See :class:`model.decoder.FrozenStates`; ``compute`` is called if a window of the batch has no file yet.

        Raises:
            ValueError: for a file with unexpected content.
        """
        inputs = torch.stack([x for x in read if x is not None], dim=1).cpu()
        given = bytes(x is not None for x in read)
        names = [hashlib.sha256(given + window.numpy().tobytes()).hexdigest() for window in inputs]
        folder = (
            self._folder / f"layers-{self.layers - states + 1}-to-{self.layers}" / str(dtype).removeprefix("torch.")
        )
        paths = [folder / name[:2] / f"{name}.safetensors" for name in names]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        self.computed, self.read = self.computed + len(missing), self.read + len(paths) - len(missing)
        if missing:
            computed = compute()
            assert len(computed) == states
            for number in missing:
                self._keep(paths[number], torch.stack([state[number] for state in computed]))
            return computed
        windows = torch.stack([_read(path, (states, inputs.shape[2])) for path in paths], dim=1)
        assert read[0] is not None
        return list(windows.to(read[0].device, non_blocking=True))

    def _keep(self, path: Path, window: Tensor) -> None:
        """Write a window's states; if that fails, as on a full disk, caching stops, not the run."""
        if not self._writes:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({"states": window.cpu().contiguous()}), shared=True)
        except OSError as error:
            self._writes = False
            logger_of_run().warning(
                f"base.cache_states {self._folder} cannot be written ({error.strerror}); states already there are "
                "used, and no more are cached"
            )


def _read(path: Path, shape: tuple[int, int]) -> Tensor:
    """A window's states, [*shape, D]."""
    try:
        states = load(path.read_bytes())["states"]
    except (SafetensorError, KeyError):
        states = None
    if states is None or states.shape[:2] != shape:
        raise ValueError(f"{path} does not hold a window's states; remove it, and they are computed again") from None
    return states
