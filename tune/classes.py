"""Token classes, to report the late layers' weights by what is being predicted.

A class depends on the piece alone, not on a language: a word without a space before it, as at the start of a line or in
a script without spaces, is a ``continuation``.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import re
import unicodedata

import torch
from torch import Tensor

from data.detokenizer import REPLACEMENT_CHARACTER
from data.tokenization import WORD_START, TextTokenizer

CLASSES = ["word", "continuation", "number", "punctuation", "space", "byte", "end", "other"]
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_classes(tokenizer: TextTokenizer) -> tuple[list[str], Tensor]:
    """Names of the classes, and the class of every id, int64 [V].

    ``word`` is letters after a space, ``continuation`` letters without one, ``number`` digits, ``punctuation`` marks
    and symbols, ``space`` only white space, ``byte`` one or more bytes that are no whole character, ``end`` the end of
    a document, and ``other`` any mixture.
    """
    names = [_class_of(tokenizer.piece(number)) for number in range(tokenizer.vocab_size)]
    names[tokenizer.eos_id] = "end"
    return CLASSES, torch.tensor([CLASSES.index(name) for name in names])


def _class_of(piece: str) -> str:
    text = piece.replace(WORD_START, " ").strip()
    if not text:
        return "space" if piece else "other"  # an unused id has no text at all
    if BYTE_PIECE.fullmatch(text) or REPLACEMENT_CHARACTER in text:
        return "byte"
    # General categories: L letters, M marks on them, N numbers, P punctuation, S symbols. The apostrophe of an
    # English ending ("'s") belongs to its letters.
    kinds = {unicodedata.category(character)[0] for character in text.lstrip("'’") or text}
    if kinds <= {"L", "M"}:
        return "word" if piece.startswith(WORD_START) else "continuation"
    if kinds == {"N"}:
        return "number"
    return "punctuation" if kinds <= {"P", "S"} else "other"
