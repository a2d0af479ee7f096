"""A SentencePiece ``tokenizer.model``: reading it, and what its own description says about how it treats text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

MODEL_NAME = "tokenizer.model"
UNIGRAM, BPE = 1, 2
"""Kinds of SentencePiece models, by their number in the file."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Kinds of SentencePiece pieces."""


def load_tokenizer(folder: str | Path) -> SentencePieceProcessor:
    """The SentencePiece model of a data folder.

    Raises:
        ValueError: it is missing, damaged, or has no end-of-document piece.
    """
    path = Path(folder) / MODEL_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist; train it with: python -m data.tokenizer CONFIG")
    try:
        tokenizer = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise ValueError(f"{path} is not a SentencePiece model; restore it, or remove it and train again") from None
    if tokenizer.eos_id() < 0:
        raise ValueError(f"{path} has no end-of-sentence piece, which closes every document; train one with eos_id set")
    return tokenizer


def model_proto(processor: SentencePieceProcessor) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as pb2

    return pb2.ModelProto.FromString(processor.serialized_model_proto())  # type: ignore[attr-defined]


def refuse_changed_text(proto: Any, file: Path) -> None:
    """Refuse a model whose ids do not give the same text back, or for which transformers would give other ids."""
    rules, kind = proto.normalizer_spec, proto.trainer_spec.model_type
    if kind not in (BPE, UNIGRAM):
        raise ValueError(
            f"{file} must be of type bpe or unigram, the kinds that can be exported; train another with data.tokenizer"
        )
    changes = []
    if rules.precompiled_charsmap or rules.name not in ("", "identity"):
        changes.append(f"normalisation {rules.name}")
    if rules.remove_extra_whitespaces:
        changes.append("remove_extra_whitespaces True")
    if not rules.escape_whitespaces:
        changes.append("escape_whitespaces False")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        changes.append("treat_whitespace_as_suffix True")
    if changes:
        raise ValueError(
            f"{file} changes text before splitting it into pieces ({', '.join(changes)}), so training would not see "
            "the original and transformers would give other ids; take the model's tokenizer.json, or train one with "
            "data.tokenizer"
        )


def cuts_exactly(proto: Any) -> bool:
    """Whether it is BPE whose pieces have line breaks only at their end: merges never depend on text beyond one.

    Unigram compares sums over the whole text in fp32, so rounding can decide between the same pieces either way.
    """
    pieces = [piece.piece for piece in proto.pieces]
    spelt = proto.trainer_spec.byte_fallback or "\n" in pieces  # else unknown, and adjacent unknowns are one
    return proto.trainer_spec.model_type == BPE and spelt and not any("\n" in piece[:-1] for piece in pieces)
