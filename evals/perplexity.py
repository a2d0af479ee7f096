"""How well a model predicts text: bits per byte, nats and perplexity per token, with a sliding window.

    python -m evals.perplexity runs/books $HOPSCOTCH_TEXTS/books/test.jsonl.xz
    python -m evals.perplexity runs/books-tuned notes.txt more.txt --window 512 --stride 128 --json perplexity.json
    torchrun --nproc-per-node 8 -m evals.perplexity runs/books notes.txt --dtype bf16

MODEL is a run, a checkpoint or a folder of weights. Files are text, JSON lines, Parquet or CSV, compressed or not, as
in ``data.sources``; a text file is one document. How a document is cut into windows: ``evals/scoring.py``. A smaller
stride gives more context and takes longer; with a stride of the whole window nothing runs twice.

Bits per byte divide by the UTF-8 bytes of the text, so models with different tokenizers are comparable. The token that
ends a document is not scored: it is not text. FLOPs are those executed in the forward pass, context included, as a
share of those without routers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from data.files import write_atomically
from evals.placement import IN_FP32, add_batch, add_placement, check_placement, placed
from evals.texts import add_text_options, text_field_of, text_files, texts_of
from settings import command_parser, path_argument, require_writable, user_errors
from trainer import preflight
from trainer.config import WeightsConfig

if TYPE_CHECKING:
    from evals.scoring import Opened
    from trainer.tasks.scorer import Scorer, Window

BATCHES_AT_ONCE = 32
"""Windows are sorted by length within this many batches, to reduce padding."""


class Perplexity(NamedTuple):
    """What was measured on some documents."""

    name: str
    """Of the file, or ``all``."""
    documents: int
    """Those without text are left out."""
    bytes: int
    """UTF-8."""
    tokens: int
    """Scored."""
    nll: float
    """Sum over them, nats."""
    flops: float
    """Forward FLOPs that ran, context included."""
    dense_flops: float
    """Those of the same windows without routers."""
    window_tokens: int
    stride_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Of the text."""
        return self.nll / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        """What the training's loss is on its own windows."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token; only comparable for the same tokenizer."""
        return math.exp(min(self.nats_per_token, 700.0))


def perplexity(
    opened: Opened,
    texts: Iterator[str],
    name: str,
    window_tokens: int,
    stride_tokens: int,
    batch_tokens: int = 8192,
) -> Perplexity:
    """Score documents; memory holds one of them and a few batches of windows.

    Args:
        opened: the model.
        texts: the documents.
        name: of the result.
        window_tokens: most tokens that the model reads at once.
        stride_tokens: tokens scored in a window.
        batch_tokens: that run at once.

    Raises:
        ValueError: if window, stride or batch is invalid, there is no text, or a likelihood is not finite.
    """
    from evals.scoring import windows
    from trainer.tasks.scorer import Scorer

    check_windows(window_tokens, stride_tokens, opened.decoder.config.max_positions)
    scorer = Scorer(opened.decoder, batch_tokens, opened.world)
    documents = size = tokens = held = 0
    nll = 0.0
    waiting: list[tuple[int, Window]] = []
    quiet = None if opened.world.is_main else True
    with tqdm(unit="token", unit_scale=True, desc=name, disable=quiet, leave=False) as bar:
        for number, text in enumerate(texts, start=1):
            ids = opened.tokenizer.encode(text)
            if not ids:
                continue
            documents, size, tokens = documents + 1, size + len(text.encode()), tokens + len(ids)
            for window in windows(opened.start, ids, window_tokens, stride_tokens):
                waiting.append((number, window))
                held += len(window.inputs)
                if held >= batch_tokens * BATCHES_AT_ONCE * opened.world.size:
                    nll += _total(scorer, waiting, name)
                    bar.update(sum(len(window.targets) for _, window in waiting))
                    waiting, held = [], 0
        nll += _total(scorer, waiting, name)
    if not tokens:
        raise ValueError(f"{name} holds no text to score; give a file with some")
    return Perplexity(name, documents, size, tokens, nll, *scorer.flops, window_tokens, stride_tokens)


def _total(scorer: Scorer, rows: Sequence[tuple[int, Window]], name: str) -> float:
    """Nats of all rows, each with its document's number."""
    found = scorer.score([window for _, window in rows])
    for (number, _), scored in zip(rows, found, strict=True):
        if not math.isfinite(scored.loglikelihood):
            raise ValueError(
                f"{name}, document {number}: the model's logits are not finite (NaN or infinite), so the text has no "
                f"likelihood; {IN_FP32}"
            )
    return -sum(scored.loglikelihood for scored in found)


def check_windows(window_tokens: int, stride_tokens: int, positions: int) -> None:
    """Refuse windows that the model cannot read, and strides that leave tokens out.

    Raises:
        ValueError: in either case.
    """
    if not 1 <= window_tokens <= positions:
        raise ValueError(f"--window must be 1 to {positions}, the model's model.max_positions, got {window_tokens}")
    if not 1 <= stride_tokens <= window_tokens:
        raise ValueError(
            f"--stride must be 1 to the window's {window_tokens} tokens, or some would not be scored, got "
            f"{stride_tokens}"
        )


def trained_tokens(opened: Opened) -> int:
    """Length of the training's windows, in tokens; all positions for a model without a run."""
    positions = opened.decoder.config.max_positions
    config = opened.loaded.config
    return positions if isinstance(config, WeightsConfig) else min(config.data.sequence_tokens, positions)


def together(results: Sequence[Perplexity]) -> Perplexity:
    """All files as one."""
    first = results[0]
    return Perplexity(
        "all",
        sum(result.documents for result in results),
        sum(result.bytes for result in results),
        sum(result.tokens for result in results),
        sum(result.nll for result in results),
        sum(result.flops for result in results),
        sum(result.dense_flops for result in results),
        first.window_tokens,
        first.stride_tokens,
    )


HEADER = "bits/byte  nats/token  perplexity  FLOPs of dense        tokens         bytes  file"


def line(result: Perplexity) -> str:
    """A result as a line of the table."""
    return (
        f"{result.bits_per_byte:>9.4f}{result.nats_per_token:>12.4f}{result.perplexity:>12,.3f}"
        f"{result.flops / result.dense_flops:>16.1%}{result.tokens:>14,}{result.bytes:>14,}  {result.name}"
    )


def to_json(result: Perplexity) -> dict[str, Any]:
    """A result with its derived values."""
    return {
        **result._asdict(),
        "bits_per_byte": result.bits_per_byte,
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        "flops_share": result.flops / result.dense_flops,
    }


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evals.perplexity", __doc__)
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="a run, a checkpoint or a folder of weights")
    parser.add_argument("files", nargs="+", metavar="FILE", help="text, JSON lines, Parquet or CSV, compressed or not")
    parser.add_argument("--window", type=int, metavar="N", help="tokens of a window (default: as in training)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens scored in a window (default: half of it)")
    add_batch(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first documents of each file (default: all)")
    add_text_options(parser)
    add_placement(parser)
    parser.add_argument("--json", type=path_argument, metavar="OUT", help="write the results to this file, too")
    return parser


def _score(opened: Opened, files: Sequence[str], options: argparse.Namespace, batch_tokens: int) -> None:
    """Score every file, once all are known to be readable; rank 0 prints and writes."""
    source, tell = opened.loaded.source, print if opened.world.is_main else lambda *_, **__: None
    field = options.text_field or text_field_of(opened.loaded.config)
    window_tokens = trained_tokens(opened) if options.window is None else options.window
    stride_tokens = max(window_tokens // 2, 1) if options.stride is None else options.stride
    check_windows(window_tokens, stride_tokens, opened.decoder.config.max_positions)

    def texts(path: str) -> Iterator[str]:
        return islice(texts_of(path, options.format, field), options.limit)

    for path in files:
        if not sum(map(bool, texts(path))):  # all of them are read
            raise ValueError(f"{path} holds no text to score; give a file with some")
    tell(f"{source}: windows of {window_tokens} tokens, stride {stride_tokens}\n{HEADER}", flush=True)
    batch_tokens = batch_tokens if options.batch_tokens is None else options.batch_tokens
    results = []
    for path in files:
        results.append(perplexity(opened, texts(path), path, window_tokens, stride_tokens, batch_tokens))
        tell(line(results[-1]), flush=True)
    if len(results) > 1:
        results.append(together(results))
        tell(line(results[-1]))
    if options.json is not None and opened.world.is_main:
        content = {"model": str(source), "results": [to_json(result) for result in results]}
        write_atomically(options.json, (json.dumps(content, indent=1) + "\n").encode())
        print(f"wrote {options.json}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Score every file, print, write."""
    options = _parser().parse_args(arguments)
    with user_errors():
        if options.limit is not None and options.limit < 1:
            raise ValueError(f"--limit must be at least 1 document, got {options.limit}")
        if options.json is not None:
            require_writable(options.json, "--json")
        check_placement(options, ranks=True)
        files = text_files(options.files, options.format)
        preflight.open_model(options.model)
        from evals.scoring import open_model

        with placed(options) as placement:
            opened = open_model(options.model, placement)
            _score(opened, list(map(str, files)), options, placement.batch_tokens)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
