"""One face for the two kinds of tokenizer that a tuned model comes with.

A base of stage one has a SentencePiece ``tokenizer.model``; an imported checkpoint has a Hugging Face
``tokenizer.json``, which is taken where both lie, because an import keeps it to be exact.

Prompt and response meet at a token's border, since in generation the prompt is encoded before the response is there.
So they are encoded apart. The exception is a tokenizer that puts a space before every text, as Llama 2's does: a
response encoded alone would get one that is not in it. There the whole is encoded, and cut where it leaves what the
prompt alone gives.

N: tokens of a text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor

from data.files import read_json, sha256_of
from data.tokenizer import MODEL_NAME, load_tokenizer, tokenizer_sha256

JSON_NAME = "tokenizer.json"
WORD_START = "▁"
"""What a piece begins with where a space stands before it."""
EOS_PLACES = (
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("generation_config.json", "eos_token_id"),
    ("config.json", "eos_token_id"),
)
"""Where the end-of-document token of a ``tokenizer.json`` may be written, the first that has it wins."""


class TextTokenizer(ABC):
    """Text to ids and back."""

    def __init__(self, vocab_size: int, eos_id: int, prefix: list[int], sha256: str) -> None:
        self.vocab_size = vocab_size
        """Every token id is below it."""
        self.eos_id = eos_id
        """The id that closes every example."""
        self.prefix = prefix
        """Ids before every example: a begin-of-document token, if the model was trained with one."""
        self.sha256 = sha256
        """SHA-256 of the file it was read from."""
        first = self.encode("a")[:1]
        self._adds_space = bool(first) and self.piece(first[0]).startswith(WORD_START)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The N ids of ``text``, without begin or end of document."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """A token as text; a space before a word is written "▁"."""

    def split(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """The ids of ``prompt``, and those of ``response`` after it."""
        first, second = self.segments([prompt, response])
        return first, second

    def segments(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that follow each other, a list for each."""
        if not self._adds_space:
            return [self.encode(text) for text in texts]
        whole = self.encode("".join(texts))
        # Where the next text merges with the end of this one, the merged token belongs to the next.
        ends = [_common_start(whole, self.encode(text)) for text in accumulate(texts[:-1])]
        return [whole[start:end] for start, end in pairwise([0, *accumulate(ends, max), len(whole)])]


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer in ``folder``.

    Raises:
        ValueError: there is none, it is damaged, or it has no end-of-document token.
    """
    folder = Path(folder)
    if (folder / JSON_NAME).is_file():
        return _HuggingFace(folder)
    if not (folder / MODEL_NAME).is_file():
        raise ValueError(
            f"{folder} holds neither {JSON_NAME} nor {MODEL_NAME}; set data.tokenizer to a folder with one of them"
        )
    return _SentencePiece(folder)


def require_vocabulary(
    tokens: int,
    folder: Path,
    vocab_size: int,
    fix: str = "set data.tokenizer to the folder of the tokenizer that the model was trained with",
) -> None:
    """Raise ValueError, with ``fix``, if the tokenizer in ``folder`` has more tokens than the model has embeddings."""
    if tokens > vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokens} pieces, the model's vocabulary is {vocab_size}; {fix}"
        )


class _SentencePiece(TextTokenizer):
    """A ``tokenizer.model``. No begin-of-document token: stage one puts none."""

    def __init__(self, folder: Path) -> None:
        self._processor: SentencePieceProcessor = load_tokenizer(folder)
        super().__init__(self._processor.vocab_size(), self._processor.eos_id(), [], tokenizer_sha256(folder))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)


class _HuggingFace(TextTokenizer):
    """A ``tokenizer.json``. Special tokens that are spelt out in a text become these tokens, as in Transformers."""

    def __init__(self, folder: Path) -> None:
        path = folder / JSON_NAME
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer that can be read ({error}); restore it") from None
        # A file may have been saved with them on, and would then cut every long text without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoder = json.loads(self._tokenizer.to_str())["decoder"]
        self._byte_level = tokenizers.decoders.ByteLevel() if '"ByteLevel"' in json.dumps(decoder) else None
        vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(vocab_size, _eos_id(folder, self._tokenizer), self._added_before(), sha256_of(path))

    def _added_before(self) -> list[int]:
        """What the post-processor puts before a text. An option ``add_bos_token`` beside the file has no effect."""
        encoded = self._tokenizer.encode("a")
        text_start = encoded.special_tokens_mask.index(0) if 0 in encoded.special_tokens_mask else 0
        return encoded.ids[:text_start]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def piece(self, token: int) -> str:
        piece = self._tokenizer.id_to_token(token) or ""
        if self._byte_level is None:
            return piece
        return self._byte_level.decode([piece]).replace(" ", WORD_START)


def _common_start(first: list[int], second: list[int]) -> int:
    """How many ids at the start of both are the same."""
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def _eos_id(folder: Path, tokenizer: tokenizers.Tokenizer) -> int:
    for name, field in EOS_PLACES:
        path = folder / name
        given: Any = read_json(path).get(field) if path.is_file() else None
        if isinstance(given, list):  # several may end a text in generation; the first closes a document
            given = given[0] if given else None
        if isinstance(given, dict):
            given = given.get("content")
        if given is None:
            continue
        token = tokenizer.token_to_id(given) if isinstance(given, str) else given
        if not isinstance(token, int) or token < 0 or tokenizer.id_to_token(token) is None:
            raise ValueError(f"{path}: {field} is {given!r}, which is no token of {folder / JSON_NAME}; correct it")
        return token
    places = ", ".join(f"{name} ({field})" for name, field in EOS_PLACES)
    raise ValueError(
        f"{folder / JSON_NAME} has no end-of-document token, which closes every example; name it in one of {places}"
    )
