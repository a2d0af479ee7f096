"""Resolves ``train.precision: auto`` on the devices of a run: bf16 if all have fast bf16 products, else fp32.

The decision follows from device capabilities and the model's width, not from a measurement, so that the same machine
always gives the same answer. All ranks make it together, once, before anything reads the precision. The run folder's
config and the checkpoints record it, and a resume keeps the precision of its checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from trainer.checkpoints import manifest
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.monitor.peak_flops import DTYPES, PeakFlops

Config = TypeVar("Config", bound=StageConfig)
CPU_WIDTH = 256
"""Smallest width for bf16 on a CPU. With AVX512-BF16 a forward and backward pass takes 1.07, 0.65 and 0.49 of the time
in fp32 at widths of 128, 384 and 768 (two cores, LOG.md); a whole step at 128, with DeepSpeed's conversions, takes
longer still."""
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's BF16"}
"""Instruction sets with bf16 products, by torch's names of CPU capabilities."""


def resolve_precision(config: Config, world: World, checkpoint: Path | None = None) -> tuple[Config, str | None]:
    """``config`` with its precision decided, and the sentence that says why where it was ``auto``; collective.

    Args:
        config: the run's config.
        world: this process among all ranks.
        checkpoint: the one that the run continues from, if any.

    Raises:
        ValueError: if the checkpoint's precision conflicts with the rest of the config.
    """
    if config.train.precision != "auto":
        return config, None
    if checkpoint is not None:
        written = manifest.read(checkpoint, world)["precision"]
        return config.in_precision(written), f"precision {written}: that of the checkpoint"
    precision, why = auto_precision(world, config.model.width)
    return config.in_precision(precision), f"precision {precision}: {why}"


def auto_precision(world: World, width: int) -> tuple[str, str]:
    """What ``auto`` is for a fresh run of these ranks, and why: fp32 if one of them is slow in bf16; collective.

    Args:
        world: this process among all ranks.
        width: the model's.
    """
    everyone = world.all_gather_objects(fast_bf16(world.device, width))
    for rank, (fast, why) in enumerate(everyone):
        if not fast:
            return "fp32", why if all(found == (fast, why) for found in everyone) else f"{why}, on rank {rank}"
    return "bf16", everyone[0][1]


def fast_bf16(device: torch.device, width: int) -> tuple[bool, str]:
    """Whether a model of ``width`` trains faster in bf16 than in fp32 on ``device``, and why.

    A CPU needs the instructions, a oneDNN that uses them (``ONEDNN_MAX_CPU_ISA`` may prevent that), and layers so wide
    that matrix products outweigh the conversions around them.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, "this GPU multiplies bf16 fast"
        return False, "this GPU has no bf16 instructions"
    capable = torch.cpu.get_capabilities()
    found = [name for flag, name in _INSTRUCTIONS.items() if capable.get(flag)]
    if not found:
        return False, f"this CPU has no bf16 instructions ({', '.join(_INSTRUCTIONS.values())})"
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False, f"this CPU multiplies bf16 fast ({found[0]}), but torch's oneDNN does not use that here"
    if width < CPU_WIDTH:
        return False, f"a model of width {width} gains nothing from bf16 on a CPU, one of {CPU_WIDTH} or more does"
    return True, f"this CPU multiplies bf16 fast ({found[0]})"


def slow_bf16_warning(config: StageConfig, world: World) -> str | None:
    """A warning with the measured ratio if a run in bf16 would be faster in fp32, else None; collective."""
    if config.train.precision != "bf16":
        return None
    precision, why = auto_precision(world, config.model.width)
    if precision == "bf16":
        return None
    ratio = PeakFlops(world.device, DTYPES["bf16"]).layer_flops_per_s
    ratio /= PeakFlops(world.device, DTYPES["fp32"]).layer_flops_per_s
    lowest = min(world.all_gather_objects(ratio))
    if lowest >= 1:
        return None
    return (
        f"train.precision bf16 is slow here ({why}): a linear layer's products run at {lowest:.2f} of their fp32 "
        "speed, as measured now; set train.precision=fp32"
    )
