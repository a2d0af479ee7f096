r"""Where a long text may be cut so that its parts, encoded separately, give the ids of the whole.

An encoder takes far more memory than the text that it is given at once (SentencePiece 40 bytes per byte, ``tokenizers``
150), so a document of a gigabyte has to be encoded in parts. Two kinds of tokenizers allow that:

    SentencePiece BPE       after a line break, if no piece continues after one (data/sentencepiece_file.py)
    byte-level BPE          before the space between two letters, "a| b": the text is cut into words before the merges,
                            by a pattern in which a space may begin a word but never ends one

For the second, only the patterns listed here count, of which every alternative was checked; any other pattern may look
behind or ahead of a border. Everything else is encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

PART_CHARACTERS = 32_768
"""Size of a part: it ends at the first border after so many characters."""
AFTER_LINE_BREAK = re.compile(r"(?<=\n)")
BEFORE_SPACE = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
"""A space with a letter on both sides."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
KNOWN_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    *(  # Llama 3, Qwen 2
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    *(  # GPT-4o and gpt-oss, Nemotron
        rf"{_CASED[0]}{suffix}|{_CASED[1]}{suffix}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
        for suffix in (f"{_CONTRACTIONS}?", "")
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
)
"""How text is cut into words, as written in a ``tokenizer.json``."""


def parts(text: str, border: re.Pattern[str] | None) -> Iterator[str]:
    """``text`` cut at borders into parts of at least ``PART_CHARACTERS``, except the last; whole without a border."""
    start = 0
    while border is not None and len(text) - start > PART_CHARACTERS:
        found = border.search(text, start + PART_CHARACTERS)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    if start < len(text):
        yield text[start:]


def border_of(description: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a text may be cut for the tokenizer that a ``tokenizer.json`` describes; None: nowhere."""
    model = description["model"]
    exact = (
        model["type"] == "BPE"
        and not model.get("dropout")
        and (description["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and _opens_words_with_spaces(description["pre_tokenizer"])
        and all(map(_stays_on_one_side, description["added_tokens"]))
    )
    return BEFORE_SPACE if exact else None


def _opens_words_with_spaces(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether text is cut into words by a known pattern, and by nothing that looks beyond a word."""
    steps = [pre_tokenizer] if pre_tokenizer is not None else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    by_words = False
    for step in steps:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            by_words |= step.get("use_regex", True)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            if step["pattern"].get("Regex") not in KNOWN_PATTERNS:
                return False
            by_words = True
        elif step["type"] != "Digits":
            return False
    return by_words


def _stays_on_one_side(added: dict[str, Any]) -> bool:
    """Whether an added token has no border in it, whatever follows, and does not depend on what is beyond one."""
    return not (added["single_word"] or added["rstrip"] or BEFORE_SPACE.search(added["content"] + "a"))
