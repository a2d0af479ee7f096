"""How text is tokenized, read from the files that a model came with, the same for every command.

A folder holds a SentencePiece ``tokenizer.model``, a Hugging Face ``tokenizer.json``, or both; then the second is
used, because it is what transformers reads. Preparation, tuning, evaluation, generation and export all use
:func:`load_text_tokenizer`, so that a text has the same ids everywhere. What cannot be honoured is refused there:
models that change the text, tokens added beside a ``tokenizer.model``, tokens after every text.

    before a text   the ids that transformers puts there (BOS, or nothing)
    the text        uncut; a long one is encoded in parts where that gives the same ids
    after a text    the end-of-document token, where a document ends

Prompt and response meet at a token boundary, since in generation the prompt is encoded before the response exists. So
they are encoded separately. The exception is a tokenizer that puts a space before every text, as Llama 2's does: a
response encoded alone would get one that is not in it. There the whole is encoded, and cut where its ids first differ
from those of the prompt alone.

N: tokens of a text.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor

from data.files import read_json, sha256_of
from data.sentencepiece_file import MODEL_NAME, cuts_exactly, load_tokenizer, model_proto, refuse_changed_text
from data.split_points import AFTER_LINE_BREAK, border_of, parts

JSON_NAME = "tokenizer.json"
CONFIG_NAME, GENERATION_NAME = "tokenizer_config.json", "generation_config.json"
_PARTS_AT_ONCE = 64
"""Parts of a long text encoded at once: enough for the library's threads, not all because encodings take memory."""
WORD_START = "▁"
"""What a piece begins with if there is a space before it."""
EOS_PLACES = (
    (CONFIG_NAME, "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    (GENERATION_NAME, "eos_token_id"),
    ("config.json", "eos_token_id"),
)
"""Where the end-of-document token may be named; the first place that has it wins."""
_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


class TextTokenizer(ABC):
    """Text to ids and back."""

    kind: Literal["sentencepiece", "huggingface"]
    border: re.Pattern[str] | None
    """Where a text may be cut so that its parts have the ids of the whole; None if nowhere."""

    def __init__(self, file: Path, vocab_size: int, eos_id: int, prefix: list[int]) -> None:
        self.file = file
        """The file that it was read from."""
        self.vocab_size = vocab_size
        """Every token id is below it."""
        self.eos_id = eos_id
        """The id that closes every document and every example."""
        self.prefix = prefix
        """Ids before every text: a begin-of-document token, where transformers puts one."""
        self.sha256 = sha256_of(file)
        first = self.encode("a")[:1]
        self._adds_space = bool(first) and self.piece(first[0]).startswith(WORD_START)

    @abstractmethod
    def _encode_parts(self, texts: list[str]) -> list[list[int]]:
        """The ids of each of ``texts``, parts of texts as :meth:`_parts` gives them."""

    def _parts(self, text: str) -> Iterator[str]:
        """What is encoded at once; nothing for an empty text."""
        return parts(text, self.border)

    def encode(self, text: str) -> list[int]:
        """The N ids of ``text``, without begin or end of document."""
        return [token for part in self._parts(text) for token in self._encode_parts([part])[0]]

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of ``texts`` as documents to train on, with begin and end tokens; none for an empty text.

        Returns:
            The N ids of all of them, concatenated, uint32, and the number of ids of each, int64 [texts].
        """
        cut = [list(self._parts(text)) for text in texts]
        flat = [part for some in cut for part in some]
        encoded: list[np.ndarray] = []
        for first in range(0, len(flat), _PARTS_AT_ONCE):
            encoded += [np.array(ids, np.uint32) for ids in self._encode_parts(flat[first : first + _PARTS_AT_ONCE])]
        before, after, rest = np.array(self.prefix, np.uint32), np.array([self.eos_id], np.uint32), iter(encoded)
        documents = [np.concatenate([before, *islice(rest, len(some)), after]) if some else before[:0] for some in cut]
        return np.concatenate([before[:0], *documents]), np.array([len(ids) for ids in documents], np.int64)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """A token as text; a space before a word is written "▁"."""

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """The id of a token as it is written in the tokenizer's file; None if there is no such token."""

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
        ends = [common_start(whole, self.encode(text)) for text in accumulate(texts[:-1])]
        return [whole[start:end] for start, end in pairwise([0, *accumulate(ends, max), len(whole)])]


def find_tokenizer(folder: str | Path) -> Path | None:
    """:func:`tokenizer_file`, or None if there is none, or no such folder."""
    files = (Path(folder) / name for name in (JSON_NAME, MODEL_NAME))
    return next((file for file in files if file.is_file()), None)


def tokenizer_file(folder: str | Path) -> Path:
    """The file in ``folder`` that decides a text's ids.

    Raises:
        ValueError: there is none.
    """
    if found := find_tokenizer(folder):
        return found
    fix = (
        "copy there the one that the model or the shards were made with, train one with: python -m data.tokenizer "
        "CONFIG, or name a folder with one of them: data.dir in stage one, data.tokenizer in stage two"
    )
    if any((Path(folder) / name).is_file() for name in ("vocab.json", "vocab.txt", "spiece.model", "tekken.json")):
        fix = f"let transformers write {JSON_NAME}: AutoTokenizer.from_pretrained(F).save_pretrained(F), F {folder}"
    raise ValueError(f"{folder} has no tokenizer: it holds neither {JSON_NAME} nor {MODEL_NAME}; {fix}")


def tokenizer_sha256(folder: str | Path) -> str:
    """SHA-256 of :func:`tokenizer_file`, which a prepared source is tied to.

    Raises:
        ValueError: there is none.
    """
    return sha256_of(tokenizer_file(folder))


def use_threads(count: int) -> None:
    """Let this process's ``tokenizers`` library, which otherwise uses all cores, encode on ``count`` of them.

    Call it before anything is encoded: threads are started once. A process that has started them must not fork.
    """
    os.environ["RAYON_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer in ``folder``.

    Raises:
        ValueError: there is none, it is damaged, it has no end-of-document token, or it treats text in a way that not
            every command can follow.
    """
    file = tokenizer_file(folder)
    return HuggingFace(file) if file.name == JSON_NAME else SentencePiece(file)


def require_vocabulary(
    tokenizer: TextTokenizer,
    vocab_size: int,
    fix: str = "set data.tokenizer to the folder of the tokenizer that the model was trained with",
) -> None:
    """Raise ValueError, with ``fix``, if ``tokenizer`` has ids that the model has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        beyond = next(i for i in range(vocab_size, tokenizer.vocab_size) if tokenizer.piece(i))
        raise ValueError(
            f"the tokenizer in {tokenizer.file.parent} has {tokenizer.vocab_size} pieces, but the model's vocabulary "
            f"is {vocab_size}: there is no embedding for {tokenizer.piece(beyond)!r}, whose id is {beyond}; {fix}"
        )


class SentencePiece(TextTokenizer):
    """A ``tokenizer.model``. Stage one's has nothing beside it; an import's ``tokenizer_config.json`` is honoured.

    Special tokens that are spelt out in a text are plain text, as in SentencePiece.
    """

    kind = "sentencepiece"

    def __init__(self, file: Path) -> None:
        self.processor = load_tokenizer(file.parent)
        """For decoding; it encodes to the same ids, too, but takes far more memory for a long text."""
        self.proto = model_proto(self.processor)
        """The model's own description of itself."""
        refuse_changed_text(self.proto, file)
        beside = _beside(file.parent)
        _refuse_unknown_tokens(self.processor, beside, file)
        self._spaced, self._encoder = self.proto.normalizer_spec.add_dummy_prefix, self.processor
        if self._spaced:
            # The space is put before the whole text here, so that a part of it gets none.
            bare = type(self.proto).FromString(self.processor.serialized_model_proto())
            bare.normalizer_spec.add_dummy_prefix = False
            self._encoder = SentencePieceProcessor(model_proto=bare.SerializeToString())
        self.border = AFTER_LINE_BREAK if cuts_exactly(self.proto) else None
        given = _given_eos_id(file, self.token_id, self.processor.vocab_size())
        prefix = [_bos_id(self.processor, beside, file)] if beside.get("add_bos_token") is True else []
        eos_id = self.processor.eos_id() if given is None else given
        super().__init__(file, self.processor.vocab_size(), eos_id, prefix)

    def _parts(self, text: str) -> Iterator[str]:
        return super()._parts(f" {text}" if self._spaced and text else text)

    def _encode_parts(self, texts: list[str]) -> list[list[int]]:
        return [self._encoder.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([i for i in ids if i < self.vocab_size])  # a model may have more logits

    def piece(self, token: int) -> str:
        return self.processor.id_to_piece(token) if token < self.vocab_size else ""

    def token_id(self, piece: str) -> int | None:
        token = self.processor.piece_to_id(piece)
        return token if self.processor.id_to_piece(token) == piece else None


class HuggingFace(TextTokenizer):
    """A ``tokenizer.json``, with the tokens that files beside it add, numbered as transformers numbers them.

    Special tokens that are spelt out in a text become these tokens, unless ``split_special_tokens`` says otherwise.
    """

    kind = "huggingface"

    def __init__(self, file: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer that can be read ({error}); restore it") from None
        # A file may have been saved with them on, and would then silently cut every long text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        beside = _beside(file.parent)
        for _, token in sorted(_added_tokens(beside).items()):
            self._add(token)
        eos_id = _given_eos_id(file, self.token_id, self._vocab_size())
        if eos_id is None:
            places = ", ".join(f"{name} ({field})" for name, field in EOS_PLACES)
            raise ValueError(
                f"{file} has no end-of-document token, which closes every example; name it in one of {places}"
            )
        for name in (*_SPECIAL, *_MORE_SPECIAL):
            found = beside.get(name) or []
            if name == "extra_special_tokens" and isinstance(found, dict):  # keyed by their names
                found = list(found.values())
            for token in found if isinstance(found, list) else [found]:
                self._add(token, special=True)
        self._tokenizer.encode_special_tokens = beside.get("split_special_tokens") is True
        description = json.loads(self._tokenizer.to_str())
        by_bytes = '"ByteLevel"' in json.dumps(description["decoder"])
        self._byte_level = tokenizers.decoders.ByteLevel() if by_bytes else None
        self.border = border_of(description)
        super().__init__(file, self._vocab_size(), eos_id, self._put_before(eos_id, file))

    def _add(self, token: Any, special: bool = False) -> None:
        """Give a token of ``tokenizer_config.json`` an id, if it has none."""
        fields = {"content": token} if isinstance(token, str) else {k: v for k, v in token.items() if k != "__type"}
        if self._tokenizer.token_to_id(fields["content"]) is None:
            fields["special"] = special or bool(fields.get("special"))
            self._tokenizer.add_tokens([tokenizers.AddedToken(**fields)])

    def _vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def _put_before(self, eos_id: int, file: Path) -> list[int]:
        """What the post-processor puts before a text. An option ``add_bos_token`` beside the file has no effect."""
        try:
            encoded = self._tokenizer.encode("a")
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(_cannot_encode(file, "a", error)) from None
        text = [place for place, special in enumerate(encoded.special_tokens_mask) if not special]
        if not text:
            raise ValueError(_cannot_encode(file, "a", "it leaves it out"))
        before, after = encoded.ids[: text[0]], encoded.ids[text[-1] + 1 :]
        if after not in ([], [eos_id]):
            raise ValueError(
                f"{file} puts {[self._tokenizer.id_to_token(token) for token in after]} after every text, but here "
                f"documents end with {self._tokenizer.id_to_token(eos_id)!r}; correct its post_processor, or eos_token"
            )
        return before

    def _encode_parts(self, texts: list[str]) -> list[list[int]]:
        try:
            if len(texts) == 1:  # without threads: a process that forks later may do this
                return [self._tokenizer.encode(texts[0], add_special_tokens=False).ids]
            return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(_cannot_encode(self.file, texts[0][:60], error)) from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def piece(self, token: int) -> str:
        piece = self._tokenizer.id_to_token(token) or ""
        if self._byte_level is None:
            return piece
        return self._byte_level.decode([piece]).replace(" ", WORD_START)

    def token_id(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)


def _cannot_encode(file: Path, text: str, reason: object) -> str:
    return (
        f"{file} cannot encode some texts, such as {text!r} ({reason}); add tokens for all bytes or an unk_token, or "
        "take another tokenizer"
    )


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids at the start of both are the same."""
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def _beside(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` with what older versions kept in other files, merged as transformers does."""
    found: dict[str, Any] = {}
    if (folder / CONFIG_NAME).is_file():
        found = read_json(folder / CONFIG_NAME)
    if "added_tokens_decoder" in found:
        return found
    if (folder / "special_tokens_map.json").is_file():
        found |= read_json(folder / "special_tokens_map.json")
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
        found["added_tokens_decoder"] = {token: {"content": piece} for piece, token in added.items()}
    return found


def _added_tokens(beside: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {int(token): fields for token, fields in (beside.get("added_tokens_decoder") or {}).items()}


def _refuse_unknown_tokens(processor: SentencePieceProcessor, beside: dict[str, Any], file: Path) -> None:
    """Refuse tokens added beside a ``tokenizer.model``, which cannot take any."""
    for token, fields in _added_tokens(beside).items():
        piece = fields["content"]
        if token >= processor.vocab_size() or processor.id_to_piece(token) != piece:
            raise ValueError(
                f"files beside {file} add the token {piece!r} ({token}), which it lacks and only a {JSON_NAME} can "
                "add; write one there with transformers: "
                f"AutoTokenizer.from_pretrained({str(file.parent)!r}).save_pretrained({str(file.parent)!r})"
            )


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _bos_id(processor: SentencePieceProcessor, beside: dict[str, Any], file: Path) -> int:
    """What ``add_bos_token`` puts before every text."""
    piece = _content(beside.get("bos_token"))
    token = processor.bos_id() if piece is None else processor.piece_to_id(piece)
    if token < 0 or token == processor.unk_id():
        raise ValueError(
            f"{file.parent / CONFIG_NAME} asks for add_bos_token, but bos_token {piece!r} is not a piece of {file}; "
            "correct it"
        )
    return token


def _given_eos_id(file: Path, token_id: Any, vocab_size: int) -> int | None:
    """The end-of-document token that files beside ``file`` name; None if none does."""
    for name, field in EOS_PLACES:
        path = file.parent / name
        given: Any = read_json(path).get(field) if path.is_file() else None
        if isinstance(given, list):  # several may end a text in generation; the first closes a document
            given = given[0] if given else None
        given = _content(given)
        if given is None:
            continue
        token = token_id(given) if isinstance(given, str) else given
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"{path}: {field} is {given!r}, which is not a token of {file}; correct it")
        return token
    return None
