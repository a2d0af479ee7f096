"""Which class a piece falls into."""

from __future__ import annotations

import pytest
import torch

from data.tokenization import load_text_tokenizer
from tune.classes import CLASSES, token_classes


class _Vocabulary:
    def __init__(self, pieces: list[str], eos_id: int) -> None:
        self.pieces, self.vocab_size, self.eos_id = pieces, len(pieces), eos_id

    def piece(self, id: int) -> str:
        return self.pieces[id]


EXPECTED = {
    "word": ["▁the", "▁A", "▁naïve", "▁über", "▁日本", "▁'tis"],
    "continuation": ["ing", "s", "日本", "'s", "’t", "a\u0301"],
    "number": ["7", "▁42", "123", "²", "▁½"],
    "punctuation": [".", "▁(", "...", "'", "▁'", "+=", "→", "_"],
    "space": ["▁", "▁▁▁▁", "\n", "▁\n", "\t", "\n\n"],
    "byte": ["<0x0A>", "<0xff>", "\ufffd", "▁\ufffd"],
    "other": ["<unk>", "<s>", "▁self.x", "v2", "▁1,000", "<0xZZ>", "\x00", ""],
}


@pytest.mark.parametrize("token_class", EXPECTED)
def test_a_piece_is_of_the_class_that_its_characters_say(token_class: str) -> None:
    vocabulary = _Vocabulary([*EXPECTED[token_class], "</s>"], len(EXPECTED[token_class]))
    names, of_id = token_classes(vocabulary)
    found = {piece: names[number] for piece, number in zip(EXPECTED[token_class], of_id.tolist(), strict=False)}
    assert found == dict.fromkeys(EXPECTED[token_class], token_class)


def test_the_end_is_the_end_however_it_is_spelt() -> None:
    names, of_id = token_classes(_Vocabulary(["▁a", "<|end|>", "▁b"], 1))
    assert names == CLASSES and of_id.dtype == torch.int64
    assert [names[number] for number in of_id] == ["word", "end", "word"]


def test_every_piece_of_a_trained_tokenizer_has_a_class(corpus) -> None:
    names, of_id = token_classes(load_text_tokenizer(corpus["dir"]))
    counts = dict(zip(names, torch.bincount(of_id, minlength=len(names)).tolist(), strict=True))
    assert counts["byte"] == 256 and counts["end"] == 1 and counts["number"] >= 2
    assert min(counts[name] for name in ("word", "continuation", "punctuation", "space")) >= 1
    assert counts["other"] <= 10  # <unk>, <s>, <pad> and a few mixtures
