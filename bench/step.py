"""Time a training step: our dense decoder, Hugging Face's Llama of the same sizes, and routed decoders.

    python -m bench.step                                   # CPU: 22M parameters; CUDA: 1B
    python -m bench.step --densities 0.5 --repeats 30 --json step.json
    python -m bench.step --check                           # exit 1 if a limit of bench/common/limits.py is missed
    python -m bench.step --checkpointing --no-compile --execution rounded
    python -m bench.step --densities --deeper              # twice the layers at the dense step's FLOPs

The contestants are described in ``bench/common/contestants.py``. Ours and the peer, which has our weights copied in,
must compute the same loss before anything is timed. All take turns in one process, see ``bench/common/timing.py``. On
CUDA our layers and the peer are compiled, on the CPU neither; ``--compile`` and ``--no-compile`` are for ours.

Columns: ``FLOP bound`` is executed FLOPs over dense FLOPs, counted from what the routers really did: the ratio that a
step would have if it cost nothing but matrix products at dense speed. ``MFU`` is executed FLOPs (3 x forward, without
the recomputation of activation checkpointing) a second over the fastest matrix product seen in the same rounds
(``trainer/monitor/peak_flops.py``, as in training). ``GiB`` is the peak memory of a step outside the timed rounds: what
the process would need with this model alone in it, see ``bench/common/memory.py``.

``--deeper`` is a routed model of twice the layers that explores a tenth of its skipped tokens, at the density where
training takes as many FLOPs as the dense model's: what ``bench.isoflop`` compares, in wall time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.common.options import (
    BATCH,
    CPU_BATCH,
    CPU_SIZES,
    CUDA_BATCH,
    CUDA_SIZES,
    DENSE,
    EXECUTIONS,
    MODEL,
    PEER,
    add_densities,
    add_numbers,
    add_run,
    model_config,
    parser,
    refuse,
    resolve,
    routed_name,
)
from bench.common.report import Result, Row, spread, tell
from bench.common.timing import Spread, ratios, take_turns
from model.flops import TRAINING_FACTOR, density_of, full_windows, training_flops
from settings import user_errors

if TYPE_CHECKING:
    from bench.common.contestants import Contestant, Ours
    from model.config import ModelConfig

PEAK, DEEPER = "matmul", "deeper"
SECONDS = "step_s"


def deeper(options: argparse.Namespace) -> ModelConfig:
    """The config of the contestant with twice the layers at equal FLOPs.

    Raises:
        ValueError: if there is no such density.
    """
    tokens, layers = options.tokens, 2 * options.layers

    def config(density: float) -> ModelConfig:
        return model_config(options, density, tokens, options.execution, explore=0.1, layers=layers)

    def flops(density: float) -> float:
        return training_flops(config(density), full_windows(config(density), 1.0, tokens, density))

    dense = model_config(options, None, tokens)
    density = density_of(flops, training_flops(dense, full_windows(dense, 1.0, tokens, 1.0)))
    if not 0 < density <= 1:
        raise ValueError(f"--deeper: no density makes {layers} routed layers cost what {options.layers} dense ones do")
    return config(density)


def build(options: argparse.Namespace) -> dict[str, Contestant]:
    """All contestants after one step, dense first, the peer's loss checked against ours."""
    import torch

    from bench.common.contestants import Ours, Peer, assert_same, held_decoder, held_llama, random_tokens
    from trainer.monitor.peak_flops import DTYPES

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    tokens = random_tokens(options.samples, options.tokens, options.vocab, device)

    def ours(density: float | None) -> Ours:
        config = model_config(options, density, options.tokens, options.execution)
        decoder = held_decoder(config, device, dtype, options.checkpointing)
        return Ours(decoder, compiled=options.compile)

    dense = ours(None)
    llama, _ = held_llama(dense.config, dense.model.state_dict(), device, dtype)
    if options.checkpointing:
        llama.activation_checkpointing_enable({"use_reentrant": False})
    peer = Peer(llama, dense.config)
    contestants: dict[str, Contestant] = {DENSE: dense, PEER: peer}
    contestants |= {routed_name(density): ours(density) for density in options.densities}
    if options.deeper:
        decoder = held_decoder(deeper(options), device, dtype, options.checkpointing)
        contestants[DEEPER] = Ours(decoder, compiled=options.compile)
    for contestant in contestants.values():
        contestant.feed(tokens)
    losses = {name: contestant.step() for name, contestant in contestants.items()}
    assert_same(losses[DENSE], losses[PEER], dtype)
    if device.type == "cuda":
        peer.compile_if_it_works()
    for contestant in contestants.values():
        contestant.measure_peak()
    return contestants


def measure(options: argparse.Namespace) -> Result:
    """Build the contestants and time them in turns, then compute FLOPs and ratios."""
    import torch

    from bench.common.contestants import Peer
    from trainer.monitor.peak_flops import DTYPES, PeakFlops

    device = torch.device(options.device)
    contestants = build(options)
    fastest = PeakFlops(device, DTYPES[options.dtype])
    calls: dict[str, Callable[[], object]] = {name: c.step for name, c in contestants.items()}
    seconds = take_turns({**calls, PEAK: fastest}, options.repeats, device)
    peak = fastest.flops_per_s
    rows = {name: row(name, contestants, options, seconds, peak) for name in contestants}
    to_peer = ratios(seconds[DENSE], seconds[PEER])
    notes = [contestant.note for contestant in contestants.values() if isinstance(contestant, Peer)]
    return Result(
        rows=list(rows.values()),
        peak=peak,
        measured=promised(rows) | {"step/dense_to_peer": to_peer.median},
        notes=[note for note in notes if note],
        findings=[f"{DENSE} / {PEER}: {spread(to_peer)}"],
    )


def row(
    name: str,
    contestants: Mapping[str, Contestant],
    options: argparse.Namespace,
    seconds: Mapping[str, list[float]],
    peak: float,
    case: str = "",
) -> Row:
    """A contestant's row.

    Args:
        name: of the contestant.
        contestants: all of them, after their last step.
        options: for device and dtype.
        seconds: every contestant's rounds.
        peak: the matmul peak, FLOP/s.
        case: prefix of the name, for example ``512x4/``.
    """
    contestant = contestants[name]
    executed, dense = contestant.flops()[0], contestants[DENSE].flops()[0]
    step_s = Spread.of(seconds[name]).median
    return Row(
        name=case + name,
        density=contestant.density(),
        device=options.device,
        dtype=options.dtype,
        tokens=contestant.tokens.numel(),
        seconds=step_s,
        to_dense=ratios(seconds[name], seconds[DENSE]),
        flop_bound_ratio=executed / dense,
        mfu_executed=TRAINING_FACTOR * executed / step_s / peak,
        peak_memory_bytes=contestant.peak_bytes,
    )


def promised(rows: Mapping[str, Row]) -> dict[str, float]:
    """Metrics that may have limits: every contestant's time and memory relative to dense, and the dense MFU."""
    dense = rows[DENSE]
    assert dense.mfu_executed is not None and dense.peak_memory_bytes is not None
    measured = {"step/dense_mfu": dense.mfu_executed}
    for name, found in rows.items():
        assert found.to_dense is not None and found.peak_memory_bytes is not None
        measured[f"step/{name}"] = found.to_dense.median
        measured[f"step/memory_{name}"] = found.peak_memory_bytes / dense.peak_memory_bytes
    return measured


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options, with the device's defaults filled in."""
    options_parser = parser("bench.step", __doc__)
    add_numbers(options_parser, MODEL | BATCH)
    add_densities(options_parser)
    options_parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile each of our layers (default: on cuda, not on cpu)",
    )
    options_parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="activation checkpointing, of ours and of the peer (default: no)",
    )
    options_parser.add_argument(
        "--execution",
        choices=EXECUTIONS,
        help="how routed layers compute executed tokens, the router's setting of that name (default: rounded)",
    )
    options_parser.add_argument("--deeper", action="store_true", help="add twice the layers at equal FLOPs")
    add_run(options_parser, repeats=10)
    options = options_parser.parse_args(arguments)
    both = {"checkpointing": False, "execution": "rounded"}
    resolve(
        options,
        cpu=CPU_SIZES | CPU_BATCH | both | {"compile": False},
        cuda=CUDA_SIZES | CUDA_BATCH | both | {"compile": True},
    )
    refuse(options, {"tokens": 2, "samples": 1})
    model_config(options, None, options.tokens)
    if options.deeper:
        deeper(options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write, and judge if asked to."""
    with user_errors():
        options = parse(arguments)
        tell(options, measure(options), [*MODEL, *BATCH, "execution", "compile", "checkpointing"], SECONDS)


if __name__ == "__main__":
    main()
