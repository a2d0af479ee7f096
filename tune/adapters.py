"""Which weights a tuning run trains: adapters through PEFT, the ensemble, skip routers, or everything.

    part       parameters                                             trains
    adapters   ``lora_A``, ``lora_B``, DoRA's magnitudes              always
    ensemble   its norms and router                                   always
    norm       the final norm                                         with an ensemble, or ``final_norm``, or ``full``
    routers    the skip routers                                       with ``routers: tuned``
    backbone   everything else                                        with ``kind: full``

PEFT replaces the decoder's projections with its own layers, so the decoder itself stays the module to train:
``layers.0.mlp.up_proj.weight`` is ``layers.0.mlp.up_proj.base_layer.weight`` from then on, with
``layers.0.mlp.up_proj.lora_A.default.weight`` beside it. :func:`merge` removes them again.

Dimension letters: I inputs and O outputs of a projection, R rank.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from model.decoder import Decoder
from model.init import generator_of
from model.roles import role_of
from trainer.deepspeed_internals import whole_size
from tune.config import AdapterConfig, layers_adapted

_LEAST = 2.0**-24
"""The smallest positive number in fp16."""
Part = Literal["adapters", "ensemble", "norm", "routers", "backbone"]


def prepare(
    decoder: Decoder, adapter: AdapterConfig, routers: Literal["frozen", "tuned"], seed: int
) -> PeftModel | None:
    """Insert the adapters and set ``requires_grad`` of every parameter.

    Args:
        decoder: whole, not yet in an engine, and with its ensemble if it gets one.
        adapter: the config's block.
        routers: the config's ``base.routers``, for the skip routers.
        seed: of the adapters' initial values, which are the same on every rank and at every start.

    Returns:
        PEFT's wrapper around the decoder; None without adapters.

    Raises:
        ValueError: if DoRA would divide by the zero norm of a row.
    """
    peft = None
    if adapter.kind in ("lora", "dora"):
        # The adapters take the decoder's dtype, as DeepSpeed casts all of a module.
        peft = get_peft_model(decoder, _lora_config(decoder, adapter), autocast_adapter_dtype=False)
        _draw(decoder, seed)
        if adapter.kind == "dora":
            _refuse_zero_rows(decoder)
    trains: dict[Part, bool] = {
        "adapters": True,
        "ensemble": True,
        "norm": decoder.ensemble is not None or adapter.final_norm or adapter.kind == "full",
        "routers": routers == "tuned",
        "backbone": adapter.kind == "full",
    }
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(trains[part_of(name)])
    return peft


def part_of(name: str) -> Part:
    """Which part of the table above a decoder's parameter belongs to."""
    if ".lora_" in name:
        return "adapters"
    if name.startswith("ensemble."):
        return "ensemble"
    if name.startswith("norm."):
        return "norm"
    return "routers" if role_of(name) == "router" else "backbone"


def trainable_counts(decoder: Decoder) -> tuple[int, int]:
    """Number of trainable parameters and of all parameters; correct under ZeRO 3, too."""
    counts = counts_by_part(decoder).values()
    return sum(trainable for trainable, _ in counts), sum(total for _, total in counts)


def counts_by_part(decoder: Decoder) -> dict[Part, tuple[int, int]]:
    """The same for every part that the decoder has."""
    found: dict[Part, tuple[int, int]] = {}
    for name, parameter in decoder.named_parameters():
        part, count = part_of(name), whole_size(parameter)
        trainable, total = found.get(part, (0, 0))
        found[part] = trainable + count * parameter.requires_grad, total + count
    return found


def merge(decoder: Decoder) -> None:
    """Merge every adapter into its weight and remove it; names are as before :func:`prepare`.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    # PEFT's own merge_and_unload reads the model's config like a dictionary.
    for layer in decoder.modules():
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            place = base.weight.data
            layer.merge(safe_merge=True)
            place.copy_(base.weight.data)  # in place: its storage may be a file
            base.weight.data = place
    take_out(decoder)


def take_out(decoder: Decoder) -> None:
    """Remove every adapter without merging it; weights and names are as before :func:`prepare`."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, LoraLayer):
            decoder.set_submodule(name, layer.get_base_layer())
    vars(decoder).pop("peft_config", None)


def has_adapters(decoder: Decoder) -> bool:
    """True from :func:`prepare` with LoRA or DoRA to :func:`merge` or :func:`take_out`."""
    return any(isinstance(layer, LoraLayer) for layer in decoder.modules())


def _lora_config(decoder: Decoder, adapter: AdapterConfig) -> LoraConfig:
    some = None
    if adapter.layers != "all":
        assert decoder.ensemble is not None
        some = list(layers_adapted(adapter, len(decoder.layers), decoder.ensemble.config))
        assert some
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT's type is narrower than what it divides
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules=list(adapter.targets),
        layers_to_transform=some,
        layers_pattern=None if some is None else "layers",
    )


def _refuse_zero_rows(decoder: nn.Module) -> None:
    """DoRA divides every row of W + BA [O, I] by its norm; W's rows are checked, because BA is zero at the start."""
    for name, layer in decoder.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight: Any = layer.get_base_layer().weight
        if weight.is_meta:
            continue
        zero = (weight.abs().amax(dim=1) < _LEAST).nonzero().flatten()
        if len(zero):
            raise ValueError(
                f"adapter.kind dora divides each row of a weight by its norm, but {len(zero)} of the {len(weight)} "
                f"rows of {name}.weight are zero, such as row {int(zero[0])}; set adapter.kind to lora, or leave "
                f"{name.rpartition('.')[2]} out of adapter.targets"
            )


def _draw(decoder: nn.Module, seed: int) -> None:
    """Draw each ``lora_A`` [R, I] from PEFT's distribution with its own generator; ``lora_B`` [O, R] is zero."""
    for name, parameter in decoder.named_parameters():
        if ".lora_A." in name:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator_of(seed, name))
            with torch.no_grad():
                parameter.copy_(values)
