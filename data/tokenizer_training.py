"""Training a tokenizer of either kind. Every setting that would change ids after export to Hugging Face is fixed here.

SentencePiece: with ``model_type: bpe`` the ids are the same there, and any text comes back from its ids unchanged: no
normalisation, no added or removed space, a line break is a piece of its own, and what has no piece becomes bytes.
One exception: the character U+2581 stands for a space inside SentencePiece, and comes back as one.

Byte-level BPE: a text is cut into words by GPT-2's pattern, with single digits, and a word's bytes are merged. Any text
comes back from its ids unchanged, and the file has transformers' own format.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.config import TokenizerConfig
from settings import one_line

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
"""Of every SentencePiece model that is trained here."""
LINE_BYTES = 4000
"""Longest line trained on; SentencePiece silently leaves out lines above 4192 bytes."""
END, PADDING = "<|endoftext|>", "<|padding|>"
"""Special tokens of a byte-level BPE, ids 0 and 1."""
DECODER_ONLY = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
"""For any ``tokenizer_config.json``: a batch's prompts all end where their continuations begin."""
BYTE_LEVEL_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "pad_token": PADDING,
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": True,  # spelt out in a text they are plain text
    **DECODER_ONLY,
}
"""The ``tokenizer_config.json`` of a byte-level BPE."""
LEAST_PAIRS = 2
"""A pair of tokens that occurs only once is not merged."""


def train_sentencepiece(config: TokenizerConfig, texts: Iterable[bytes]) -> bytes:
    """A ``tokenizer.model``.

    Args:
        config: its settings.
        texts: what to train on, UTF-8.

    Raises:
        ValueError: the texts do not suit ``vocab_size``.
        BaseException: what reading the texts raises.
    """
    model, raised = io.BytesIO(), list[BaseException]()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_keeping(_lines(texts), raised),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            num_threads=8,  # fixed: unigram sums in thread order, so another number gives another model
            minloglevel=2,
        )
    except RuntimeError as error:
        if not raised:
            raise ValueError(_size_problem(config.vocab_size, one_line(error))) from None
    if raised:
        raise raised[0]
    return model.getvalue()


def train_byte_level(config: TokenizerConfig, texts: Iterable[bytes]) -> bytes:
    """A ``tokenizer.json``, byte-level BPE; ``BYTE_LEVEL_CONFIG`` belongs beside it.

    Args:
        config: its settings.
        texts: what to train on, UTF-8.

    Raises:
        ValueError: the texts do not suit ``vocab_size``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=LEAST_PAIRS,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A cut at the end of a file's share may fall inside a character, which the decoder drops.
    tokenizer.train_from_iterator((text.decode(errors="ignore") for text in texts), trainer)
    if (made := tokenizer.get_vocab_size()) < config.vocab_size:
        raise ValueError(_too_large(config.vocab_size, made))
    return tokenizer.to_str(pretty=True).encode()


def _lines(texts: Iterable[bytes]) -> Iterator[bytes]:
    for text in texts:
        for line in text.split(b"\n"):
            for start in range(0, len(line), LINE_BYTES):
                # A cut inside a character leaves broken bytes at the seam, which the decoder drops.
                piece = line[start : start + LINE_BYTES].decode(errors="ignore")
                if piece and "\0" not in piece:  # SentencePiece refuses NUL in training text
                    yield piece.encode()


def _keeping(lines: Iterator[bytes], raised: list[BaseException]) -> Iterator[bytes]:
    """``lines``; what they raise is kept in ``raised``, because SentencePiece replaces it by an error of its own."""
    try:
        yield from lines
    except GeneratorExit:  # closed before its end
        raise
    except BaseException as error:
        raised.append(error)
        raise


def _too_large(vocab_size: int, most: int | str) -> str:
    return (
        f"data.tokenizer.vocab_size={vocab_size} is too large for the text, which yields at most {most} pieces; lower "
        "it, or give more text (data.sources, data.tokenizer.train_bytes)"
    )


def _size_problem(vocab_size: int, reason: str) -> str:
    """SentencePiece's error about a vocabulary that does not suit the text, with the fix in terms of the config."""
    given = f"data.tokenizer.vocab_size={vocab_size}"
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return (
            f"{given} is too small: the characters of the text and the special pieces alone take {needed[1]} pieces; "
            "set it higher"
        )
    if most := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", reason):
        return _too_large(vocab_size, most[1])
    return (
        f"{given} does not suit the text ({reason.rpartition('] ')[2]}); change it, or give more text (data.sources, "
        "data.tokenizer.train_bytes)"
    )
