"""A decoder without a run: what an import or a merge writes, and what stage two starts from.

OUT/
  config.yaml         blocks ``model`` and ``ensemble`` (null without one), routing seed, thresholds
  model.safetensors   weights by the decoder's names, in the dtype they came in; a tied head is stored once
  tokenizer.model ... the tokenizer's files as they were
  manifest.json       written last: size and SHA-256 of every file, and where the weights came from

Everything is written to ``OUT.tmp``, which is renamed: OUT is either whole or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import open_to_others, require_new_folder, temporary_name, write_atomically
from data.tokenizer_files import copy_tokenizer, tokenizer_files
from model.decoder import Decoder
from model.router import numbers_of, thresholds_of
from settings import load, to_yaml
from trainer.checkpoints import manifest
from trainer.checkpoints.empty_decoder import allocate, without_memory
from trainer.checkpoints.layout import CONFIG
from trainer.config import WeightsConfig
from trainer.distributed import ALONE, World

WEIGHTS = "model.safetensors"
_TOLD = 3


def is_weights_folder(path: Path) -> bool:
    """True for what :func:`write_weights` makes, whole or not."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def write_weights(decoder: Decoder, out: Path, tokenizer_folder: Path, facts: dict[str, Any]) -> None:
    """Write ``decoder`` and the tokenizer in ``tokenizer_folder`` to ``out``.

    Args:
        decoder: on the CPU, in any dtypes; they are kept.
        out: the new folder; may exist if it is empty.
        tokenizer_folder: holds a ``tokenizer.json`` or a ``tokenizer.model``.
        facts: further entries of the manifest; ``source`` says in words where the weights came from.

    Raises:
        ValueError: if ``out`` is not empty, or there is no tokenizer.
        OSError: if it cannot be written; nothing is left then.
    """
    require_new_folder(out)
    tokenizer_files(tokenizer_folder)
    ensemble = None if decoder.ensemble is None else decoder.ensemble.config
    thresholds = None if decoder.thresholds is None else numbers_of(decoder.thresholds)
    config = WeightsConfig(model=decoder.config, ensemble=ensemble, seed=decoder.seed, thresholds=thresholds)
    partial = temporary_name(out)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed command
    partial.mkdir(parents=True)
    try:
        copy_tokenizer(tokenizer_folder, partial)
        write_atomically(partial / CONFIG, to_yaml(config).encode())
        _save(decoder, partial / WEIGHTS)
        manifest.write(partial, {"kind": "weights", **facts})
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_weights(folder: Path, disk: Path | None = None) -> tuple[Decoder, WeightsConfig]:
    """The decoder that ``folder`` holds, with its ensemble if it has one: fp32, on the CPU, in evaluation mode.

    Args:
        folder: as :func:`write_weights` makes it.
        disk: keep the weights in an unnamed file in this folder; in memory unless given.

    Raises:
        ValueError: if a file is missing or was changed, or the weights are those of another model.
    """
    decoder, config = read_empty(folder)
    allocate(decoder, disk)
    with torch.no_grad(), weights_in(folder, decoder) as weights:
        for name, parameter in decoder.named_parameters():  # a tied head is not among them
            parameter.copy_(weights.get_tensor(name))
    return decoder, config


def read_empty(folder: Path) -> tuple[Decoder, WeightsConfig]:
    """:func:`read_weights` without the weights: the decoder has no memory.

    Raises:
        ValueError: if a file is missing or was changed.
    """
    config = read_config(folder, ALONE)
    decoder = without_memory(config.model, config.seed, config.ensemble)
    decoder.thresholds = None if config.thresholds is None else thresholds_of(config.thresholds)
    return decoder, config


def read_config(folder: Path, world: World) -> WeightsConfig:
    """The config of a folder of weights, once its files are verified; collective.

    Raises:
        ValueError: if a file is missing or was changed; on every rank.
    """
    problem = manifest.problem_of(folder, world)
    if problem is not None:
        raise ValueError(f"{folder} is not a complete folder of weights: {problem}; write or copy it again")
    return load(folder / CONFIG, [], WeightsConfig)


@contextmanager
def weights_in(folder: Path, decoder: Decoder) -> Iterator[Any]:
    """The open file of weights; its ``get_tensor(name)`` reads one of ``decoder``'s, which may have no memory.

    Raises:
        ValueError: if the weights are those of another model.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        difference = mismatch(dict(decoder.named_parameters()), shapes)
        if difference is not None:
            raise ValueError(f"{folder} has weights that do not fit its {CONFIG}: {difference}; write it again")
        yield file


def mismatch(wanted: Mapping[str, Tensor], found: Mapping[str, Sequence[int]]) -> str | None:
    """How the shapes ``found``, by name, differ from the ``wanted`` parameters', in words; None if they do not."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not a weight of this model" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name])} instead of {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in found and list(found[name]) != list(parameter.shape)
    ]
    more = f"; and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
    return f"{'; '.join(problems[:_TOLD])}{more}" if problems else None


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, readable by whom the umask allows.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # also for a full disk
        raise OSError(f"{path} could not be written ({error}); free some space, or give another folder") from None
    open_to_others(path)


def _save(decoder: Decoder, path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}
    if decoder.config.tied_head:
        del state["lm_head.weight"]
    save_tensors(state, path)
