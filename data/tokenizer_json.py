"""A SentencePiece model as a ``tokenizer.json``, and whether the ids of both are the same.

    BPE        the pieces' scores are the order of the merges: ids are the same for any text
    unigram    transformers may break a tie between two ways to cut a text the other way

What makes the ids the same: spaces become "▁" in the whole text, one is put before it only where the model asks for it,
and nothing is cut before the merges.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from data.sentencepiece_file import BPE, CONTROL, NORMAL, UNIGRAM, UNKNOWN, USER_DEFINED
from data.tokenization import WORD_START, SentencePiece, TextTokenizer

COMPARED_LINES = 4000
_PROSE_LINES = 1500
_PIECES = 300
UNIGRAM_TIES = 0.02
"""Largest share of lines whose ids may differ for a unigram model."""


def require_same_ids(tokenizer: SentencePiece) -> tuple[Tokenizer, str]:
    """The ``tokenizer.json`` of ``tokenizer``, and a sentence on how its ids were compared.

    Raises:
        ValueError: if transformers would give other ids.
    """
    converted = convert(tokenizer)
    lines = list(islice(chain(_around_pieces(tokenizer), sample_lines()), COMPARED_LINES))
    different = compare_ids(tokenizer, converted, lines)
    unigram = tokenizer.proto.trainer_spec.model_type == UNIGRAM
    if len(different) > (UNIGRAM_TIES * len(lines) if unigram else 0):
        raise ValueError(
            f"transformers would give other ids than {tokenizer.file} for {len(different)} of {len(lines):,} lines, "
            f"such as {different[0][:60]!r}; train one with data.tokenizer (model_type bpe), whose ids are the same"
        )
    done = f"ids are the same on {len(lines) - len(different):,} of {len(lines):,} lines"
    if unigram:
        done += "; it is a unigram model, whose ids can differ where two segmentations of a text score the same"
    return converted, done


def convert(tokenizer: SentencePiece) -> Tokenizer:
    """The same tokenizer for the ``tokenizers`` library, including the prefix of a text."""
    proto = tokenizer.proto
    pieces, bytes_ = [(p.piece, p.score) for p in proto.pieces], proto.trainer_spec.byte_fallback
    unknown = tokenizer.processor.unk_id()
    if proto.trainer_spec.model_type == BPE:
        vocabulary = {piece: place for place, (piece, _) in enumerate(pieces)}
        model: Any = models.BPE(
            vocabulary, _merges(proto), unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=bytes_
        )
    else:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=bytes_)
    converted = Tokenizer(model)
    spaced = proto.normalizer_spec.add_dummy_prefix
    before = [normalizers.Prepend(WORD_START)] if spaced else []
    converted.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", WORD_START)])
    after = [decoders.Strip(" ", 1, 0)] if spaced else []
    converted.decoder = decoders.Sequence(
        [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL):
            converted.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == USER_DEFINED:
            converted.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    if tokenizer.prefix:
        converted.post_processor = _template(tokenizer)
    return converted


def compare_ids(tokenizer: TextTokenizer, other: Tokenizer, lines: Iterable[str]) -> list[str]:
    """The ``lines`` for which the two give other ids.

    Control pieces spelt out in a text are plain text for both: in transformers by ``split_special_tokens``.
    """
    other.encode_special_tokens = True
    return [line for line in lines if tokenizer.encode(line) != other.encode(line, add_special_tokens=False).ids]


def sample_lines() -> Iterable[str]:
    """Text to compare ids on, the same every time: hard cases, prose, then code of Python's standard library."""
    yield from (
        f"{'a' * left}{' ' * blanks}{tail}" for left in (0, 1) for blanks in range(20) for tail in ("b", "", "\n")
    )
    yield from (
        "\t\t x",
        "\n\n\n  y\n",
        "\r\n",
        "1234567890 3.14e-10",
        "",
        "x" * 300,
        "=" * 77,
        " \u2003\u00a0",
        "a\u0000b",
    )
    yield from (
        "Ångström naïve ﬁ ½ ②",
        "中文文本，没有空格。",
        "🙂🏽‍🚀👩‍👩‍👧",
        "العربية עברית",
        "\u200d\ufeff\u0301",
        "🏳️‍🌈 é e\u0301",
    )
    yield from ("".join(chr(start + i) for i in range(16)) for start in range(1, 0x3000, 256))
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from islice(_lines(library.glob("pydoc_data/topics.py")), _PROSE_LINES)  # Python's manual
    yield from _lines(sorted(library.glob("*.py")))


def _around_pieces(tokenizer: SentencePiece) -> Iterable[str]:
    """Texts with pieces that are split off before anything else, at both ends and within."""
    for piece in islice((piece.piece for piece in tokenizer.proto.pieces if piece.type == USER_DEFINED), _PIECES):
        yield from (f"a {piece} b{piece}c", f"{piece}{piece} a", f" {piece}")


def _lines(files: Iterable[Path]) -> Iterable[str]:
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        yield from text.split("\n")
        yield text[:3000]  # line breaks within


def _template(tokenizer: SentencePiece) -> processors.TemplateProcessing:
    """Puts the prefix before every text."""
    named = [(tokenizer.piece(token), token) for token in tokenizer.prefix]
    before = " ".join(piece for piece, _ in named)
    return processors.TemplateProcessing(single=f"{before} $A", pair=f"{before} $A {before} $B", special_tokens=named)


def _merges(proto: Any) -> list[tuple[str, str]]:
    """All ways to put a piece together from two others, best piece first: that is how SentencePiece merges."""
    scores = {p.piece: p.score for p in proto.pieces if p.type == NORMAL}
    ranks = {piece: rank for rank, piece in enumerate(p.piece for p in proto.pieces)}
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
