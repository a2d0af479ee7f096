"""Puts what a tuning run saved beside its base back onto it: with PEFT alone, and safetensors for the rest."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from model.config import EnsembleConfig
from model.decoder import Decoder


@torch.no_grad()
def put_back(decoder: Decoder, folder: Path) -> PeftModel | None:
    """PEFT's wrapper around ``decoder``, which is changed in place; None without adapters."""
    if (folder / "ensemble.json").is_file():
        block = json.loads((folder / "ensemble.json").read_text())["ensemble"]
        if block is not None:
            decoder.add_ensemble(EnsembleConfig.model_validate(block))
        weights = dict(decoder.named_parameters())
        for name, tensor in load_file(folder / "ensemble.safetensors").items():
            weights[name].copy_(tensor)
    wrapper = None
    if (folder / "adapter_config.json").is_file():
        wrapper = PeftModel.from_pretrained(decoder, str(folder))
    decoder.eval().requires_grad_(False)
    return wrapper
