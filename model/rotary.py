"""Rotary position embedding (Su et al. 2021) in the half-rotation layout that Hugging Face's Llama uses.

Entry i of a head is paired with entry i + head_dim/2, not with its neighbour, so that an export is a rename.
Angles are computed in fp32 from fp32 inverse frequencies; fp64 angles differ from Hugging Face's by 1e-4 in logits.

Dimension letters: B batch, T tokens, N tokens gathered over the batch, H heads, K head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of entries, [K/2] in fp32, with ``rope_scaling`` applied."""
    k = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, k, 2, dtype=torch.float32, device=device) / k)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: long wavelengths are divided, short ones kept, the band between them blended.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_positions / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotation(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ``positions`` [B or 1, T]: two tensors [B or 1, T, K] of ``dtype``.

    The sines of the first half are negative, which is what :func:`rotate` expects.
    """
    angles = positions[..., None].float() * inverse_frequencies(config, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of ``x`` [..., H, K] by ``cos`` and ``sin`` [..., K] of the same leading shape (or 1)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos.unsqueeze(-2), swapped, sin.unsqueeze(-2))
