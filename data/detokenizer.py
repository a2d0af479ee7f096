"""Ids to text, piece by piece, as a model makes them."""

from __future__ import annotations

from collections.abc import Sequence

from data.tokenization import TextTokenizer

REPLACEMENT_CHARACTER = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""
_CONTEXT_TOKENS = 5
"""Tokens decoded together with new ones, so that a space at the start of a piece is not lost."""
_HELD_TOKENS = 8
"""What is no whole character after so many tokens never will be one: a character has at most 4 bytes."""
_MOST_CONTEXT_TOKENS = 64
"""As far back the start of a character is looked for: some decoders break all of a run of bytes that has none."""


class Detokenizer:
    """Ids to text, piece by piece; characters that are spelt in several tokens come out whole.

    Args:
        tokenizer: of the model.
        prompt: ids before the first one; not given out.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._ids = self._context(prompt)
        self._done = len(self._ids)

    def add(self, token: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        held = len(self._ids) - self._done
        return "" if text.endswith(REPLACEMENT_CHARACTER) and held < _HELD_TOKENS else self._give_out(text)

    def rest(self) -> str:
        """What was held back, broken as it may be."""
        return self._give_out(self.tokenizer.decode(self._ids))

    def _give_out(self, text: str) -> str:
        new = text[len(self.tokenizer.decode(self._ids[: self._done])) :]
        self._ids = self._context(self._ids)
        self._done = len(self._ids)
        return new

    def _context(self, ids: Sequence[int]) -> list[int]:
        """The last of ``ids``, from a whole character on."""
        fewest, most = (max(len(ids) - tokens, 0) for tokens in (_CONTEXT_TOKENS, _MOST_CONTEXT_TOKENS))
        for start in range(fewest, most - 1, -1):
            if not self.tokenizer.decode(ids[start:]).startswith(REPLACEMENT_CHARACTER):
                return list(ids[start:])
        return list(ids[fewest:])
