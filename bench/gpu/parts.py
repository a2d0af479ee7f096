"""The parts of ``make gpu``, the most important first, and which of their results the summary shows.

On a GPU the benchmarks have the sizes that their limits are stated for, and are judged by them. On a CPU, a rehearsal
of the same commands, everything is tiny and nothing is judged.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.gpu.schedule import Figures, Part, figures_file
from settings.project import ROOT, install_command

_TINY_MODEL = ["--layers=2", "--width=64", "--heads=4", "--kv-heads=2", "--ffn-width=96", "--vocab=128"]
_TINY_BATCH = ["--tokens=32", "--samples=2"]
_TINY = {
    "bench.step": [*_TINY_MODEL, *_TINY_BATCH, "--densities", "0.5"],
    "bench.attention": ["--heads=2", "--kv-heads=1", "--head-width=16", "--samples=2", "--lengths", "64"],
    "bench.decode": [*_TINY_MODEL, "--prompt=16", "--steps=4"],
    "bench.gpu.profiling": [*_TINY_MODEL, *_TINY_BATCH],
}
TESTS = "tests"
_WORKERS = 6
"""Test workers; each starts processes that need a core and a few GB of GPU memory."""
_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "": lambda row: str(row["name"]),
    "density": lambda row: _number(row["density"], ".3f"),
    "ms": lambda row: _number(1e3 * row.get("step_s", row.get("token_s", 0.0)), ",.2f"),
    "to dense": lambda row: _number(row["ratio_to_dense"], ".3f"),
    "FLOP bound": lambda row: _number(row["flop_bound_ratio"], ".3f"),
    "MFU": lambda row: _number(row["mfu_executed"], ".1%"),
    "GiB": lambda row: _number(None if row["peak_memory_bytes"] is None else row["peak_memory_bytes"] / 2**30, ".2f"),
}


def parts(device: str, out: Path) -> list[Part]:
    """All parts for ``device``, cpu or cuda, with their files in ``out``."""
    cuda = device == "cuda"

    def bench(name: str, what: str, words: list[str], weight: float, least_s: float, read: Any, **more: Any) -> Part:
        module, *options = words
        sizes = [] if cuda else _TINY.get(module, [])
        files = ["--device", device, "--json", str(figures_file(out, name))]
        command = (sys.executable, "-m", module, *sizes, *options, *files)
        return Part(name, what, command, weight, least_s if cuda else 1.0, read, **more)

    def step(execution: str, compiled: bool, weight: float) -> Part:
        judged = ["--check"] if cuda and compiled and execution == "rounded" else []
        words = ["bench.step", "--execution", execution, "--compile" if compiled else "--no-compile", "--repeats=5"]
        how = "compiled" if compiled else "not compiled"
        name = "-".join(("step", execution, how.replace("not ", "un")))
        return bench(name, f"training steps, {execution} execution, layers {how}", words + judged, weight, 40, _step)

    check = ["--check"] if cuda else []
    densities = ["--densities", "1", "0.5", "0.25"]
    return [
        bench("facts", "the device, the software, matrix products", ["bench.gpu.facts"], 6, 10, _own, needed=True),
        Part(TESTS, "the tests that need a GPU", _tests(cuda), 14, 40.0 if cuda else 1.0, _pytest),
        bench(
            "training",
            "a run with ZeRO 1 and ZeRO 3, each stopped and resumed, beside one on the CPU that is not",
            ["bench.gpu.training"],
            12,
            50,
            _own,
        ),
        step("rounded", compiled=True, weight=16),
        step("rounded", compiled=False, weight=9),
        step("capacity", compiled=True, weight=12),
        step("capacity", compiled=False, weight=8),
        bench(
            "attention",
            "attention of gathered queries alone, forward and backward",
            ["bench.attention", "--repeats=5", *check],
            8,
            25,
            _ratios(r"gathered_0\.5|hf_llama|flex"),
        ),
        bench(
            "decode",
            "token by token",
            ["bench.decode", "--batches", "1", "8", "--repeats=5", *densities, *check],
            12,
            40,
            _ratios(r"routed_0\.5|hf_llama\w*"),
        ),
        bench(
            "profile",
            "one training step at density 0.5, by kernel",
            ["bench.gpu.profiling", "--trace", str(out / "profile-trace.json.gz")],
            7,
            25,
            _own,
        ),
    ]


def _tests(cuda: bool) -> tuple[str, ...]:
    """pytest on the files with tests marked ``gpu``; without a GPU it reports why they are skipped."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text("utf-8")]
    workers = ["--numprocesses", str(min(_WORKERS, os.cpu_count() or 1)), "--dist", "load"] if cuda else []
    return (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *workers, *map(str, files))


def lacking_for_tests(names: Iterable[str]) -> str | None:
    """Packages that the part ``tests``, if in ``names``, lacks here, and the fix; training needs none of them."""
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    needed = [line.partition("==")[0] for line in lines if line.startswith("pytest")]
    missing = [name for name in needed if not _is_installed(name)]
    if TESTS not in names or not missing:
        return None
    return (
        f"the part {TESTS} will fail, as {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
        f"{install_command('requirements-dev.txt')}, or without network make wheels (docs/speed.md)"
    )


def _is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _own(found: Any, log: str) -> Figures:
    """For the commands in this folder, which choose their key figures themselves."""
    return Figures(found["key"], found["rows"])


def _pytest(found: Any, log: str) -> Figures:
    """The counts of pytest's last line."""
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", log.rpartition("\n=")[2])
    return Figures(", ".join(counts))


def _step(found: Any, log: str) -> Figures:
    ratios = _ratios(r"hf_llama|routed_.*")(found, log)
    (dense,) = (row for row in found if row["name"] == "dense")
    return Figures(f"{ratios.key}; dense MFU {_number(dense['mfu_executed'], '.1%')}", ratios.rows)


def _ratios(names: str) -> Callable[[Any, str], Figures]:
    """For a benchmark's rows: all as a table; key figures are times relative to dense of those matching ``names``."""

    def read(found: Any, log: str) -> Figures:
        rows = [{column: cell(row) for column, cell in _COLUMNS.items()} for row in found]
        cases: dict[str, list[str]] = {}
        for row in found:
            case, _, name = row["name"].rpartition("/")
            if re.fullmatch(names, name):
                cases.setdefault(case, []).append(f"{name} {row['ratio_to_dense']:.2f}")
        times = [
            f"{case.replace('_', ' ')}: {', '.join(found)}" if case else ", ".join(found)
            for case, found in cases.items()
        ]
        return Figures(f"time to dense {'; '.join(times)}", rows)

    return read


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def chosen(all_parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The parts in ``names``, in the order of ``all_parts``; all if ``names`` is empty.

    Raises:
        ValueError: for an unknown name.
    """
    known = [part.name for part in all_parts]
    for name in names:
        if name not in known:
            raise ValueError(f"--only {name}: there is no such part; the parts are {', '.join(known)}")
    return [part for part in all_parts if not names or part.name in names]
