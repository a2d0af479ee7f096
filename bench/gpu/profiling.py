"""Profile one training step of a routed decoder: a trace to look at, and where the time goes.

    python -m bench.gpu.profiling --trace trace.json.gz --json profile.json
    python -m bench.gpu.profiling --density 0.25 --execution capacity --no-compile

The trace opens in https://ui.perfetto.dev and in chrome://tracing. The table lists the device kernels (on a CPU, the
operators) with the most self time; ``share`` is of the step's wall time, so on a GPU the remainder to 100 % is time in
which it waited for the host.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.common.options import (
    BATCH,
    CPU_BATCH,
    CPU_SIZES,
    CUDA_BATCH,
    CUDA_SIZES,
    EXECUTIONS,
    MODEL,
    add_numbers,
    add_run,
    model_config,
    parser,
    refuse,
    resolve,
)
from bench.common.timing import WARM_UP_ROUNDS
from data.files import write_json
from settings import path_argument, user_errors

if TYPE_CHECKING:
    from torch.profiler import profile

    from bench.common.contestants import Ours

ROWS = 20
_NAME_CHARACTERS = 80


def build(options: argparse.Namespace) -> Ours:
    """The decoder with its batch, warmed up."""
    import torch

    from bench.common.contestants import Ours, held_decoder, random_tokens
    from trainer.monitor.peak_flops import DTYPES

    device = torch.device(options.device)
    config = model_config(options, options.density, options.tokens, options.execution)
    ours = Ours(held_decoder(config, device, DTYPES[options.dtype]), compiled=options.compile)
    ours.feed(random_tokens(options.samples, options.tokens, options.vocab, device))
    for _ in range(1 + WARM_UP_ROUNDS):
        ours.step()
    return ours


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Key figures and the table; writes the trace if asked to."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from trainer.monitor.peak_flops import seconds_of

    device = torch.device(options.device)
    ours = build(options)
    alone_s = seconds_of(ours.step, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        step_s = seconds_of(ours.step, device)
    if options.trace is not None:
        profiled.export_chrome_trace(str(options.trace))
    rows, busy_s, calls = table(profiled, step_s, device.type)
    what = "in kernels" if device.type == "cuda" else "in operators"
    times = f"step {1e3 * alone_s:,.1f} ms ({1e3 * step_s:,.1f} profiled)"
    return {"key": f"{times}, {busy_s / step_s:.0%} of it {what}, {calls:,} calls", "rows": rows}


def table(profiled: profile, step_s: float, device: str) -> tuple[list[dict[str, Any]], float, int]:
    """The top :data:`ROWS` rows, and the total seconds and calls of all rows."""
    from torch.autograd import DeviceType

    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    found = []
    for event in profiled.key_averages():
        own_us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        # A span covers kernels that have their own rows.
        span = device == "cuda" and getattr(event, "is_user_annotation", False)
        if event.device_type == kind and own_us > 0 and not span:
            found.append((own_us / 1e6, event.count, event.key))
    found.sort(reverse=True)
    rows = [
        {
            "name": name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 3]}...",
            "calls": count,
            "ms": f"{1e3 * own_s:,.3f}",
            "share": f"{own_s / step_s:.1%}",
        }
        for own_s, count, name in found[:ROWS]
    ]
    return rows, sum(own_s for own_s, _, _ in found), sum(count for _, count, _ in found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile, print, write."""
    with user_errors():
        options = parse(arguments)
        found = measure(options)
        print(found["key"])
        for row in found["rows"]:
            print(f"{row['share']:>6} {row['ms']:>10} ms {row['calls']:>6} x {row['name']}")
        if options.json is not None:
            write_json(options.json, found)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options, with the device's defaults filled in."""
    options_parser = parser("bench.gpu.profiling", __doc__)
    add_numbers(options_parser, MODEL | BATCH)
    options_parser.add_argument(
        "--density", type=float, default=0.5, help="share of tokens that layers execute (default: %(default)s)"
    )
    options_parser.add_argument(
        "--execution", choices=EXECUTIONS, default="rounded", help="how they are computed (default: %(default)s)"
    )
    options_parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile each layer (default: on cuda, not on cpu)"
    )
    options_parser.add_argument("--trace", type=path_argument, help="write a Chrome trace here; .gz packs it")
    add_run(options_parser, repeats=1, check=False)
    options = options_parser.parse_args(arguments)
    resolve(options, CPU_SIZES | CPU_BATCH | {"compile": False}, CUDA_SIZES | CUDA_BATCH | {"compile": True})
    refuse(options, {"tokens": 2, "samples": 1})
    model_config(options, options.density, options.tokens, options.execution)
    return options


if __name__ == "__main__":
    main()
