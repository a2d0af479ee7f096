"""Answers end where they are told, and are the same whoever writes them."""

from __future__ import annotations

from typing import Any

import pytest

from data.tokenization import load_text_tokenizer
from tests.evals.tiny import model, weights_folder
from tests.threads import one_thread as one_thread
from trainer.distributed import ALONE
from trainer.tasks.answers import Prompt, answer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Any:
    return load_text_tokenizer(weights_folder(tmp_path_factory.mktemp("answers") / "weights", "layer", corpus))


def test_stops_and_lengths(tokenizer: Any) -> None:
    decoder, ids = model("layer"), tokenizer.encode("return")
    (free,) = answer(decoder, tokenizer, [Prompt(ids, 12)], ALONE)
    assert len(free) > 3
    short, stopped = answer(decoder, tokenizer, [Prompt(ids, 4), Prompt(ids, 12, [free[2:4], "\n"])], ALONE)
    assert free.startswith(short) and len(short) < len(free)
    assert stopped == free[: free.index(free[2:4])]
    in_lockstep = answer(decoder, tokenizer, [Prompt(ids, 4), Prompt(ids, 12, [free[2:4]])], ALONE, lockstep=True)
    assert in_lockstep == [short, stopped]
    assert answer(decoder, tokenizer, [], ALONE) == []
