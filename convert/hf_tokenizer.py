"""Tokenizer files for an export, so that ids in transformers are those that the model was trained with.

A ``tokenizer.json`` is copied unchanged, with the files that belong to it, and its ids are compared with transformers'.
A SentencePiece ``tokenizer.model`` is converted to a ``tokenizer.json``, and the ids of both are compared on text. It
prepends what training did: nothing (tools that add a begin-of-document token themselves would score it twice), or what
an import's ``tokenizer_config.json`` asks for.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from data.files import read_json, write_json
from data.tokenization import (
    CONFIG_NAME,
    GENERATION_NAME,
    JSON_NAME,
    SentencePiece,
    TextTokenizer,
    load_text_tokenizer,
    require_vocabulary,
)
from data.tokenizer_files import copy_tokenizer
from data.tokenizer_json import require_same_ids, sample_lines
from data.tokenizer_training import DECODER_ONLY

_COMPARED_LINES = 1000
_ALIKE = f"ids are transformers' on {_COMPARED_LINES:,} texts"
_AS_IT_IS = "PreTrainedTokenizerFast"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_tokenizer(source: Path, out: Path, vocab_size: int, max_positions: int) -> tuple[dict[str, Any], str]:
    """Write the tokenizer in ``source`` to ``out`` in the form that transformers reads.

    Args:
        source: holds ``tokenizer.json`` or ``tokenizer.model``.
        out: an existing folder.
        vocab_size: of the model's embedding.
        max_positions: the longest context, tokens.

    Returns:
        The ids of the bos, eos and pad tokens, by their names in ``config.json``, and a sentence on what was done.

    Raises:
        ValueError: if there is none, it does not fit the embedding, or transformers would give other ids.
    """
    tokenizer = load_text_tokenizer(source)
    fix = "give the tokenizer that the model was trained with (--tokenizer FOLDER)"
    require_vocabulary(tokenizer, vocab_size, fix)
    copied = copy_tokenizer(source, out)
    ids = _special_ids(tokenizer, out)
    if not isinstance(tokenizer, SentencePiece):
        return ids, f"{', '.join(copied)} copied from {source}"
    converted, compared = require_same_ids(tokenizer)
    converted.save(str(out / JSON_NAME))
    _amend_config(out, _tokenizer_config(tokenizer, ids, max_positions))
    others = [name for name in copied if name not in (tokenizer.file.name, CONFIG_NAME)]
    beside = f"; {', '.join(others)} copied" if others else ""
    return ids, f"{JSON_NAME} written from {tokenizer.file.name}: {compared}{beside}"


def _amend_config(folder: Path, fields: dict[str, Any]) -> None:
    """Merge ``fields`` into the tokenizer's config in ``folder``."""
    given = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    write_json(folder / CONFIG_NAME, given | fields)


def require_transformers_ids(tokenizer: TextTokenizer, folder: Path) -> str:
    """Check that transformers gives the ids of ``tokenizer`` for the export in ``folder``; returns a sentence on it.

    If the class named in the export, or implied by its model type, gives other ids, the export is changed to name one
    that uses ``tokenizer.json`` as it is.

    Raises:
        ValueError: if that gives other ids, too.
    """
    if (problem := _difference(tokenizer, folder, auto=True)) is None:
        return _ALIKE
    _amend_config(folder, {"tokenizer_class": _AS_IT_IS})
    if left := _difference(tokenizer, folder, auto=True):
        raise ValueError(
            f"the export's tokenizer differs from the one in {tokenizer.file}: {left}; it is kept in {folder} for "
            "inspection, and --no-compare exports it anyway"
        )
    return f"{_ALIKE}, as {CONFIG_NAME} asks for {_AS_IT_IS} now; before, {problem}"


def compared_with_transformers(tokenizer: TextTokenizer, folder: Path, auto: bool) -> str:
    """A sentence on whether transformers gives the ids of ``tokenizer`` for ``folder``.

    Args:
        tokenizer: of ``folder``; its own file takes precedence where the two differ: transformers 5 rebuilds the rules
            of some classes differently from those that the model was trained with.
        folder: of a Hugging Face checkpoint.
        auto: use the class that the folder names; code in the folder is not run.
    """
    problem = _difference(tokenizer, folder, auto)
    return _ALIKE if problem is None else f"those of {tokenizer.file.name} are taken; {problem}"


def _difference(tokenizer: TextTokenizer, folder: Path, auto: bool) -> str | None:
    """How transformers differs from ``tokenizer``; None if not at all."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    loader: Any = AutoTokenizer if auto else PreTrainedTokenizerFast
    try:
        theirs = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # or it may prompt
    except Exception as error:  # any failure, with transformers' own message
        return f"transformers cannot load it ({_last_line(error)})"
    special = tokenizer.piece(tokenizer.eos_id)
    lines = [f"a {special} b", f"{special}a", *islice(filter(None, sample_lines()), _COMPARED_LINES - 2)]
    found = theirs(lines, split_special_tokens=True) if isinstance(tokenizer, SentencePiece) else theirs(lines)
    ours = [tokenizer.prefix + tokenizer.encode(line) for line in lines]
    after = [tokenizer.eos_id]  # some append it to every text, where examples have it only at their end
    different = [line for line, a, b in zip(lines, ours, found["input_ids"], strict=True) if b not in (a, [*a, *after])]
    if not different:
        return None
    return (
        f"{type(theirs).__name__} in transformers gives other ids for {len(different)} of {len(lines):,} texts, such "
        f"as {different[0][:40]!r}"
    )


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__


def _tokenizer_config(tokenizer: SentencePiece, ids: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """Names a class that uses ``tokenizer.json``; LlamaTokenizer and its fast variant build their own tokenizer."""
    names = {name.removesuffix("_id"): tokenizer.piece(i) for name, i in ids.items() if isinstance(i, int)}
    return {
        "tokenizer_class": _AS_IT_IS,
        **names,
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "unk_token": tokenizer.piece(tokenizer.processor.unk_id()),
        "add_prefix_space": bool(tokenizer.proto.normalizer_spec.add_dummy_prefix),
        "clean_up_tokenization_spaces": False,
        **DECODER_ONLY,
        "split_special_tokens": True,  # "</s>" in a text is text, as for SentencePiece
        "model_max_length": max_positions,
    }


def _special_ids(tokenizer: TextTokenizer, folder: Path) -> dict[str, Any]:
    """From generation config and tokenizer config, otherwise from how the tokenizer encodes a text.

    Stage one puts the end-of-document token between documents and none before them, so that one is bos, too.
    """
    path = folder / GENERATION_NAME
    given = read_json(path) if path.is_file() else {}
    named = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    pad = None
    if isinstance(tokenizer, SentencePiece):
        pad = tokenizer.processor.pad_id() if tokenizer.processor.pad_id() >= 0 else tokenizer.eos_id
    defaults = (tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eos_id, tokenizer.eos_id, pad)
    found = dict(zip(_IDS, defaults, strict=True))
    for name in _IDS:
        token = named.get(name.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        place = tokenizer.token_id(token) if isinstance(token, str) else None
        found[name] = given.get(name, place if place is not None else found[name])
    return found
