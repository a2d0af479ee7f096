"""Ids to text, piece by piece, as a model generates them."""

from __future__ import annotations

from collections.abc import Sequence

from data.tokenization import TextTokenizer

REPLACEMENT_CHARACTER = "\ufffd"
"""What a decoder writes for bytes that are not a whole character."""
_CONTEXT_TOKENS = 5
"""Tokens decoded together with new ones, so that a space at the start of a piece is not lost."""
_HELD_TOKENS = 8
"""What is not a whole character after this many tokens never will be: a character has at most 4 bytes."""
_MOST_CONTEXT_TOKENS = 64
"""How far back to look for the start of a character: some decoders garble a whole run of bytes without one."""


class Detokenizer:
    """Ids to text, piece by piece; characters that span several tokens come out whole.

    Args:
        tokenizer: of the model.
        prompt: ids before the first one; their text is not returned.
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
        """The text that was held back, even if its last character is incomplete."""
        return self._give_out(self.tokenizer.decode(self._ids))

    def _give_out(self, text: str) -> str:
        new = text[len(self.tokenizer.decode(self._ids[: self._done])) :]
        self._ids = self._context(self._ids)
        self._done = len(self._ids)
        return new

    def _context(self, ids: Sequence[int]) -> list[int]:
        """The last of ``ids``, starting at a whole character."""
        fewest, most = (max(len(ids) - tokens, 0) for tokens in (_CONTEXT_TOKENS, _MOST_CONTEXT_TOKENS))
        for start in range(fewest, most - 1, -1):
            if not self.tokenizer.decode(ids[start:]).startswith(REPLACEMENT_CHARACTER):
                return list(ids[start:])
        return list(ids[fewest:])
