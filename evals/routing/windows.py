"""What the routing report reads: windows of text files, or of a run's validation set, and the run's metrics.

Every window is a batch of its own, because the last one of a document is shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batches import IGNORE_INDEX, Batch
from data.tokenization import TextTokenizer
from evals.routing.page import History
from evals.texts import texts_of
from evals.windows import open_set
from trainer.config import PretrainConfig
from trainer.monitor import metrics_file
from tune.config import TuneConfig
from tune.examples import read_examples

_POINTS = 60  # of a line in the picture


def file_windows(
    files: Sequence[Path],
    tokenizer: TextTokenizer,
    length: int,
    tokens: int,
    kind: str | None = None,
    text_field: str = "text",
) -> list[Batch]:
    """About ``tokens`` tokens of ``files``, an equal part of each, in windows of at most ``length`` tokens.

    A window holds tokens of one document only; the end of the document is its last token. Files are read as
    :func:`evals.texts.texts_of` does.

    Raises:
        ValueError: if a file cannot be read.
    """
    windows: list[Batch] = []
    for done, file in enumerate(files):
        room = (tokens - sum(batch.tokens.numel() for batch in windows)) // (len(files) - done)
        for text in texts_of(file, kind, text_field):
            if room < 1:
                break
            if not text:
                continue
            # No piece is near 64 characters, so this is enough of a long text, and the rest is not encoded.
            ids = [*tokenizer.prefix, *tokenizer.encode(text[: 64 * room]), tokenizer.eos_id][: room + 1]
            inputs = ids[:room]
            windows += _cut(inputs, [*ids[1:], IGNORE_INDEX][: len(inputs)], length, len(windows))
            room -= len(inputs)
    return windows


def _cut(inputs: Sequence[int], targets: Sequence[int], length: int, first: int) -> list[Batch]:
    """Windows of at most ``length`` tokens, numbered from ``first`` on."""
    rows: list[Batch] = []
    for start in range(0, len(inputs), length):
        span = slice(start, start + length)
        row = [torch.tensor([list(part[span])]) for part in (inputs, targets)]
        rows.append(Batch(row[0], row[1], torch.tensor([first + len(rows)]), None, None))
    return rows


def own_windows(config: PretrainConfig | TuneConfig, tokenizer: TextTokenizer, tokens: int) -> tuple[str, list[Batch]]:
    """About ``tokens`` tokens of the run's first validation set, evenly spread over it; and what they are, in words.

    Raises:
        ValueError: if the run has no validation set.
    """
    if isinstance(config, PretrainConfig):
        opened = open_set(config.data, None)
        batches = list(opened.batches(0, 1, 1, max(tokens // config.data.sequence_tokens, 1)))
        return f"validation set {opened.name}", batches
    if not config.data.validation:
        raise ValueError("the run's config has no data.validation, so there is nothing to read; give text files")
    source = config.data.validation[0]
    examples = read_examples(source, config.data, tokenizer)
    wanted = min(max(int(tokens / examples.inputs.mean()), 1), len(examples))
    windows: list[Batch] = []
    for place in range(wanted):
        ids, learned = examples.entry(place * len(examples) // wanted)
        targets = np.where(learned, ids, IGNORE_INDEX)[1:]
        windows += _cut(ids[:-1].tolist(), targets.tolist(), len(ids), len(windows))
    return f"validation set {source.name}, an example a window", windows


def read_history(metrics: Path, sites: Sequence[str], target: float, step: int) -> History | None:
    """Densities up to ``step`` from a run's ``metrics.jsonl``; None where it is missing or has none."""
    names = [f"density/{site}" for site in sites]
    found: dict[int, dict[str, Any]] = {}
    for entry in metrics_file.read(metrics):
        if all(name in entry for name in names) and entry["step"] <= step:
            found[entry["step"]] = entry  # for a step repeated after a resume, the later one
    if len(found) < 2 or not names:
        return None
    logged = sorted(found)
    steps = sorted({logged[round(place * (len(logged) - 1) / (_POINTS - 1))] for place in range(_POINTS)})
    targets = [found[n].get("budget/target", target) for n in steps]
    return History(steps, [[found[n][name] for n in steps] for name in names], targets)
