"""The state of the random-number generators, as tensors and numbers that a safe unpickler can read.

Routing noise needs none of it (it is a hash, see ``model/noise.py``); dropout in adapters and users' own code do need
it.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from trainer.deepspeed_internals import uses_cuda


def rng_state() -> dict[str, Any]:
    """Generators of torch (CPU and this rank's GPU), Python and NumPy."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # a tuple: the legacy form
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
    }
    if uses_cuda():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and uses_cuda():
        torch.cuda.set_rng_state(state["cuda"])
