"""What a tuning run trained, without the model it was trained on.

    FOLDER/
      adapter_config.json, adapter_model.safetensors   LoRA or DoRA, in PEFT's own format
      ensemble.json, ensemble.safetensors              the ensemble's block (null without one); its norms and router,
                                                       the final norm, skip routers that were tuned

Each pair is there or not. What is written are fp32 master weights, where the engine has any within reach (ZeRO 1 to 3);
at stage 0 in bf16 the weights of the forward pass. The masters of a run in bf16 are in its checkpoints at every stage:
see :func:`tune.load.load_model`.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save as to_bytes
from torch import Tensor

from data.files import sync, write_atomically, write_json
from model.decoder import Decoder
from trainer.checkpoints.layout import partial_of, removed_of
from trainer.deepspeed_internals import whole_weight
from trainer.distributed import World
from tune.adapters import part_of

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
ENSEMBLE = ("ensemble.json", "ensemble.safetensors")
_PEFT_PREFIX = "base_model.model."


def save_adapter(peft: PeftModel | None, decoder: Decoder, folder: Path, world: World) -> bool:
    """Write everything that trains into ``folder``, in place of what is there; collective.

    Args:
        peft: what :func:`tune.adapters.prepare` returned.
        decoder: as in the engine.
        folder: appears once it is whole.
        world: the ranks; the first one writes.

    Returns:
        False, and nothing is written, where the backbone trains: an ensemble does not fit on another one.
    """
    if any(p.requires_grad and part_of(name) == "backbone" for name, p in decoder.named_parameters()):
        return False
    adapters: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = whole_weight(parameter)
        if world.is_main and part_of(name) == "adapters":
            adapters[_PEFT_PREFIX + name] = weight.cpu()
        elif world.is_main:
            others[name] = weight.cpu()
    if world.is_main:
        partial = partial_of(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if peft is not None:
            _write_peft(peft.peft_config["default"], get_peft_model_state_dict(peft, state_dict=adapters), partial)
        if others:
            ensemble = None if decoder.ensemble is None else decoder.ensemble.config.model_dump(mode="json")
            write_json(partial / ENSEMBLE[0], {"ensemble": ensemble})
            _write(partial / ENSEMBLE[1], others)
        _replace(folder, partial)
    world.barrier()
    return True


def _replace(folder: Path, partial: Path) -> None:
    """Give ``partial`` the name ``folder``. What has it is renamed first: a kill finds the one or the other whole."""
    removed = removed_of(folder)
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(removed, ignore_errors=True)


def export_adapter(decoder: Decoder, folder: Path) -> None:
    """Write a decoder's adapters as PEFT loads them onto its export, where our modules lie below ``model.``.

    Args:
        decoder: with adapters, outside an engine.
        folder: the new folder.
    """
    model: Any = decoder
    adapters = get_peft_model_state_dict(model, save_embedding_layers=False)
    folder.mkdir()
    _write_peft(
        model.peft_config["default"],
        {f"{_PEFT_PREFIX}model.{name}": weight for name, weight in adapters.items()},
        folder,
        task_type="CAUSAL_LM",
    )


def _write_peft(config: PeftConfig, tensors: dict[str, Tensor], folder: Path, task_type: str | None = None) -> None:
    """PEFT's two files, into an existing folder; ``task_type`` is for transformers' models alone."""
    config = copy.copy(config)
    config.inference_mode, config.task_type = True, task_type
    config.save_pretrained(str(folder))
    sync(folder / ADAPTER[0])
    _write(folder / ADAPTER[1], tensors)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """As bytes: safetensors' own files can be read by nobody else."""
    content = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    write_atomically(path, content)
