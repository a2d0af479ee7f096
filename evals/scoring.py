"""A model that reads text, and texts cut into windows: what perplexity and the harness share.

A document is scored after the token that every document begins with: the tokenizer's begin-of-document token, or if
there is none the end-of-document token, which precedes a document in training. With a window of W tokens and a stride
of s, windows follow each other like this (W = 6, s = 2; ``.`` is context, ``x`` is scored):

    x x x x x x
        . . . . x x
            . . . . x x

so that each token is scored once, with at least W - s tokens of context except near the start of the document.

``trainer/tasks/scorer.py`` scores them. Dimension letters: S routed sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from data.tokenization import TextTokenizer, load_text_tokenizer, require_vocabulary
from evals.placement import Placement
from model.config import ModelConfig
from model.decoder import Decoder
from trainer.distributed import ALONE, World
from trainer.tasks.scorer import NO_LIKELIHOOD, Window

if TYPE_CHECKING:
    from tune.load import Loaded


class Opened(NamedTuple):
    """A model that is ready to read text."""

    loaded: Loaded
    """The decoder, in evaluation mode, and where it came from."""
    tokenizer: TextTokenizer
    """Every id that it gives has a row in the embedding."""
    world: World = ALONE
    """Ranks that share the work, and the device that the decoder is on."""

    @property
    def decoder(self) -> Decoder:
        """In evaluation mode."""
        return self.loaded.decoder

    @property
    def start(self) -> list[int]:
        """Ids before a document: begin-of-document, or end-of-document where there is no such token."""
        return self.tokenizer.prefix or [self.tokenizer.eos_id]


def open_model(path: Path, placement: Placement | None = None) -> Opened:
    """Read a run, a checkpoint or a folder of weights, and its tokenizer.

    Args:
        path: of the model.
        placement: where it goes; in fp32 on the CPU of one process unless given.

    Raises:
        ValueError: if one of them cannot be read, they do not match, or the routers look at later tokens.
    """
    placement = placement or Placement(ALONE, "fp32")
    loaded = placement.load(path)
    tokenizer = load_text_tokenizer(loaded.tokenizer_folder)
    model = loaded.decoder.config
    fix = "put the tokenizer there that the model was trained with"
    require_vocabulary(tokenizer, model.vocab_size, fix)
    model.require_causal(NO_LIKELIHOOD)
    return Opened(loaded, tokenizer, placement.world)


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


def layer_shares(config: ModelConfig, executed: Tensor) -> Tensor:
    """Share of all layers that each token ran, fp32 [...], from what the sites executed, bool [S, ...].

    With one decision for each module, each module counts as half a layer; a layer without a router always runs.
    """
    routed = len(config.routed_layers)
    if not routed:
        return torch.ones(executed.shape[1:], device=executed.device)
    ran = executed.sum(0) * (routed / len(config.sites))
    return (ran + config.layers - routed) / config.layers
