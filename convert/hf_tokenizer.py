"""A tokenizer's files for an export: ids in transformers are those that the model was trained with.

A ``tokenizer.json`` is copied as it is, with what lies beside it. A SentencePiece ``tokenizer.model`` is written out as
a ``tokenizer.json``, and the ids of both are compared on text before anything is vouched for:

    BPE        the pieces' scores are the order of the merges: ids are the same, whatever the text
    unigram    transformers may break a tie between two ways to cut a text the other way

What makes the ids the same: spaces become "▁" in the whole text, one is put before it only where the model asks for it,
nothing is cut before the merges, and no begin-of-document token is added (scored twice by tools that add their own).
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from data.files import read_json, write_json
from data.tokenizer import load_tokenizer
from trainer.checkpoints.weights_folder import TOKENIZERS, tokenizer_files
from tune.text import JSON_NAME, load_text_tokenizer, require_vocabulary

MODEL_NAME, CONFIG_NAME, GENERATION_NAME = TOKENIZERS[0], "tokenizer_config.json", "generation_config.json"
COMPARED_LINES = 4000
UNIGRAM_TIES = 0.02
"""Largest share of lines whose ids may differ for a unigram model."""
_SPACE = "▁"
_BPE, _UNIGRAM = 2, 1
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_tokenizer(source: Path, out: Path, vocab_size: int, max_positions: int) -> tuple[dict[str, Any], str]:
    """Write the tokenizer in ``source`` to ``out`` in the form that transformers reads.

    Args:
        source: holds ``tokenizer.json`` or ``tokenizer.model``.
        out: an existing folder.
        vocab_size: of the model's embedding.
        max_positions: the longest context, tokens.

    Returns:
        The ids of the tokens that begin, end and fill texts, by their names in ``config.json``, and a sentence on what
        was done.

    Raises:
        ValueError: if there is none, it does not fit the embedding, or transformers would give other ids.
    """
    files = tokenizer_files(source)
    text = load_text_tokenizer(source)
    fix = "give the tokenizer that the model was trained with (--tokenizer FOLDER)"
    require_vocabulary(text.vocab_size, source, vocab_size, fix)
    for file in files:
        shutil.copyfile(file, out / file.name)
    if (source / JSON_NAME).is_file():
        return _given_ids(out, text.eos_id, text.prefix), f"tokenizer.json copied from {source}"
    processor = load_tokenizer(source)
    converted = convert(processor)
    lines = list(islice(sample_lines(), COMPARED_LINES))
    different = compare_ids(processor, converted, lines)
    allowed = UNIGRAM_TIES * len(lines) if _model_proto(processor).trainer_spec.model_type == _UNIGRAM else 0
    if len(different) > allowed:
        raise ValueError(
            f"transformers would give other ids than {source / MODEL_NAME} for {len(different)} of {len(lines):,} "
            f"lines, {different[0][:60]!r} for one; train one "
            "with data.tokenizer (model_type bpe), whose ids are the same"
        )
    converted.save(str(out / JSON_NAME))
    ids = _sentencepiece_ids(processor)
    write_json(out / CONFIG_NAME, _tokenizer_config(processor, ids, max_positions))
    done = f"tokenizer.json written from {MODEL_NAME}: ids are the same on {len(lines) - len(different):,}"
    done += f" of {len(lines):,} lines"
    if allowed:
        done += ", and it is a unigram model, of which ids can differ where two ways to cut a text score the same"
    return ids, done


def convert(processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The same tokenizer for the ``tokenizers`` library.

    Raises:
        ValueError: for a kind of model, or a normalisation, that it does not know.
    """
    proto = _model_proto(processor)
    kind, rules = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind not in (_BPE, _UNIGRAM):
        raise ValueError("a SentencePiece model must be of type bpe or unigram to be exported; train another one")
    if rules.name != "identity" or rules.remove_extra_whitespaces:
        raise ValueError(
            f"the SentencePiece model changes text (normalisation {rules.name}, remove_extra_whitespaces "
            f"{rules.remove_extra_whitespaces}), which transformers would do otherwise; train it with identity and "
            "false, as data.tokenizer does"
        )
    pieces, bytes_ = [(p.piece, p.score) for p in proto.pieces], proto.trainer_spec.byte_fallback
    unknown = processor.unk_id()
    if kind == _BPE:
        vocabulary = {piece: place for place, (piece, _) in enumerate(pieces)}
        model: Any = models.BPE(
            vocabulary, _merges(proto), unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=bytes_
        )
    else:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=bytes_)
    tokenizer = Tokenizer(model)
    prefix = rules.add_dummy_prefix
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    for piece in proto.pieces:
        if piece.type in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    return tokenizer


def compare_ids(
    processor: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, lines: Iterable[str]
) -> list[str]:
    """The ``lines`` for which the two give other ids.

    Control pieces spelt out in a text are text for both: for transformers ``split_special_tokens`` says so.
    """
    tokenizer.encode_special_tokens = True
    return [line for line in lines if processor.encode(line) != tokenizer.encode(line, add_special_tokens=False).ids]


def sample_lines() -> Iterable[str]:
    """Text to compare ids on, the same every time: what is hard, prose, then as much code as Python comes with."""
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
    root = Path(__file__).resolve().parent.parent
    yield from _lines(sorted(root.glob("docs/*.md")))
    yield from _lines(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))


def _lines(files: Iterable[Path]) -> Iterable[str]:
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        yield from text.split("\n")
        yield text[:3000]  # line breaks within


def _model_proto(processor: sentencepiece.SentencePieceProcessor) -> Any:
    # Within the package, and not at the top: it needs protobuf, which only an export does.
    from sentencepiece import sentencepiece_model_pb2 as pb2

    return pb2.ModelProto.FromString(processor.serialized_model_proto())  # type: ignore[attr-defined]


def _merges(proto: Any) -> list[tuple[str, str]]:
    """All ways to put a piece together from two others, best piece first: that is how SentencePiece merges."""
    scores = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    ranks = {piece: rank for rank, piece in enumerate(p.piece for p in proto.pieces)}
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _sentencepiece_ids(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Stage one puts the end-of-document token between documents and none before them: so that one begins texts."""
    pad = processor.pad_id()
    eos = processor.eos_id()
    return dict(zip(_IDS, (eos, eos, pad if pad >= 0 else eos), strict=True))


def _tokenizer_config(
    processor: sentencepiece.SentencePieceProcessor, ids: dict[str, Any], max_positions: int
) -> dict[str, Any]:
    """LlamaTokenizer and its fast variant build a tokenizer of their own; this class takes ``tokenizer.json``."""
    names = {name.removesuffix("_id"): processor.id_to_piece(place) for name, place in ids.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "add_prefix_space": bool(_model_proto(processor).normalizer_spec.add_dummy_prefix),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a text is text, as for SentencePiece
        "model_max_length": max_positions,
    }


def _given_ids(folder: Path, eos_id: int, prefix: list[int]) -> dict[str, Any]:
    """Of a ``tokenizer.json``: as its generation config has them, otherwise from what it does to a text."""
    path = folder / GENERATION_NAME
    given = read_json(path) if path.is_file() else {}
    named = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    tokenizer = Tokenizer.from_str(json.dumps(read_json(folder / JSON_NAME)))
    found = {"bos_token_id": prefix[0] if prefix else eos_id, "eos_token_id": eos_id, "pad_token_id": None}
    for name in _IDS:
        token = named.get(name.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        place = tokenizer.token_to_id(token) if isinstance(token, str) else None
        found[name] = given.get(name, place if place is not None else found[name])
    return found
