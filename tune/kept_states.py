"""What frozen layers make of a window, computed once and read from disk from then on.

Where no weight of the first layers is trained, what they hand on is the same in every epoch, with every seed and at
every learning rate: ``base.cache_states`` names a folder for it. There is a file a window, found by the hash of what
the layers read (tokens, documents, positions), in a folder by base, layers and dtype. So runs that tune the same base
share them, at once too, and none reads what another base made.

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


class KeptStates:
    """Residual streams after the last of the frozen layers, window by window.

    Args:
        folder: the config's ``base.cache_states``; made if it is missing.
        fingerprint: of the base.
        layers: how many of the first layers are frozen.
        states: after how many of these the residual stream is needed, the last ones.

    Attributes:
        layers: the same.
        computed, read: windows so far.
    """

    def __init__(self, folder: Path, fingerprint: str, layers: int, states: int):
        self.layers, self._states = layers, states
        self._folder = folder / fingerprint[:16] / f"layers-{layers - states + 1}-to-{layers}"
        self.computed, self.read = 0, 0

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        documents: Tensor | None,
        positions: Tensor | None,
        dtype: torch.dtype,
        compute: Callable[[], list[Tensor]],
    ) -> list[Tensor]:
        """The states, [B, T, D] each; ``compute`` is called where a window of the batch has none yet.

        Args:
            tokens, documents, positions: int64 [B, T], what the frozen layers read.
            dtype: of the states.
            compute: returns the states of the whole batch.

        Raises:
            ValueError: for a file that does not hold what it should.
        """
        inputs = torch.stack([x for x in (tokens, documents, positions) if x is not None], dim=1).cpu()
        names = [hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in inputs]
        folder = self._folder / str(dtype).removeprefix("torch.")
        paths = [folder / name[:2] / f"{name}.safetensors" for name in names]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        self.computed, self.read = self.computed + len(missing), self.read + len(paths) - len(missing)
        if missing:
            states = compute()
            assert len(states) == self._states
            for number in missing:
                paths[number].parent.mkdir(parents=True, exist_ok=True)
                window = torch.stack([state[number] for state in states])
                write_atomically(paths[number], save({"states": window.cpu().contiguous()}), shared=True)
            return states
        windows = torch.stack([_read(path, (self._states, tokens.shape[1])) for path in paths], dim=1)
        return list(windows.to(tokens.device, non_blocking=True))


def _read(path: Path, shape: tuple[int, int]) -> Tensor:
    """A window's states, [*shape, D]."""
    try:
        states = load(path.read_bytes())["states"]
    except (SafetensorError, KeyError):
        states = None
    if states is None or states.shape[:2] != shape:
        raise ValueError(f"{path} does not hold a window's states; remove it, and it is computed again") from None
    return states
