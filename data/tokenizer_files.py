"""The files of a tokenizer: what transformers' own loader reads, and nothing else of a folder.

tokenizer.model tokenizer.json   either is enough to turn text into token ids
tokenizer_config.json            and what older versions kept separately: special_tokens_map.json, added_tokens.json
chat_template.jinja              and additional_chat_templates/*.jinja (transformers 5), chat_template.json (processors)
generation_config.json           which token ends a text
vocab.json merges.txt ...        what tokenizer.json was made from; a tokenizer's class may ask for them
"""

from __future__ import annotations

import json
from pathlib import Path

from data.files import read_json, write_atomically
from data.sentencepiece_file import MODEL_NAME
from data.tokenization import EOS_PLACES, GENERATION_NAME, JSON_NAME, tokenizer_file

_PATTERNS = (
    MODEL_NAME,
    JSON_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer.[0-9]*.json",  # for one version of transformers each
    "tokenizer.model.v*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_NOT_OF_A_TOKENIZER = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOLD = 12


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in ``folder``, and those that say how to use it.

    Raises:
        ValueError: if there is no tokenizer.
    """
    tokenizer_file(folder)
    return [folder / name for name in tokenizer_names(folder)]


def tokenizer_names(folder: Path) -> list[str]:
    """The names of such files that are in ``folder``, which may hold no tokenizer, or not exist."""
    found = {path: None for pattern in _PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()}
    return [str(path.relative_to(folder)) for path in found]


def tokenizer_contents(folder: Path) -> dict[str, bytes]:
    """The files that a copy of the tokenizer in ``folder`` needs, by name, the one that decides the ids last.

    A model's ``config.json`` is not a tokenizer file. An end-of-document token that only it names is put into
    ``generation_config.json`` instead.

    Raises:
        ValueError: if there is no tokenizer.
    """
    deciding = tokenizer_file(folder)
    files = sorted(tokenizer_files(folder), key=lambda file: file == deciding)
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    *others, (model_config, field) = EOS_PLACES
    named = read_json(folder / model_config).get(field) if (folder / model_config).is_file() else None
    if named is None or any(_names(folder / name, other) for name, other in others):
        return contents
    generation = json.loads(contents.pop(GENERATION_NAME, b"{}")) | {"eos_token_id": named}
    return {GENERATION_NAME: json.dumps(generation, indent=1).encode(), **contents}


def _names(path: Path, field: str) -> bool:
    return path.is_file() and read_json(path).get(field) not in (None, [])


def copy_tokenizer(folder: Path, out: Path) -> list[str]:
    """Write the tokenizer's files in ``folder`` to the same places in ``out``; returns their names.

    Raises:
        ValueError: if there is no tokenizer.
    """
    contents = tokenizer_contents(folder)
    for name, content in contents.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out / name, content)
    return list(contents)


def left_behind(folder: Path) -> str:
    """The names of everything else in a Hugging Face ``folder`` except config and weights; empty if there is none."""
    known = {path for pattern in _NOT_OF_A_TOKENIZER for path in folder.glob(pattern)} | set(tokenizer_files(folder))
    names = []
    for path in sorted(folder.iterdir()):
        if path in known or path.name.startswith("."):
            continue
        if not path.is_dir():
            names.append(path.name)
        elif not any(file in known for file in path.iterdir()):
            names.append(f"{path.name}/")
        else:
            names += [f"{path.name}/{file.name}" for file in sorted(path.iterdir()) if file not in known]
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return f"{', '.join(names[:_TOLD])}{more}"
