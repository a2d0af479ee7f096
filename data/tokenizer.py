"""Train the SentencePiece tokenizer: ``python -m data.tokenizer CONFIG [key.sub=value ...]``.

Every setting that would change ids after export to Hugging Face is fixed here. With ``model_type: bpe`` the ids are
the same there, and any text comes back from its ids unchanged: no normalisation, no added or removed space, a line
break is a piece of its own, and what has no piece is spelt in bytes. One exception: the character U+2581 stands for
a space inside SentencePiece, and comes back as one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from data.config import DataConfig
from data.files import read_json, sha256_of, write_atomically, write_json
from data.sentencepiece_file import MODEL_NAME
from data.sources import Source
from data.tokenization import JSON_NAME, load_text_tokenizer
from settings import load, parse_arguments, user_errors

MANIFEST_NAME = "tokenizer.manifest.json"
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
LINE_BYTES = 4000
"""Longest line trained on; SentencePiece silently leaves out lines above 4192 bytes."""


def train_tokenizer(config: DataConfig) -> str:
    """Train ``config.dir/tokenizer.model`` unless it is there already; returns a sentence saying what was done.

    Raises:
        ValueError: one is there with other settings, or the text does not suit ``vocab_size``.
    """
    folder = Path(config.dir)
    path = folder / MODEL_NAME
    if (folder / JSON_NAME).exists():
        return _taken(folder / JSON_NAME, config.tokenizer.vocab_size)
    if path.exists():
        _require_same_settings(config)
        return f"{path} exists already ({config.tokenizer.vocab_size:,} pieces); nothing to do"
    folder.mkdir(parents=True, exist_ok=True)
    taken_bytes = {source.name: 0 for source in config.sources}
    model = _train(config, _training_lines(config, taken_bytes))
    # The model comes last: once it is there, so is the manifest that says how it was made.
    write_json(
        folder / MANIFEST_NAME,
        {
            "settings": config.tokenizer.model_dump(),
            "sha256": hashlib.sha256(model).hexdigest(),
            "text_bytes": taken_bytes,
            "sentencepiece": sentencepiece.__version__,
        },
    )
    write_atomically(path, model)
    taken = ", ".join(f"{name} {size:,}" for name, size in taken_bytes.items())
    return f"{path}: {config.tokenizer.vocab_size:,} pieces, trained on {sum(taken_bytes.values()):,} bytes ({taken})"


def _taken(path: Path, vocab_size: int) -> str:
    """What is said of a Hugging Face tokenizer, which is taken as it is."""
    found = load_text_tokenizer(path.parent).vocab_size
    if found != vocab_size:
        raise ValueError(
            f"{path} has {found:,} tokens, and data.tokenizer.vocab_size is {vocab_size:,}; set it (and "
            "model.vocab_size) to the same number, or move the file away to train a tokenizer"
        )
    return f"{path} is taken as it is ({found:,} tokens); nothing to do"


def is_ours(folder: Path) -> bool:
    """True if the tokenizer in ``folder`` is one that was trained here, and is as it was."""
    path = folder / MODEL_NAME
    if (folder / JSON_NAME).exists() or not (folder / MANIFEST_NAME).is_file() or not path.is_file():
        return False
    return bool(read_json(folder / MANIFEST_NAME).get("sha256") == sha256_of(path))


def _require_same_settings(config: DataConfig) -> None:
    path = Path(config.dir) / MODEL_NAME
    manifest_path = path.with_name(MANIFEST_NAME)
    wanted: dict[str, Any] = config.tokenizer.model_dump()
    if manifest_path.exists():
        manifest = read_json(manifest_path)
        if manifest.get("sha256") != sha256_of(path):
            raise ValueError(f"{path} is not the file that {manifest_path} describes; remove both and train again")
        recorded: dict[str, Any] = manifest.get("settings", {})
    else:  # brought from elsewhere: the size is all that can be compared
        wanted = {"vocab_size": wanted["vocab_size"]}
        recorded = {"vocab_size": load_text_tokenizer(config.dir).vocab_size}
    changed = [f"{key} {recorded.get(key)} -> {value}" for key, value in wanted.items() if recorded.get(key) != value]
    if changed:
        raise ValueError(
            f"{path} was trained with other settings ({', '.join(changed)}); set data.tokenizer back, "
            "choose another data.dir, or remove the tokenizer and the shards made with it"
        )


def _train(config: DataConfig, lines: Iterator[bytes]) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=config.tokenizer.model_type,
            vocab_size=config.tokenizer.vocab_size,
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
        raise ValueError(_size_problem(config.tokenizer.vocab_size, " ".join(str(error).split()))) from None
    return model.getvalue()


def _size_problem(vocab_size: int, reason: str) -> str:
    """What SentencePiece says of a vocabulary that does not suit the text, with the fix that there is here."""
    told = f"data.tokenizer.vocab_size={vocab_size}"
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return (
            f"{told} is too small for the text, whose characters and the special pieces are {needed[1]}, each a piece "
            "of its own; set it to more than that"
        )
    if most := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", reason):
        return (
            f"{told} is too large for the text, which gives {most[1]} pieces at most; lower it, or give more text "
            "(data.sources, data.tokenizer.train_bytes)"
        )
    return (
        f"{told} does not suit the text ({reason.rpartition('] ')[2]}); change it, or give more text (data.sources, "
        "data.tokenizer.train_bytes)"
    )


def _training_lines(config: DataConfig, taken_bytes: dict[str, int]) -> Iterator[bytes]:
    """Lines from all sources, each source's share by weight; ``taken_bytes`` is counted up on the way."""
    total_weight = sum(source.weight for source in config.sources)
    for source in config.sources:
        budget_bytes = int(config.tokenizer.train_bytes * source.weight / total_weight)
        for text in _spread_documents(Source(source), budget_bytes):
            taken_bytes[source.name] += len(text)
            for line in text.split(b"\n"):
                for start in range(0, len(line), LINE_BYTES):
                    # A cut inside a character leaves broken bytes at the seam, which the decoder drops.
                    piece = line[start : start + LINE_BYTES].decode(errors="ignore")
                    if piece and "\0" not in piece:  # SentencePiece refuses NUL in training text
                        yield piece.encode()
        if not taken_bytes[source.name]:
            raise ValueError(f"source '{source.name}' holds no text to train the tokenizer on; check its files")


def _spread_documents(source: Source, budget_bytes: int) -> Iterator[bytes]:
    """About ``budget_bytes`` of text, from the start of every file in equal parts, so that no file speaks for all."""
    # Small files first: what they cannot give is shared among the larger ones.
    order = sorted(range(len(source.files)), key=lambda n: (source.files[n].stat().st_size, n)) or [0]
    for done, number in enumerate(order):
        allowance = budget_bytes // (len(order) - done)
        for document in source.file_documents(number):
            if allowance <= 0:
                break
            text = document.text[:allowance]
            allowance -= len(text)
            budget_bytes -= len(text)
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.tokenizer",
        description="Train a SentencePiece tokenizer on a sample (data.tokenizer.train_bytes, in bytes of text) of the "
        "sources and write it to data.dir/tokenizer.model. If it is there already with the same settings, do nothing.",
    )
    parser.add_argument("config", help="YAML file; only its data block is read")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="for example data.tokenizer.vocab_size=8000 (pieces) data.tokenizer.train_bytes=20000000 (bytes)",
    )
    arguments = parse_arguments(parser)
    with user_errors():
        print(train_tokenizer(load(arguments.config, arguments.overrides, DataConfig, block="data")), flush=True)


if __name__ == "__main__":
    main()
