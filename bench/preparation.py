"""How fast text is read and prepared: by several processes of one command, and by several commands that share parts.

    python -m bench.preparation my.yaml [key.sub=value ...] --workers 1,2 --tasks 1,2,7 --out preparation.json

CONFIG's tokenizer must exist; its sources are read, and prepared in temporary folders below ``--disk``. A row of
``--workers`` is one command with that many processes; a row of ``--tasks`` is that many commands at once on this
machine, of one process each, as on a cluster. ``reading`` only reads the documents, eight times. MB are 10^6 bytes of
UTF-8 text; times include a command's start-up. All preparations must write the same bytes; otherwise the last line says
so and the exit status is 1.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from bench.common.children import Children
from bench.common.turns import last_words
from data.config import DataConfig, load_data
from data.files import sha256_of
from data.prepare.parts import Part, Report
from data.prepare.processes import work_through
from data.prepare.run import parts_of, tokenizer_of, verify
from data.shards import Manifest
from settings import command_parser, counted, parse_arguments, path_argument, user_errors, whole_number

_REPORT_BYTES = 1 << 20
_READINGS = 8
"""How often everything is read, because reading is fast and processes start slowly."""


def read_part(part: Part, _: int, report: Report) -> None:
    """Read all documents of a part, and report the bytes of their text."""
    size = 0
    for document in part.source.documents(part.start, part.end):
        size += len(document.text)
        if size > _REPORT_BYTES:
            report(size, part.source.label(document.after))
            size = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, compare."""
    parser = command_parser("bench.preparation", __doc__)
    parser.add_argument("config", help="YAML file; only its data block is read")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for example data.part_bytes=12500000")
    parser.add_argument("--workers", type=_numbers, default=[1, 2], help="processes of one command (default: 1,2)")
    parser.add_argument("--tasks", type=_numbers, default=[1, 2, 7], help="commands at once (default: 1,2,7)")
    parser.add_argument(
        "--disk", type=path_argument, default=Path(), help="folder to write below (default: the current one)"
    )
    parser.add_argument("--out", type=path_argument, help="also write the figures as JSON")
    options = parse_arguments(parser, arguments)
    with user_errors():
        config = load_data(options.config, options.overrides)
        figures = measure(config, options.workers, options.tasks, options.disk)
        print(report(figures), flush=True)
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if figures["same_bytes"] else 1


def measure(config: DataConfig, workers: Sequence[int], tasks: Sequence[int], disk: Path) -> dict[str, Any]:
    """Number of parts, bytes of text, seconds of every row, and whether all preparations wrote the same bytes."""
    parts = [part for of_set in parts_of(config, tokenizer_of(config)) for part in of_set]
    rows: list[tuple[str, float]] = []
    hashes = set()
    for count in workers:
        start_s = time.perf_counter()
        work_through(parts * _READINGS, read_part, count, "bytes", divisible=False)
        rows.append((f"reading, {counted(count, 'process', 'processes')}", (time.perf_counter() - start_s) / _READINGS))
    made: list[tuple[str, Manifest]] = []
    ways = [(f"preparing, {counted(count, 'worker')}", [["--workers", str(count)]]) for count in workers]
    ways += [(f"preparing, {counted(count, 'task')} of 1 worker", _shares(count)) for count in tasks]
    for name, commands in ways:
        with tempfile.TemporaryDirectory(dir=disk) as folder:
            own = config.model_copy(update={"dir": folder})
            for path in Path(config.dir).glob("tokenizer*"):
                shutil.copy(path, folder)
            file = Path(folder) / "config.yaml"
            file.write_text(yaml.safe_dump({"data": own.model_dump(mode="json")}))
            rows.append((name, _prepare(file, commands)))
            made = verify(own)
            hashes.add(tuple(sha256_of(path) for path in sorted(Path(folder).rglob("manifest.json"))))
    return {
        "parts": len(parts),
        "text_bytes": sum(manifest.text_bytes for _, manifest in made),
        "seconds": dict(rows),
        "same_bytes": len(hashes) == 1,
    }


def report(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    size = figures["text_bytes"]
    lines = [f"{size:,} bytes of text in {counted(figures['parts'], 'part')}", f"{'':<32}{'s':>8}{'MB/s':>8}"]
    lines += [f"{name:<32}{seconds:8.1f}{size / seconds / 1e6:8.1f}" for name, seconds in figures["seconds"].items()]
    lines.append("all left the same bytes" if figures["same_bytes"] else "they did NOT leave the same bytes")
    return "\n".join(lines)


def _shares(tasks: int) -> list[list[str]]:
    return [["--workers", "1", "--part", f"{number}/{tasks}"] for number in range(tasks)]


def _prepare(file: Path, each: Sequence[Sequence[str]]) -> float:
    """Run one command for each list of arguments, all at once; returns seconds until the last has ended."""
    start_s = time.perf_counter()
    command = [sys.executable, "-m", "data.prepare", str(file)]
    logs = [file.with_name(f"task-{number}.log") for number in range(len(each))]
    with Children() as children, ThreadPoolExecutor(len(each)) as pool:
        statuses = list(pool.map(lambda more, log: children.run([*command, *more], log), each, logs))
    took_s = time.perf_counter() - start_s
    for log, status in zip(logs, statuses, strict=True):
        if status:
            raise ValueError(f"data.prepare failed: {last_words(log, status)}")
    return took_s


def _numbers(text: str) -> list[int]:
    return [whole_number()(part) for part in text.split(",") if part]


if __name__ == "__main__":
    raise SystemExit(main())
