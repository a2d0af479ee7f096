"""Likelihoods from plain passes, and the harness's model and command, for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evals.harness.__main__ import main
from evals.scoring import open_model
from tests.evals.tiny import POSITIONS
from trainer.tasks.harness import OurModel
from trainer.tasks.scorer import Scorer


def our_model(weights: Path, window: int = POSITIONS) -> OurModel:
    """What the harness asks."""
    opened = open_model(weights)
    return OurModel(Scorer(opened.decoder, 256), opened.tokenizer, window)


def likelihood(weights: Path, text: str) -> float:
    """Of a text after the document's start, from a plain pass."""
    opened = open_model(weights)
    ids = torch.tensor([[*opened.start, *opened.tokenizer.encode(text)]])
    with torch.no_grad():
        logits = opened.decoder(ids[:, :-1]).logits
    assert logits is not None
    return float(logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum())


def answer_likelihood(weights: Path, context: str, answer: str) -> float:
    """Of an answer after a context, from a plain pass."""
    opened = open_model(weights)
    tokenizer = opened.tokenizer
    ids = torch.tensor([[*tokenizer.prefix, *tokenizer.encode(context + answer)]])
    first = len(tokenizer.prefix) + len(tokenizer.encode(context))
    with torch.no_grad():
        logits = opened.decoder(ids[:, :-1]).logits
    assert logits is not None
    return float(logits.log_softmax(-1).gather(2, ids[:, 1:, None])[0, first - 1 :].sum())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of a command that ends with an error."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1 and error.startswith("error: ")
    return error
