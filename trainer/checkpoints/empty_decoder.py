"""Decoders whose weights are about to be read: built without initialising any, then given memory, or space on a disk.

    decoder = without_memory(config)
    allocate(decoder, Path("/scratch"))     # or allocate(decoder)
    read_into(decoder)

On a disk the weights are a memory-mapped file: the system keeps as much of it in memory as fits, and writes the rest
back. The file has no name, so nothing of it is left, however the process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import EnsembleConfig, ModelConfig
from model.decoder import Decoder
from model.router import Router

_ALIGNED = 16  # entries; 64 bytes, as in torch's own allocator


def without_memory(config: ModelConfig, seed: int = 0, ensemble: EnsembleConfig | None = None) -> Decoder:
    """A decoder in evaluation mode whose parameters have names and shapes, and nothing else (on the meta device).

    Args:
        config: the model block.
        seed: of the routing noise.
        ensemble: the ensemble's block; no ensemble unless given.

    Raises:
        ValueError: if the ensemble has more layers than the decoder.
    """
    with torch.device("meta"):
        decoder = Decoder(config, seed=seed).eval()
        if ensemble is not None:
            decoder.add_ensemble(ensemble)
    routers = [module for module in decoder.modules() if isinstance(module, Router)]
    for site, router in enumerate(routers):  # in their order
        router.site = torch.tensor(site)  # a buffer that is not in any file
    return decoder


def allocate(module: nn.Module, disk: Path | None = None) -> None:
    """Allocate every parameter in fp32 on the CPU, uninitialised; tied ones stay tied.

    Args:
        module: what :func:`without_memory` returned, perhaps with adapters.
        disk: an existing folder on the disk to use; in memory unless given.

    Raises:
        OSError: if the disk is too full.
    """
    own = list(module.parameters())
    rooms = [torch.empty(p.shape) for p in own] if disk is None else _on_disk([p.shape for p in own], disk)
    made = {id(p): nn.Parameter(room, p.requires_grad) for p, room in zip(own, rooms, strict=True)}
    names = module.named_parameters(remove_duplicate=False)
    module.load_state_dict({name: made[id(p)] for name, p in names}, strict=False, assign=True)


def _on_disk(shapes: list[torch.Size], folder: Path) -> list[Tensor]:
    """Tensors laid out one after the other in one file."""
    counts = [-(-shape.numel() // _ALIGNED) * _ALIGNED for shape in shapes]
    size = sum(counts) * torch.float32.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # Fail now, not with a signal when a page turns out to have no space on the disk.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                f"reading the weights takes {size / 1e9:.3f} GB in {folder}, which are not available there "
                f"({error.strerror}); free some space, or give another folder"
            ) from None
        room = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32)
    return [part[: shape.numel()].view(shape) for part, shape in zip(room.split(counts), shapes, strict=True)]
