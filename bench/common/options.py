"""Command-line options that the benchmarks share: model sizes, device, rounds, outputs.

Default sizes depend on the device: 22 M parameters in fp32 on a CPU, about 1 B in bf16 on a CUDA device. The limits in
``bench/common/limits.py`` are stated for these sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from model.config import ModelConfig, RouterConfig
from settings import command_parser, path_argument, require_writable
from trainer.device import find_device

CPU_SIZES = {"layers": 12, "width": 384, "heads": 6, "kv_heads": 2, "ffn_width": 1024, "vocab": 4096}
CUDA_SIZES = {"layers": 16, "width": 2048, "heads": 16, "kv_heads": 4, "ffn_width": 7168, "vocab": 32768}
CPU_BATCH = {"tokens": 512, "samples": 4}
CUDA_BATCH = {"tokens": 2048, "samples": 8}
DTYPES = ("fp32", "bf16")
MODEL = {
    "layers": "decoder layers",
    "width": "width of the residual stream",
    "heads": "query heads",
    "kv_heads": "key/value heads",
    "ffn_width": "inner width of the feed-forward",
    "vocab": "token ids",
}
BATCH = {"tokens": "tokens a sample", "samples": "samples a step"}
PEER, DENSE = "hf_llama", "dense"
"""Contestants that most benchmarks have; the others are routed ones, see :func:`routed_name`."""
EXECUTIONS = get_args(RouterConfig.model_fields["execution"].annotation)
"""Values of a router's ``execution``."""


def parser(module: str, doc: str) -> argparse.ArgumentParser:
    """A parser for ``python -m module`` that shows ``doc`` verbatim."""
    return command_parser(f"python -m {module}", doc)


def add_numbers(parser: argparse.ArgumentParser, meanings: Mapping[str, str]) -> None:
    """Integer options with defaults that depend on the device."""
    for name, meaning in meanings.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{meaning} (default: by device)")


def add_densities(parser: argparse.ArgumentParser, default: Sequence[float] = (1.0, 0.5, 0.25)) -> None:
    """The shares of tokens that routed contestants execute."""
    parser.add_argument(
        "--densities",
        type=float,
        nargs="*",
        default=list(default),
        help="shares of tokens (0, 1] (default: %(default)s)",
    )


def add_run(parser: argparse.ArgumentParser, repeats: int, check: bool = True) -> None:
    """Device, dtype, rounds and outputs."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of weights and activations (default: fp32 on cpu, else bf16)"
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="measured rounds (default: %(default)s)")
    parser.add_argument("--json", type=path_argument, help="write the rows to this file")
    if check:
        parser.add_argument(
            "--check",
            action="store_true",
            help="exit 1 if a limit (bench/common/limits.py) is missed",
        )


def resolve(options: argparse.Namespace, cpu: Mapping[str, object], cuda: Mapping[str, object]) -> None:
    """Fill in the device and its defaults; ``options.other_sizes`` names the options that differ from them.

    Raises:
        ValueError: for an invalid or unavailable device.
    """
    options.device = find_device(options.device)
    on_cuda = options.device != "cpu"
    defaults = {"dtype": "bf16" if on_cuda else "fp32", **(cuda if on_cuda else cpu)}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.other_sizes = [name for name, value in defaults.items() if getattr(options, name) != value]


def refuse(options: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Refuse what cannot be run: numbers below ``least``, impossible densities, outputs that cannot be written.

    Raises:
        ValueError: naming the option, in one sentence.
    """
    rounds = {"repeats": 1} if hasattr(options, "repeats") else {}
    for name, smallest in {**rounds, **least}.items():
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number < smallest:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {number}")
    for name in ("densities", "batches", "lengths"):
        values = getattr(options, name, [])
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must differ from each other, got {values}")
    for density in getattr(options, "densities", []):
        if not 0 < density <= 1:
            raise ValueError(f"--densities must lie above 0 and not above 1, got {density:g}")
    for name in ("json", "markdown"):
        path: Path | None = getattr(options, name, None)
        if path is not None:
            require_writable(path, f"--{name}")


def routed_name(density: float) -> str:
    """Name of the routed contestant at ``density``."""
    return f"routed_{density:g}"


def model_config(
    options: argparse.Namespace,
    density: float | None,
    positions: int,
    execution: str = "rounded",
    explore: float = 0.0,
    layers: int | None = None,
) -> ModelConfig:
    """The benchmark's model for contexts of ``positions`` tokens; dense where ``density`` is None.

    ``execution`` and ``explore`` are the router's settings of these names. ``layers`` default to those of the options.

    Raises:
        ValueError: for incompatible sizes, in one sentence.
    """
    try:
        router = {"kind": "learned", "density": density, "execution": execution, "explore": explore}
        return ModelConfig(
            vocab_size=options.vocab,
            layers=options.layers if layers is None else layers,
            width=options.width,
            heads=options.heads,
            kv_heads=options.kv_heads,
            ffn_width=options.ffn_width,
            max_positions=positions,
            router=None if density is None else RouterConfig.model_validate(router),
        )
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise ValueError("; ".join(problem.removeprefix("Value error, ") for problem in problems)) from None
