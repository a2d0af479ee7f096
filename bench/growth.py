"""How the cost of a step grows with density, sequence length and batch.

    python -m bench.growth                                 # CPU: 22M parameters; CUDA: 1B
    python -m bench.growth --pairs 512x4 4096x1 --densities 0.5 --json growth.json --markdown growth.md

For every pair of tokens a sample and samples a step (``2048x8``), dense and routed training steps take turns as in
``bench/step.py``. The table has a routed step's time over the dense step's at every density, and in brackets the FLOP
bound: executed FLOPs over dense FLOPs, counted from what the routers did. As sequences grow, attention outgrows the
parts that never skip (keys, values, head), so the bound falls towards the density.

A pair that does not fit into memory is left out, and the table says so. On the CPU too: allocations beyond the memory
that is free when the pair begins are made to fail, see ``bench/common/memory.py``.
"""

from __future__ import annotations

import argparse
import gc
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.common.options import (
    CPU_SIZES,
    CUDA_SIZES,
    DENSE,
    EXECUTIONS,
    MODEL,
    add_densities,
    add_numbers,
    add_run,
    model_config,
    parser,
    refuse,
    resolve,
    routed_name,
)
from bench.common.report import Row, header, noisy, table, write_json
from bench.common.timing import take_turns
from settings import path_argument, user_errors
from settings.tables import markdown

if TYPE_CHECKING:
    from bench.common.contestants import Contestant
    from trainer.monitor.peak_flops import PeakFlops

CPU_PAIRS = ["512x4", "512x1", "1024x2", "2048x1", "4096x1", "8192x1"]
CUDA_PAIRS = ["2048x8", "4096x4", "8192x2", "2048x1", "2048x16"]


@dataclass(frozen=True)
class Pair:
    """A batch's shape: ``tokens`` a sample, ``samples`` a step."""

    tokens: int
    samples: int

    @staticmethod
    def of(text: str) -> Pair:
        """From ``512x4``.

        Raises:
            ValueError: for anything else, and for fewer than 2 tokens or 1 sample.
        """
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None or int(match[1]) < 2 or int(match[2]) < 1:
            raise ValueError(
                f"--pairs are tokens a sample x samples a step, at least 2x1, for example 512x4; got {text!r}"
            )
        return Pair(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.tokens}x{self.samples}"


def build(options: argparse.Namespace) -> dict[str, Contestant]:
    """The dense decoder and the routed ones, for batches of any of the pairs."""
    import torch

    from bench.common.contestants import Ours, held_decoder
    from trainer.monitor.peak_flops import DTYPES

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    tokens = max(pair.tokens for pair in options.pairs)
    contestants: dict[str, Contestant] = {}
    for density in (None, *options.densities):
        config = model_config(options, density, tokens, options.execution)
        decoder = held_decoder(config, device, dtype)
        contestants[DENSE if density is None else routed_name(density)] = Ours(decoder, options.compile)
    return contestants


def measure_pair(
    pair: Pair, contestants: Mapping[str, Contestant], fastest: PeakFlops, options: argparse.Namespace
) -> tuple[list[Row], float] | str:
    """Rows and matmul peak (FLOP/s) of one pair, or torch's message if it does not fit into memory."""
    import torch

    from bench.common.contestants import random_tokens
    from bench.common.memory import held_to_free_memory
    from bench.step import PEAK, row
    from trainer.monitor.out_of_memory import is_out_of_memory

    device = torch.device(options.device)
    try:
        with held_to_free_memory(device):
            tokens = random_tokens(pair.samples, pair.tokens, options.vocab, device)
            for contestant in contestants.values():
                contestant.feed(tokens)
                contestant.step()  # creates the optimiser state if there is none yet
                contestant.measure_peak()
                contestant.forget()
            calls: dict[str, Callable[[], object]] = {name: _alone(c) for name, c in contestants.items()}
            seconds = take_turns({**calls, PEAK: fastest}, options.repeats, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = textwrap.shorten(str(error).rpartition("Allocator: ")[2], 160)
    else:
        peak = fastest.flops_per_s
        return [row(name, contestants, options, seconds, peak, f"{pair}/") for name in contestants], peak
    # After the except block: until its end the error keeps the failed step's tensors alive.
    for contestant in contestants.values():
        contestant.forget()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return said


def _alone(contestant: Contestant) -> Callable[[], object]:
    """A step that drops its gradients, to leave the memory to the others."""

    def step() -> None:
        contestant.step()
        contestant.optimizer.zero_grad()

    return step


def ratio_table(found: Mapping[Pair, list[Row] | None], densities: Sequence[float]) -> str:
    """Markdown table: one row per pair, one column per density."""
    names = [routed_name(density) for density in densities]
    lines = [["tokens x samples", "dense step, s", *(f"density {density:g}" for density in densities)]]
    for pair, rows in found.items():
        if rows is None:
            lines.append([f"{pair.tokens} x {pair.samples}", "does not fit into memory", *[""] * len(names)])
            continue
        by_name = {r.name.partition("/")[2]: r for r in rows}
        cells = [f"{pair.tokens} x {pair.samples}", f"{by_name[DENSE].seconds:.3f}"]
        for name in names:
            ratio, bound = by_name[name].to_dense, by_name[name].flop_bound_ratio
            assert ratio is not None
            cells.append(f"{ratio.median:.3f} ({bound:.3f})")
        lines.append(cells)
    return markdown(lines)


def measure(options: argparse.Namespace) -> tuple[dict[Pair, list[Row] | None], float]:
    """Rows of every pair, None for those that did not fit, and the matmul peak, FLOP/s.

    Raises:
        ValueError: if none fits.
    """
    import torch

    from trainer.monitor.peak_flops import DTYPES, PeakFlops

    contestants = build(options)
    fastest = PeakFlops(torch.device(options.device), DTYPES[options.dtype])
    found: dict[Pair, list[Row] | None] = {}
    peak = 0.0
    for pair in options.pairs:
        result = measure_pair(pair, contestants, fastest, options)
        if isinstance(result, str):
            print(f"{pair}: left out, it does not fit into the memory of {options.device} ({result})", flush=True)
            found[pair] = None
            continue
        found[pair], pair_peak = result
        said = ", ".join(f"{row.name.partition('/')[2]} {row.seconds:.3f} s" for row in result[0])
        print(f"{pair}: {said}", flush=True)  # a later pair may take minutes
        peak = max(peak, pair_peak)
    if not any(found.values()):
        raise ValueError(f"none of --pairs {' '.join(map(str, options.pairs))} fits into memory; give smaller ones")
    return found, peak


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options, with the device's defaults filled in."""
    options_parser = parser("bench.growth", __doc__)
    add_numbers(options_parser, MODEL)
    options_parser.add_argument(
        "--pairs", nargs="+", help="tokens a sample x samples a step, for example 512x4 (default: by device)"
    )
    add_densities(options_parser, (1.0, 0.75, 0.5, 0.25))
    options_parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile each layer (default: on cuda, not on cpu)"
    )
    options_parser.add_argument(
        "--execution",
        choices=EXECUTIONS,
        default="rounded",
        help="how routed layers compute executed tokens, the router's setting of that name (default: %(default)s)",
    )
    options_parser.add_argument("--markdown", type=path_argument, help="write the table of ratios to this file")
    add_run(options_parser, repeats=5, check=False)
    options = options_parser.parse_args(arguments)
    resolve(
        options, CPU_SIZES | {"pairs": CPU_PAIRS, "compile": False}, CUDA_SIZES | {"pairs": CUDA_PAIRS, "compile": True}
    )
    refuse(options, {})
    options.pairs = [Pair.of(text) for text in options.pairs]
    if len(set(options.pairs)) < len(options.pairs):
        raise ValueError(f"--pairs must differ from each other, got {' '.join(map(str, options.pairs))}")
    if not options.densities:
        raise ValueError("--densities needs at least one density to compare with dense")
    model_config(options, None, max(pair.tokens for pair in options.pairs))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    with user_errors():
        options = parse(arguments)
        found, peak = measure(options)
        rows = [found_row for pair_rows in found.values() for found_row in pair_rows or []]
        top, drawn = header(options, peak, [*MODEL, "execution", "compile"]), ratio_table(found, options.densities)
        from bench.step import SECONDS

        print(top, table(rows, SECONDS), drawn, *noisy(rows), sep="\n\n")
        write_json(options.json, rows, SECONDS)
        if options.markdown is not None:
            lines = "\n".join(f"    {line}" for line in top.splitlines())
            text = f"Routed step over dense step, median of rounds; in brackets the FLOP bound.\n\n{lines}\n\n{drawn}\n"
            options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
