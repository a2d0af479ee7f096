"""A model and texts in, log-likelihoods out: what perplexity and the harness share.

A document is scored after the token that every document begins with: the tokenizer's begin-of-document token, or where
there is none the end-of-document token, which is what stands before a document in training. With n tokens, a window of
W and a stride of s, windows follow each other like this (W = 6, s = 2; ``.`` is context, ``x`` is scored):

    x x x x x x
        . . . . x x
            . . . . x x

so that each token is scored once, with W - s tokens of context or more unless the document begins later.

Routing is greedy, as in generation. Dimension letters: B batch, T tokens, S routed sites, n scored tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.tokenization import TextTokenizer, load_text_tokenizer, require_vocabulary
from model.chunks import IGNORED
from model.config import ModelConfig
from model.decoder import Decoder
from model.flops import Routed, dense_flops, executed_flops
from tune.load import Loaded, load_model


class Opened(NamedTuple):
    """A model that is ready to read text."""

    loaded: Loaded
    """The decoder, in evaluation mode, and where it came from."""
    tokenizer: TextTokenizer
    """Every id that it gives has a row in the embedding."""

    @property
    def decoder(self) -> Decoder:
        """fp32, on the CPU, in evaluation mode."""
        return self.loaded.decoder

    @property
    def start(self) -> list[int]:
        """Ids that a document begins after: begin-of-document, or end-of-document where there is no such token."""
        return self.tokenizer.prefix or [self.tokenizer.eos_id]


def open_model(path: Path) -> Opened:
    """Read a run, a checkpoint or a folder of weights, and its tokenizer.

    Raises:
        ValueError: if one of them cannot be read, they do not fit each other, or the routers look at later tokens.
    """
    loaded = load_model(path)
    tokenizer = load_text_tokenizer(loaded.tokenizer_folder)
    model = loaded.decoder.config
    fix = "put the tokenizer there that the model was trained with"
    require_vocabulary(tokenizer, model.vocab_size, fix)
    if model.router is not None and not model.router.causal:
        raise ValueError(
            "router.kind expert_choice picks tokens by looking at later ones, so it gives no likelihood of a next "
            "token; use a causal kind: learned, random or stride"
        )
    return Opened(loaded, tokenizer)


class Window(NamedTuple):
    """One row for the model: the last ``len(targets)`` of its predictions are scored."""

    inputs: list[int]
    """At least as many as ``targets``."""
    targets: list[int]


class WindowScore(NamedTuple):
    """A window's scored tokens."""

    nll: Tensor
    """Negative log-likelihoods in nats, fp32 [n]."""
    hit: Tensor
    """Whether the target is the likeliest token, bool [n]."""


def windows(start: Sequence[int], tokens: Sequence[int], window_tokens: int, stride_tokens: int) -> Iterator[Window]:
    """Windows in which each of ``tokens`` is scored once; the picture at the top.

    Args:
        start: ids before the document, at least one; the last one counts.
        tokens: of the document.
        window_tokens: most inputs of a window.
        stride_tokens: tokens scored in each window but the first; at most ``window_tokens``.
    """
    whole, done = [*start[-1:], *tokens], 0  # whole[i] is the input that predicts tokens[i]
    while done < len(tokens):
        end = min(done + (stride_tokens if done else window_tokens), len(tokens))
        yield Window(whole[max(end - window_tokens, 0) : end], whole[done + 1 : end + 1])
        done = end


class Scorer:
    """Scores windows and counts what ran for them.

    Args:
        decoder: in evaluation mode.
        batch_windows: B, windows that run at once; they are of about equal length.
    """

    def __init__(self, decoder: Decoder, batch_windows: int) -> None:
        if batch_windows < 1:
            raise ValueError(f"a batch must have at least 1 window, got {batch_windows}; raise --batch")
        self.decoder, self.batch_windows = decoder, batch_windows
        self._sites = torch.zeros(2, len(decoder.config.sites), dtype=torch.float64)
        self._tokens = self._keys = self._scored = 0

    def score(self, rows: Sequence[Window]) -> list[WindowScore]:
        """Scores of windows, in their order."""
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place].inputs))
        found: dict[int, WindowScore] = {}
        for first in range(0, len(order), self.batch_windows):
            places = order[first : first + self.batch_windows]
            found |= zip(places, self._score_batch([rows[place] for place in places]), strict=True)
        return [found[place] for place in range(len(rows))]

    @torch.inference_mode()
    def _score_batch(self, rows: list[Window]) -> list[WindowScore]:
        longest = max(len(row.inputs) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)  # what fills up comes last: nothing sees it
        targets = torch.full_like(tokens, IGNORED)
        for place, row in enumerate(rows):
            length = len(row.inputs)
            tokens[place, :length] = torch.tensor(row.inputs)
            targets[place, length - len(row.targets) : length] = torch.tensor(row.targets)
        counts = [len(row.targets) for row in rows]
        output = self.decoder(tokens, targets, scored_targets=sum(counts), score=True)
        assert output.scores is not None
        lengths = torch.tensor([len(row.inputs) for row in rows])
        self._count(lengths, output.routing.executed, sum(counts))
        # The last candidate is the model itself: the vote where the late layers have one, else the final layer.
        parts = zip(output.scores.nll[-1].split(counts), output.scores.hit[-1].split(counts), strict=True)
        return [WindowScore(nll, hit) for nll, hit in parts]

    def _count(self, lengths: Tensor, executed: Tensor, scored: int) -> None:
        """Count windows of ``lengths`` [B]; ``executed`` [S, B, T] may be longer than they are."""
        places = torch.arange(1, executed.shape[2] + 1)  # and as many keys are seen there
        real = places <= lengths[:, None]
        self._tokens += int(lengths.sum())
        self._keys += int((real * places).sum())
        self._scored += scored
        self._sites += torch.stack([(executed & real).sum((1, 2)), (executed * (real * places)).sum((1, 2))])

    @property
    def routed(self) -> Routed:
        """All that ran so far, context included."""
        executed, keys = self._sites.tolist()
        return Routed(self._tokens, self._keys, executed, keys, self._scored)

    @property
    def flops(self) -> tuple[float, float]:
        """Forward FLOPs that were executed so far, and those of the same windows without routers."""
        routed, model = self.routed, self.decoder.config
        dense = dense_flops(model, routed.tokens, routed.visible_keys, routed.head_tokens)
        return executed_flops(model, routed), dense


def layer_shares(config: ModelConfig, executed: Tensor) -> Tensor:
    """Share of all layers that each token ran, fp32 [...], from what the sites executed, bool [S, ...].

    With one decision for each module, half a layer is half a layer; a layer without a router always runs.
    """
    routed = len(config.routed_layers)
    if not routed:
        return torch.ones(executed.shape[1:])
    ran = executed.sum(0) * (routed / len(config.sites))
    return (ran + config.layers - routed) / config.layers
