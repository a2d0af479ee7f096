"""Device, precision and ranks on which the commands of ``evals/`` run a model: options, and what they do.

add_placement(parser)                 --device, --dtype
with placed(options) as placement:    joins the other ranks, where a launcher has started some
    loaded = placement.load(path)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from settings import ranks_by_environment, whole_number
from trainer.device import check_device

if TYPE_CHECKING:
    from trainer.distributed import World
    from tune.load import Loaded

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
"""Tokens that run at once unless the user says otherwise."""
IN_FP32 = "run it with --dtype fp32, or if that was used, take an earlier checkpoint"
"""What to do about logits that are not finite."""
NO_TOKEN = f"the model's logits are not finite (NaN or infinite), so there is no next token; {IN_FP32}"
_TIMEOUT_S = 3600.0  # how long a rank may be ahead of another


@dataclass(frozen=True)
class Placement:
    """Where a model runs.

    Attributes:
        world: this process among all, with its device.
        dtype: of weights and activations: a key of ``DTYPES``.
    """

    world: World
    dtype: str

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a batch unless the user says otherwise."""
        return BATCH_TOKENS[self.world.device.type]

    def load(self, path: Path) -> Loaded:
        """:func:`tune.load.load_model`, the same on every rank, on the device and in the precision that were asked for.

        Collective.
        """
        import torch

        from tune.load import chosen, load_model

        loaded = load_model(chosen(path, self.world))
        loaded.decoder.to(self.world.device, getattr(torch, DTYPES[self.dtype]))
        return loaded


def add_placement(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``, the same for every command that runs a model."""
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of weights and activations")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def add_batch(parser: argparse.ArgumentParser) -> None:
    """``--batch-tokens``, for commands that score."""
    shown = ", ".join(f"{tokens} on {kind}" for kind, tokens in BATCH_TOKENS.items())
    parser.add_argument(
        "--batch-tokens",
        type=whole_number(),
        metavar="N",
        help=f"tokens that run at once, padding included (default: {shown})",
    )


def check_placement(options: argparse.Namespace, ranks: bool = False) -> None:
    """Refuse impossible options before torch is loaded; ``ranks``: whether the command can run on several.

    Raises:
        ValueError: if the device cannot be used, or not with these ranks.
    """
    check_device(options.device)
    count = ranks_by_environment()
    if count > 1 and not ranks:
        raise ValueError(f"this command runs in one process, but a launcher has started {count}; start it with python")
    if count > 1 and ":" in (options.device or ""):
        raise ValueError(f"--device {options.device} is one device, but there are {count} ranks; give --device cuda")


@contextmanager
def placed(options: argparse.Namespace) -> Iterator[Placement]:
    """Find the device; join the other ranks, if there are any, and leave together.

    Raises:
        ValueError: the device is not there, or the ranks cannot join.
    """
    import torch

    from trainer.device import find_device
    from trainer.distributed import ALONE, join, leave

    device = find_device(options.device)
    if ranks_by_environment() == 1:
        yield Placement(replace(ALONE, device=torch.device(device)), options.dtype)
        return
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed then runs the ranks on the CPU
    yield Placement(join(_TIMEOUT_S), options.dtype)
    leave()
