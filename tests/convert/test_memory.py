"""An export holds one shard of the weights in memory, wherever they come from, and an average one parameter.

``python -m tests.convert.test_memory FOLDER SMALL OUT`` exports SMALL, so that everything is imported, then each source
in FOLDER, averages two, and writes down how much memory that took at most.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from convert import hf_compare, to_hf
from convert.average import average
from model.decoder import Decoder
from tests.convert.exports import make_large, make_tuned, write_run
from tests.launching import ROOT, environment
from trainer.checkpoints.weights_folder import write_weights
from trainer.deepspeed_internals import import_deepspeed

SHARD_BYTES = 8_000_000
_SAMPLED_EVERY_S = 0.002


def _weights(folder: Path, decoder: Decoder, data: dict[str, Any]) -> None:
    write_weights(decoder, folder, Path(data["dir"]), {"source": "a test"})


def _parted(folder: Path, decoder: Decoder, data: dict[str, Any]) -> None:
    decoder.ensemble = None
    write_run(folder, decoder, data, stage=3, ranks=2)


def _tuned(folder: Path, decoder: Decoder, data: dict[str, Any]) -> None:
    tuned, block = make_tuned(decoder, "dora")
    write_run(folder, tuned, data, adapter=block)


SOURCES: dict[str, Callable[..., None]] = {"weights": _weights, "zero-3-of-2-ranks": _parted, "tuned": _tuned}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_one_shard_in_memory(
    tmp_path: Path, corpus: dict[str, Any], exported: Callable[[str], tuple[Path, Path]]
) -> None:
    folder, out = tmp_path / "sources", tmp_path / "grown.json"
    folder.mkdir()
    for name, write in SOURCES.items():
        decoder = make_large()
        write(folder / name, decoder, corpus)
        if name == "weights":
            write(folder / "others", decoder, corpus)
    model_bytes = sum(parameter.numel() for parameter in decoder.parameters()) * 4
    command = [sys.executable, "-m", "tests.convert.test_memory", str(folder), str(exported("layer")[0]), str(out)]
    # What is freed goes back to the system at once, as tensors of large models do by themselves.
    at_once = environment() | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, cwd=ROOT, env=at_once, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(out.read_text())
    assert measured.pop("average") < 0.25 * model_bytes
    for name, grown in measured.items():
        assert grown < 0.5 * model_bytes, f"{name}: {grown / 1e6:.0f} MB beside {model_bytes / 1e6:.0f} MB of weights"
        assert len(list((folder / f"{name}-hf").glob("*.safetensors"))) > 5


def _anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@contextmanager
def _growth() -> Iterator[list[int]]:
    """What is held at most so far, in bytes above the beginning."""
    seen, start, over = [0], _anonymous_bytes(), threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLED_EVERY_S):
            seen[0] = max(seen[0], _anonymous_bytes() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def _main(folder: Path, small: Path, out: Path) -> None:
    import_deepspeed()  # which SMALL does not need, and checkpoints of stage one do
    to_hf.export(small, folder / "small-hf")
    hf_compare._GREEDY_TOKENS = 4
    grown: dict[str, int] = {}
    for name in SOURCES:
        with _growth() as growth:

            def compare(*_: Any, name: str = name, growth: list[int] = growth) -> str:
                grown[name] = growth[0]  # transformers' own memory is not what this is about
                return "not compared"

            hf_compare.compare = compare
            to_hf.export(folder / name, folder / f"{name}-hf", shard_bytes=SHARD_BYTES)
    with _growth() as growth:
        average([folder / "weights", folder / "others"], folder / "mean")
    out.write_text(json.dumps(grown | {"average": growth[0]}))


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
