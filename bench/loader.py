"""Measure what data loading costs a training step.

    python -m bench.loader                                 # CPU: 22M parameters; CUDA: 1B
    python -m bench.loader --steps 20 --repeats 3 --json loader.json
    python -m bench.loader --check                         # exit 1 if steps wait longer than the limit

Two sources of random documents are written to a temporary folder as ``data.prepare`` would. A round then takes

    from_loader   --steps training steps of our dense model, each on the next batch of ``TrainingData`` through a
                  new ``prefetch``, as in ``trainer/loop.py``; the first ones, before prefetching has run ahead,
                  are not counted
    dense         as many steps on a batch that is already in memory
    loader        as many batches from ``TrainingData`` with nothing else running

Printed below the table: the share of a step's time spent waiting for its batch (``Prefetch.waited_s``), and the tokens
per second that the loader supplies and a step consumes. ``ratio_to_dense`` of ``from_loader`` includes all costs of
loading, with the thread's share of the CPU, but also the noise of a shared machine. The shards were just written, so
they are read from the page cache: a slow disk is not measured.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from bench.common.options import (
    BATCH,
    CPU_BATCH,
    CPU_SIZES,
    CUDA_BATCH,
    CUDA_SIZES,
    DENSE,
    MODEL,
    add_numbers,
    add_run,
    model_config,
    parser,
    refuse,
    resolve,
)
from bench.common.report import Result, Row, tell
from bench.common.timing import WARM_UP_ROUNDS, Spread, ratios
from data.config import DataConfig
from data.files import write_atomically
from data.prefetch import prefetch
from data.sentencepiece_file import MODEL_NAME
from data.shards import FORMAT_VERSION, ShardWriter, token_dtype
from data.sources import Cursor, Document
from data.store import train_folder
from data.tokenization import tokenizer_sha256
from data.tokenizer_training import EOS_ID
from model.flops import TRAINING_FACTOR
from settings import user_errors

if TYPE_CHECKING:
    import torch

    from bench.common.contestants import Ours
    from data.batches import Batch, TrainingData

FROM_LOADER, LOADER = "from_loader", "loader"
SECONDS = "step_s"
DEPTH = 2
"""Steps loaded ahead, as in ``trainer/loop.py``."""
SHARD_TOKENS = 1_000_000
MEAN_DOCUMENT_TOKENS = 700
SOURCES = {"large": 0.75, "small": 0.25}
"""Name and share of the tokens; samples are drawn from both equally."""


@dataclass
class LoaderRounds:
    """Measurements of all rounds.

    Attributes:
        seconds: of a step or, for the loader, a batch, by contestant.
        waited: share of the time of the ``from_loader`` steps spent waiting for batches.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {FROM_LOADER: [], DENSE: [], LOADER: []})
    waited: list[float] = field(default_factory=list)


def write_shards(folder: Path, vocab: int, tokens: int, sequence_tokens: int) -> DataConfig:
    """Write two sources with ``tokens`` random tokens in total, in documents of random length; returns their config."""
    config = DataConfig.model_validate(
        {
            "dir": str(folder),
            "sequence_tokens": sequence_tokens,
            "shard_tokens": SHARD_TOKENS,
            "sources": [{"name": name, "files": ["none"]} for name in SOURCES],
        }
    )
    # Shards are tied to a tokenizer by its hash; nothing here is ever tokenized.
    write_atomically(folder / MODEL_NAME, b"random tokens have no tokenizer")
    made_from = {"format_version": FORMAT_VERSION, "tokenizer_sha256": tokenizer_sha256(folder)}
    rng = np.random.default_rng(0)
    for name, share in SOURCES.items():
        source_folder = train_folder(config, name)
        source_folder.mkdir(parents=True)
        writer = ShardWriter(source_folder, token_dtype(vocab), SHARD_TOKENS, [])
        written = 0
        while written < share * tokens:
            lengths = rng.geometric(1 / MEAN_DOCUMENT_TOKENS, size=SHARD_TOKENS // MEAN_DOCUMENT_TOKENS)
            documents = [Document(b"-", False, Cursor(0, number)) for number in range(len(lengths))]
            ids = rng.integers(vocab, size=int(lengths.sum()))
            ids[np.cumsum(lengths) - 1] = EOS_ID
            writer.add(documents, ids, lengths)
            written += len(ids)
        writer.finish(vocab, EOS_ID, made_from)
    return config


def step_batches(data: TrainingData, first_step: int, samples: int) -> Iterator[Batch]:
    """One batch a step, forever, as ``trainer/loop.py`` takes them on one rank."""
    from data.batches import step_sample_ids

    for step in itertools.count(first_step):
        (ids,) = step_sample_ids(step * samples, samples, rank=0, world_size=1, micro_batch=samples, accumulation=1)
        yield data.batch(ids)


def train_on(ours: Ours, batch: Batch, device: torch.device) -> None:
    """One training step on ``batch``."""
    from trainer.step import to_device

    moved = to_device(batch, device)
    ours.feed(moved.tokens, moved.targets)
    ours.step()


def take_round(rounds: LoaderRounds, number: int, ours: Ours, data: TrainingData, options: argparse.Namespace) -> None:
    """One round of all contestants, on its own samples."""
    import torch

    from trainer.monitor.peak_flops import seconds_of

    device, steps = torch.device(options.device), options.steps
    first_step = number * (2 * DEPTH + 2 * steps)
    with prefetch(step_batches(data, first_step, options.samples), DEPTH) as batches:
        for _ in range(DEPTH):
            train_on(ours, next(batches), device)
        waited_before, start_s = batches.waited_s, time.perf_counter()
        for _ in range(steps):
            train_on(ours, next(batches), device)
        elapsed_s = time.perf_counter() - start_s
        rounds.waited.append((batches.waited_s - waited_before) / elapsed_s)
    rounds.seconds[FROM_LOADER].append(elapsed_s / steps)

    in_memory = next(step_batches(data, first_step, options.samples))
    took_s = [seconds_of(lambda: train_on(ours, in_memory, device), device) for _ in range(steps)]
    rounds.seconds[DENSE].append(sum(took_s) / steps)

    alone = step_batches(data, first_step + 2 * DEPTH + steps, options.samples)
    took_s = [seconds_of(lambda: next(alone), device) for _ in range(steps)]
    rounds.seconds[LOADER].append(sum(took_s) / steps)


def measure(options: argparse.Namespace) -> Result:
    """Write the shards, build the model, take the rounds, compute the result."""
    import torch

    from bench.common.contestants import Ours, held_decoder
    from data.batches import TrainingData
    from trainer.monitor.peak_flops import DTYPES, PeakFlops

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    ours = Ours(held_decoder(model_config(options, None, options.tokens), device, dtype))
    fastest = PeakFlops(device, dtype)
    rounds = LoaderRounds()
    with tempfile.TemporaryDirectory() as folder:
        config = write_shards(Path(folder), options.vocab, options.data_tokens, options.tokens)
        data = TrainingData(config, pin_memory=device.type == "cuda")
        for _ in range(WARM_UP_ROUNDS):
            train_on(ours, next(step_batches(data, 0, options.samples)), device)
            fastest()
        for number in tqdm(range(options.repeats), unit="round", disable=not sys.stderr.isatty()):
            take_round(rounds, number, ours, data, options)
            fastest()
    ours.measure_peak()
    return result(rounds, ours, options, fastest.flops_per_s)


def result(rounds: LoaderRounds, ours: Ours, options: argparse.Namespace, peak: float) -> Result:
    """Rows, and the share of time spent waiting."""
    tokens = options.samples * options.tokens
    executed, _ = ours.flops()
    medians = {name: Spread.of(seconds).median for name, seconds in rounds.seconds.items()}
    rows = [
        Row(
            name=name,
            density=None if name == LOADER else 1.0,
            device=options.device,
            dtype=options.dtype,
            tokens=tokens,
            seconds=medians[name],
            to_dense=ratios(rounds.seconds[name], rounds.seconds[DENSE]),
            flop_bound_ratio=None if name == LOADER else 1.0,
            mfu_executed=None if name == LOADER else TRAINING_FACTOR * executed / medians[name] / peak,
            peak_memory_bytes=ours.peak_bytes if name == DENSE else None,
        )
        for name in (DENSE, FROM_LOADER, LOADER)
    ]
    waited = Spread.of(rounds.waited).median
    return Result(
        rows=rows,
        peak=peak,
        measured={"loader/waited_share": waited},
        findings=[
            f"waited for data: {waited:.4%} of a step (median of rounds; largest {max(rounds.waited):.4%})",
            f"tokens a second: {tokens / medians[LOADER]:,.0f} loaded with nothing else to do, "
            f"{tokens / medians[DENSE]:,.0f} trained on",
        ],
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options, with the device's defaults filled in."""
    options_parser = parser("bench.loader", __doc__)
    add_numbers(options_parser, MODEL | BATCH)
    options_parser.add_argument("--steps", type=int, default=5, help="counted steps a round (default: %(default)s)")
    options_parser.add_argument(
        "--data-tokens", type=int, default=20_000_000, help="tokens of the made-up sources (default: %(default)s)"
    )
    add_run(options_parser, repeats=5)
    options = options_parser.parse_args(arguments)
    resolve(options, CPU_SIZES | CPU_BATCH, CUDA_SIZES | CUDA_BATCH)
    refuse(options, {"tokens": 2, "samples": 1, "steps": 1, "vocab": EOS_ID + 1, "data_tokens": 1})
    model_config(options, None, options.tokens)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write, and judge if asked to."""
    with user_errors():
        options = parse(arguments)
        tell(options, measure(options), [*MODEL, *BATCH, "steps", "data_tokens"], SECONDS)


if __name__ == "__main__":
    main()
