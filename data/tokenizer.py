"""Train the tokenizer, or copy one: ``python -m data.tokenizer CONFIG [key.sub=value ...]``.

The tokenizer in ``data.dir`` decides the ids of everything that is prepared there. So it is never replaced: one that is
there already must be what the config asks for, or is refused.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tokenizers

from data.config import DataConfig, TokenizerConfig, load_data
from data.files import read_json, sha256_of, write_atomically, write_json
from data.sentencepiece_file import MODEL_NAME
from data.sources import Source
from data.tokenization import CONFIG_NAME, JSON_NAME, TextTokenizer, load_text_tokenizer, tokenizer_sha256
from data.tokenizer_files import copy_tokenizer, tokenizer_contents, tokenizer_names
from data.tokenizer_training import BYTE_LEVEL_CONFIG, train_byte_level, train_sentencepiece
from settings import command_parser, parse_arguments, user_errors

MANIFEST_NAME = "tokenizer.manifest.json"
_HUB_FILES = 100
_LEAST_PIECES = 300


def train_tokenizer(config: DataConfig) -> str:
    """Put the tokenizer that ``config`` asks for into ``config.dir``, unless it is there already.

    Returns:
        A sentence saying what was done.

    Raises:
        ValueError: another one is there, the one to copy does not fit, or the text does not suit ``vocab_size``.
    """
    folder, wanted = Path(config.dir), config.tokenizer
    if wanted.path is not None:
        return _take(Path(wanted.path), folder, wanted)
    for name in (JSON_NAME, MODEL_NAME):
        if (folder / name).exists():
            brought = not (folder / MANIFEST_NAME).exists()
            if not brought:
                _require_same_settings(wanted, folder / name)
            require_configured(wanted, load_text_tokenizer(folder))
            there = "is taken as it is" if brought else "exists already"
            return f"{folder / name} {there} ({wanted.vocab_size:,} tokens); nothing to do"
    return _train(config, folder)


def require_configured(wanted: TokenizerConfig, tokenizer: TextTokenizer) -> None:
    """Refuse a tokenizer that is not what the config says.

    Args:
        wanted: the config's block.
        tokenizer: that of ``data.dir``.

    Raises:
        ValueError: it is of another kind or size, or not that of ``data.tokenizer.path``.
    """
    if tokenizer.kind != wanted.kind:
        raise ValueError(
            f"{tokenizer.file} is of kind {tokenizer.kind}, but data.tokenizer.kind is {wanted.kind}; set it to "
            f"{tokenizer.kind}, or choose another data.dir"
        )
    if tokenizer.vocab_size != wanted.vocab_size:
        raise ValueError(
            f"{tokenizer.file} has {tokenizer.vocab_size:,} tokens, but data.tokenizer.vocab_size is "
            f"{wanted.vocab_size:,}; set it (and model.vocab_size) to the same number, or choose another data.dir"
        )
    # Once it is copied the folder may be deleted: shards are tied to the copy.
    if wanted.path is not None and Path(wanted.path).is_dir() and tokenizer_sha256(wanted.path) != tokenizer.sha256:
        raise ValueError(_another(tokenizer.file.parent, wanted.path, tokenizer.file.name))


def is_ours(folder: Path) -> bool:
    """True if the tokenizer in ``folder`` is one that was trained here, and is unchanged."""
    path = folder / MODEL_NAME
    if (folder / JSON_NAME).exists() or not (folder / MANIFEST_NAME).is_file() or not path.is_file():
        return False
    return bool(read_json(folder / MANIFEST_NAME).get("sha256") == sha256_of(path))


def _take(source: Path, folder: Path, wanted: TokenizerConfig) -> str:
    """Copy the tokenizer in ``source``, after checking that it is what the config says."""
    if not source.is_dir():
        what = f"is a file; give its folder, {source.parent}" if source.exists() else "does not exist; correct it"
        raise ValueError(f"data.tokenizer.path {source} {what}")
    given = load_text_tokenizer(source)
    require_configured(wanted, given)
    contents = tokenizer_contents(source)
    there = {name: (folder / name).read_bytes() for name in tokenizer_names(folder)}
    if differing := sorted(name for name in there if there[name] != contents.get(name)):
        raise ValueError(_another(folder, source, ", ".join(differing)))
    if there == contents:
        return f"{folder / given.file.name} is already that of {source} ({given.vocab_size:,} tokens); nothing to do"
    folder.mkdir(parents=True, exist_ok=True)
    copied = ", ".join(copy_tokenizer(source, folder))
    return f"{folder / given.file.name}: {given.vocab_size:,} tokens, taken from {source} as it is ({copied})"


def _another(folder: Path, source: str | Path, names: str) -> str:
    return (
        f"{folder} holds a tokenizer that differs from data.tokenizer.path {source} (in {names}); undo the change of "
        "data.tokenizer, choose another data.dir, or remove the tokenizer there and the shards made with it"
    )


def _require_same_settings(wanted: TokenizerConfig, path: Path) -> None:
    manifest = read_json(path.with_name(MANIFEST_NAME))
    if manifest.get("sha256") != sha256_of(path):
        raise ValueError(
            f"{path} is not the file that {MANIFEST_NAME} beside it describes; remove both and train again"
        )
    recorded = TokenizerConfig.model_validate(manifest.get("settings", {})).model_dump()
    changed = [
        f"{key} {recorded[key]} -> {value}" for key, value in wanted.model_dump().items() if recorded[key] != value
    ]
    if changed:
        raise ValueError(
            f"{path} was trained with other settings ({', '.join(changed)}); undo the change of data.tokenizer, choose "
            "another data.dir, or remove the tokenizer and the shards made with it"
        )


def _train(config: DataConfig, folder: Path) -> str:
    if config.tokenizer.vocab_size < _LEAST_PIECES:
        raise ValueError(
            f"data.tokenizer.vocab_size={config.tokenizer.vocab_size} leaves no room for trained pieces besides the "
            f"bytes; set it to {_LEAST_PIECES} or more, or take a tokenizer of that size: data.tokenizer.path"
        )
    _require_no_leftovers(folder, config.tokenizer.kind)
    folder.mkdir(parents=True, exist_ok=True)
    taken_bytes = {source.name: 0 for source in config.sources if source.tokens is None}
    texts = _sample(config, taken_bytes)
    if config.tokenizer.kind == "sentencepiece":
        path, library = folder / MODEL_NAME, {"sentencepiece": sentencepiece.__version__}
        model = train_sentencepiece(config.tokenizer, texts)
    else:
        path, library = folder / JSON_NAME, {"tokenizers": tokenizers.__version__}
        model = train_byte_level(config.tokenizer, texts)
        write_json(folder / CONFIG_NAME, BYTE_LEVEL_CONFIG)
    # The model comes last: once it is there, so is the manifest that says how it was made.
    write_json(
        folder / MANIFEST_NAME,
        {
            "settings": config.tokenizer.model_dump(exclude={"path"}),
            "sha256": hashlib.sha256(model).hexdigest(),
            "text_bytes": taken_bytes,
            **library,
        },
    )
    write_atomically(path, model)
    taken = ", ".join(f"{name} {size:,}" for name, size in taken_bytes.items())
    return f"{path}: {config.tokenizer.vocab_size:,} tokens, trained on {sum(taken_bytes.values()):,} bytes ({taken})"


def _require_no_leftovers(folder: Path, kind: str) -> None:
    """Refuse files that belong to no tokenizer, but would change the one that is trained."""
    names = set(tokenizer_names(folder))
    if kind == "huggingface" and CONFIG_NAME in names and read_json(folder / CONFIG_NAME) == BYTE_LEVEL_CONFIG:
        names.remove(CONFIG_NAME)  # from a training that was killed
    if names:
        raise ValueError(
            f"{folder} has no tokenizer, but files of one ({', '.join(sorted(names))}) that would change the trained "
            "one; remove them"
        )


def _sample(config: DataConfig, taken_bytes: dict[str, int]) -> Iterator[bytes]:
    """Documents from all sources, each source's share by weight; ``taken_bytes`` is updated meanwhile."""
    sources = [source for source in config.sources if source.tokens is None]
    if not sources:
        raise ValueError(
            "no source holds text to train a tokenizer on; take the one that its tokens were made with: "
            "data.tokenizer.path"
        )
    total_weight = sum(source.weight for source in sources)
    for source in sources:
        budget_bytes = max(1, int(config.tokenizer.train_bytes * source.weight / total_weight))
        for text in _spread_documents(Source(source), budget_bytes):
            taken_bytes[source.name] += len(text)
            yield text
        if not taken_bytes[source.name]:
            raise ValueError(f"source '{source.name}' holds no text to train the tokenizer on; check its files")


def _spread_documents(source: Source, budget_bytes: int) -> Iterator[bytes]:
    """About ``budget_bytes`` of text, from the start of every file in equal parts, so that no file dominates.

    For a dataset on the Hub, which may have tens of thousands to open one by one, from at most ``_HUB_FILES`` of them.
    """
    sizes = source.sizes()
    step = 1 if source.files else -(-len(sizes) // _HUB_FILES)
    # Small files first: what they cannot give is shared among the larger ones.
    order = sorted(range(0, len(sizes), step), key=lambda n: (sizes[n], n))
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
    parser = command_parser(
        "python -m data.tokenizer",
        "Train a tokenizer (data.tokenizer.kind: sentencepiece or huggingface) on a sample "
        "(data.tokenizer.train_bytes, in bytes of text) of the sources, or take that of the folder "
        "data.tokenizer.path, and put it into data.dir. If it is there already, do nothing.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("config", help="YAML file; only its data block is read")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="for example data.tokenizer.vocab_size=8000 (tokens) data.tokenizer.train_bytes=20000000 (bytes)",
    )
    arguments = parse_arguments(parser)
    with user_errors():
        print(train_tokenizer(load_data(arguments.config, arguments.overrides)), flush=True)


if __name__ == "__main__":
    main()
