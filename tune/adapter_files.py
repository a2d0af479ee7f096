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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from data.files import read_json, write_json
from model.config import EnsembleConfig
from model.decoder import Decoder
from trainer.checkpoints.weights_folder import mismatch
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
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if peft is not None:
            _write_peft(peft.peft_config["default"], get_peft_model_state_dict(peft, state_dict=adapters), partial)
        if others:
            ensemble = None if decoder.ensemble is None else decoder.ensemble.config.model_dump(mode="json")
            write_json(partial / ENSEMBLE[0], {"ensemble": ensemble})
            _write(partial / ENSEMBLE[1], others)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    world.barrier()
    return True


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


def load_adapter(decoder: Decoder, folder: Path) -> PeftModel | None:
    """Put what :func:`save_adapter` wrote onto the model that it was trained on; none of it trains then.

    Args:
        decoder: whole, without adapters; changed in place, also where an error is found halfway.
        folder: as written here, or by PEFT alone.

    Returns:
        PEFT's wrapper around the decoder; None without adapters.

    Raises:
        ValueError: if something is missing there, or does not fit the decoder.
    """
    adapters, others = _has(folder, ADAPTER), _has(folder, ENSEMBLE)
    if not (adapters or others):
        raise ValueError(
            f"{folder} holds no adapter ({' and '.join(ADAPTER)}) and no ensemble ({' and '.join(ENSEMBLE)}); give the "
            "folder that a tuning run wrote"
        )
    if others:
        _load_ensemble(decoder, folder)
    peft = _load_peft(decoder, folder) if adapters else None
    decoder.train(decoder.training)  # the adapters' dropout, too
    decoder.requires_grad_(False)
    return peft


def _load_ensemble(decoder: Decoder, folder: Path) -> None:
    try:
        block = read_json(folder / ENSEMBLE[0])["ensemble"]
        config = None if block is None else EnsembleConfig.model_validate(block)
    except (ValidationError, KeyError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it has no 'ensemble' entry"
        raise ValueError(f"{folder / ENSEMBLE[0]} holds no ensemble block ({reason}); save the adapter again") from None
    if config is not None:
        decoder.add_ensemble(config)
    tensors = _read(folder / ENSEMBLE[1])
    weights = dict(decoder.named_parameters())
    parts = {"ensemble"} if config is None else {"ensemble", "norm"}
    needed = {name for name in weights if part_of(name) in parts}
    _check_fit(folder, tensors, {n: w for n, w in weights.items() if n in needed or n in tensors})
    with torch.no_grad():
        for name, tensor in tensors.items():
            weights[name].copy_(tensor)


def _load_peft(decoder: Decoder, folder: Path) -> PeftModel:
    tensors = _read(folder / ADAPTER[1])
    peft = _inject(decoder, folder)
    _check_fit(folder, tensors, get_peft_model_state_dict(peft))
    set_peft_model_state_dict(peft, tensors)
    return peft


def _inject(decoder: Decoder, folder: Path) -> PeftModel:
    """Adapters as the folder's config says, with no values of theirs yet."""
    path = folder / ADAPTER[0]
    read_json(path)  # says what is wrong with a damaged file
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if isinstance(config, LoraConfig) and not config.modules_to_save:
            return get_peft_model(decoder, config, autocast_adapter_dtype=False)
    except NoMatchingPeftModuleError:
        targets = config.target_modules
        wanted = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise ValueError(
            f"{folder} is an adapter for other modules: none of its targets ({wanted}) is in this model; give the "
            "model that it was trained on"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is nothing that PEFT can use ({error}); save the adapter again") from None
    kind = "LORA with modules_to_save" if isinstance(config, LoraConfig) else config.peft_type
    raise ValueError(f"{path} must be of a LoRA or DoRA adapter and of nothing else, got {kind}; give another one")


def _check_fit(folder: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    difference = mismatch(wanted, {name: tensor.shape for name, tensor in tensors.items()})
    if difference is not None:
        raise ValueError(f"{folder} was trained on another model: {difference}; give the model that it was trained on")


def _has(folder: Path, pair: tuple[str, str]) -> bool:
    there = [name for name in pair if (folder / name).is_file()]
    if len(there) == 1:
        (missing,) = set(pair) - set(there)
        raise ValueError(f"{folder} holds {there[0]} without {missing}; copy the whole folder, or save it again")
    return bool(there)


def _write_peft(config: PeftConfig, tensors: dict[str, Tensor], folder: Path, task_type: str | None = None) -> None:
    """PEFT's two files, into an existing folder; ``task_type`` is for transformers' models alone."""
    config = copy.copy(config)
    config.inference_mode, config.task_type = True, task_type
    config.save_pretrained(str(folder))
    _write(folder / ADAPTER[1], tensors)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """As bytes: safetensors' own files can be read by nobody else."""
    path.write_bytes(to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
