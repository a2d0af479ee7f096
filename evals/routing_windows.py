"""What the routing report reads: windows of text files, or of a run's validation set, and the run's metrics.

Every window is a batch of its own, because the last one of a document is shorter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batches import NO_TARGET, Batch
from data.config import SourceConfig
from data.sources import COMPRESSIONS, FORMATS, Cursor, Source
from evals.routing_page import History
from evals.windows import open_set
from trainer.config import RunConfig
from tune.config import TuneConfig
from tune.examples import read_examples
from tune.text import TextTokenizer

_POINTS = 60  # of a line in the picture


def file_windows(files: Sequence[Path], tokenizer: TextTokenizer, length: int, tokens: int) -> list[Batch]:
    """About ``tokens`` tokens of ``files``, an equal part of each, in windows of at most ``length`` tokens.

    A window holds tokens of one document only; the end of the document is its last token. Formats are told from the
    names as in training data; what has no known ending is plain text.

    Raises:
        ValueError: if a file cannot be read.
    """
    windows: list[Batch] = []
    for done, file in enumerate(files):
        if not file.is_file():
            raise ValueError(f"there is no file {file}; give text files, or none to take the run's validation set")
        room = (tokens - sum(batch.tokens.numel() for batch in windows)) // (len(files) - done)
        for text in _documents(file):
            if room < 1:
                break
            # No piece is near 64 characters, so this is enough of a long text, and the rest is not encoded.
            ids = [*tokenizer.prefix, *tokenizer.encode(text[: 64 * room]), tokenizer.eos_id][: room + 1]
            inputs = ids[:room]
            windows += _cut(inputs, [*ids[1:], NO_TARGET][: len(inputs)], length, len(windows))
            room -= len(inputs)
    return windows


def _documents(file: Path) -> Iterator[str]:
    """The texts of a file, the empty ones left out."""
    suffix = Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix
    kind: Any = None if suffix.lower() in FORMATS else "text"
    source = Source(SourceConfig(name="text", files=[str(file)], format=kind))
    try:
        for document in source.documents(Cursor(0, 0)):
            if document.text:
                yield document.text.decode()
    except ValueError as error:
        # Its advice is for a config.
        reason = str(error.__cause__ or error).split(";")[0]
        raise ValueError(
            f"{file} cannot be read: {reason}; give plain text, or JSON lines, Parquet or CSV with a field 'text'"
        ) from error


def _cut(inputs: Sequence[int], targets: Sequence[int], length: int, first: int) -> list[Batch]:
    """Windows of at most ``length`` tokens, numbered from ``first`` on."""
    rows: list[Batch] = []
    for start in range(0, len(inputs), length):
        span = slice(start, start + length)
        row = [torch.tensor([list(part[span])]) for part in (inputs, targets)]
        rows.append(Batch(row[0], row[1], torch.tensor([first + len(rows)]), None, None))
    return rows


def own_windows(config: RunConfig | TuneConfig, tokenizer: TextTokenizer, tokens: int) -> tuple[str, list[Batch]]:
    """About ``tokens`` tokens of the run's first validation set, evenly spread over it; and what they are, in words.

    Raises:
        ValueError: if the run has no validation set.
    """
    if isinstance(config, RunConfig):
        opened = open_set(config.data, None)
        batches = list(opened.batches(0, 1, 1, max(tokens // config.data.sequence_tokens, 1)))
        return f"validation set {opened.name}", batches
    if not config.data.validation:
        raise ValueError("the run's config has no data.validation, and there is nothing else to read; give text files")
    source = config.data.validation[0]
    examples = read_examples(source, config.data, tokenizer)
    wanted = min(max(int(tokens / examples.inputs.mean()), 1), len(examples))
    windows: list[Batch] = []
    for place in range(wanted):
        ids, learned = examples.entry(place * len(examples) // wanted)
        targets = np.where(learned, ids, NO_TARGET)[1:]
        windows += _cut(ids[:-1].tolist(), targets.tolist(), len(ids), len(windows))
    return f"validation set {source.name}, an example a window", windows


def read_history(metrics: Path, sites: Sequence[str], target: float, step: int) -> History | None:
    """Densities up to ``step`` from a run's ``metrics.jsonl``; None where it is missing or has none."""
    names = [f"density/{site}" for site in sites]
    found: dict[int, dict[str, Any]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that still goes on, or was killed
            continue
        if all(name in entry for name in names) and entry.get("step", step) <= step:
            found[entry["step"]] = entry  # of a step that was taken again after a resume, the later one
    if len(found) < 2 or not names:
        return None
    logged = sorted(found)
    steps = sorted({logged[round(place * (len(logged) - 1) / (_POINTS - 1))] for place in range(_POINTS)})
    targets = [found[n].get("budget/target", target) for n in steps]
    return History(steps, [[found[n][name] for n in steps] for name in names], targets)
