"""Answers end where they are told, and are the same whoever writes them."""

from __future__ import annotations

from typing import Any

import pytest

from data.tokenization import load_text_tokenizer
from tests.evals.tiny import model, weights_folder
from tests.threads import one_thread as one_thread
from trainer.distributed import ALONE
from trainer.tasks.answers import BATCH, Prompt, _batches, answer


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


@pytest.mark.parametrize("name", ["dense", "layer", "module", "ensemble"])
def test_an_answer_does_not_depend_on_its_neighbours(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = model(name)
    texts = ["return", "def f(self, other):", "import os", "for place in range(", "class A:", "if x is None: x = 1"]
    prompts = [Prompt(tokenizer.encode(text), 10) for text in texts]
    monkeypatch.setattr("trainer.tasks.answers.SHORTEST", 0.0)
    together = answer(decoder, tokenizer, prompts, ALONE)
    assert len(set(together)) > 1
    assert together == [answer(decoder, tokenizer, [prompt], ALONE)[0] for prompt in prompts]


def test_who_is_answered_together() -> None:
    """Greedy prompts for as many tokens and of about one length, ``BATCH`` at most; sampled ones alone."""
    prompts = [Prompt([1] * length, new) for length, new in ((8, 4), (40, 4), (6, 4), (38, 4), (40, 2), (39, 4))]
    assert _batches(prompts) == [[1, 5, 3], [0, 2], [4]]
    sampled = [Prompt([1], 4), Prompt([1], 4, temperature=0.5), Prompt([1], 4), Prompt([1], 4)]
    assert _batches(sampled) == [[0], [1], [2, 3]]
    assert [len(batch) for batch in _batches([Prompt([1], 4)] * (BATCH + 1))] == [BATCH, 1]
    assert _batches([]) == []
