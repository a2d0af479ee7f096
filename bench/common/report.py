"""A benchmark's output: a header, a table to read, rows of JSON, and under ``--check`` a verdict on every limit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.limits import judge, require
from bench.common.timing import Spread

NOISY = 0.25
"""Interquartile range, as a share of the median, above which a ratio is called noisy."""


@dataclass(frozen=True)
class Row:
    """One contestant's result; None where a figure makes no sense.

    Attributes:
        name: of the contestant, prefixed with its case if there are several: ``512x4/routed_0.5``.
        density: measured share of tokens that routed sites executed.
        device, dtype: as requested.
        tokens: tokens of one measured call.
        seconds: median; of a training step, or when decoding, of one token for every row of the batch.
        to_dense: ratio to the dense contestant within each round.
        flop_bound_ratio: executed FLOPs over the dense contestant's.
        mfu_executed: executed FLOPs a second over the measured matmul peak.
        peak_memory_bytes: with this contestant alone.
    """

    name: str
    density: float | None
    device: str
    dtype: str
    tokens: int
    seconds: float
    to_dense: Spread | None
    flop_bound_ratio: float | None
    mfu_executed: float | None
    peak_memory_bytes: int | None

    def as_json(self, seconds_name: str) -> dict[str, Any]:
        """The row's fields in a fixed order; ``seconds_name`` is ``step_s`` or ``token_s``."""
        return {
            "name": self.name,
            "density": self.density,
            "device": self.device,
            "dtype": self.dtype,
            "tokens": self.tokens,
            seconds_name: self.seconds,
            "ratio_to_dense": None if self.to_dense is None else self.to_dense.median,
            "flop_bound_ratio": self.flop_bound_ratio,
            "mfu_executed": self.mfu_executed,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class Result:
    """Results of a benchmark.

    Attributes:
        rows: one per contestant and case.
        peak: the machine's matmul peak in the same rounds, FLOP/s.
        measured: values by metric; ``bench/common/limits.py`` has limits for some.
        notes: lines for the header.
        findings: lines for below the table.
    """

    rows: list[Row]
    peak: float
    measured: Mapping[str, float]
    notes: Sequence[str] = ()
    findings: Sequence[str] = ()


def tell(options: argparse.Namespace, result: Result, names: Iterable[str], seconds_name: str) -> None:
    """Print, write ``--json`` if given, and judge if ``--check`` is.

    Args:
        names: options to show in the header.
        seconds_name: ``step_s`` or ``token_s``.

    Raises:
        ValueError: under ``--check``, for a missed limit, or where there was nothing to judge.
    """
    print(header(options, result.peak, names, result.notes))
    print(table(result.rows, seconds_name))
    for line in [*result.findings, *noisy(result.rows)]:
        print(line)
    write_json(options.json, result.rows, seconds_name)
    if options.check:
        check(options, result.measured)


def header(options: argparse.Namespace, peak: float, names: Iterable[str], notes: Iterable[str] = ()) -> str:
    """Header: what the figures depend on.

    Args:
        peak: the machine's measured matmul peak, FLOP/s.
        names: options to show.
        notes: further lines.
    """
    import torch

    device = torch.device(options.device)
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    shown = " ".join(f"{name}={_shown(getattr(options, name))}" for name in names)
    lines = [
        f"{place}, torch {torch.__version__}, {options.dtype}, matmul peak {peak / 1e9:,.0f} GFLOP/s",
        f"{shown}, {options.repeats} rounds",
        *notes,
    ]
    return "\n".join(lines)


def table(rows: list[Row], seconds_name: str) -> str:
    """The rows as a text table; ratios with their quartiles."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{'':{width}} {'density':>7} {seconds_name:>10} {'to dense (quartiles)':>23} {'FLOP bound':>10} {'MFU':>6} "
        f"{'GiB':>6}"
    ]
    for row in rows:
        memory = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**30
        lines.append(
            f"{row.name:{width}} {_cell(row.density, '7.3f')} {row.seconds:10.6f} {spread(row.to_dense):>23} "
            f"{_cell(row.flop_bound_ratio, '10.3f')} {_cell(row.mfu_executed, '6.1%')} {_cell(memory, '6.2f')}"
        )
    return "\n".join(lines)


def spread(value: Spread | None) -> str:
    """Median and quartiles of a ratio."""
    return "-" if value is None else f"{value.median:.3f} ({value.low:.3f} - {value.high:.3f})"


def noisy(rows: list[Row]) -> list[str]:
    """A line naming the rows with too noisy a ratio to dense, if there are any."""
    wide = [row.name for row in rows if row.to_dense is not None and _width(row.to_dense) > NOISY]
    if not wide:
        return []
    return [
        f"noisy: quartiles more than {NOISY:.0%} of the median apart, repeat on a quieter machine: {', '.join(wide)}"
    ]


def write_json(path: Path | None, rows: list[Row], seconds_name: str) -> None:
    """Write the rows as a list, if a file was asked for."""
    if path is not None:
        content = [row.as_json(seconds_name) for row in rows]
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check(options: argparse.Namespace, measured: Mapping[str, float]) -> None:
    """Judge what was measured and print every verdict.

    Raises:
        ValueError: for a missed limit, or where there was nothing to judge.
    """
    verdicts = judge(measured, options.device)
    for verdict in verdicts:
        print(verdict)
    if options.other_sizes:
        changed = ", ".join(f"{name}={_shown(getattr(options, name))}" for name in options.other_sizes)
        print(f"limits are stated for this device's default sizes; these differ: {changed}")
    require(verdicts)


def _width(ratio: Spread) -> float:
    """Interquartile range relative to the median."""
    return (ratio.high - ratio.low) / ratio.median


def _cell(value: float | None, form: str) -> str:
    """A number in ``form``, or a dash of the same width."""
    return f"{'-':>{int(form.split('.')[0])}}" if value is None else f"{value:{form}}"


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
