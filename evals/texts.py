"""Text files named on a command line: checked before anything runs, read like training data."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.discovery import FORMATS, find_files, format_of
from data.sources import Cursor, Source
from trainer.config import PretrainConfig, WeightsConfig
from tune.config import TuneConfig


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """``--format`` and ``--text-field``, the same for every command that takes files of text."""
    parser.add_argument(
        "--format", choices=sorted(set(FORMATS.values())), help="format of the files (default: inferred from the name)"
    )
    parser.add_argument(
        "--text-field", metavar="NAME", help="field or column with the text (default: that of the run's own data)"
    )


def text_field_of(config: PretrainConfig | TuneConfig | WeightsConfig) -> str:
    """The ``text_field`` that all sources of a run share; ``text`` otherwise."""
    if isinstance(config, WeightsConfig):
        return "text"
    fields = {source.text_field for source in (*config.data.sources, *config.data.validation)}
    return fields.pop() if len(fields) == 1 else "text"


def text_files(names: Sequence[str], kind: str | None = None) -> list[Path]:
    """The files of these names and patterns; each has the format ``kind``, or one inferred from its name.

    Raises:
        ValueError: if there are none, or one has no known format.
    """
    files = find_files(list(names), as_given=True)
    for file in files:
        _format(file, kind)
    return files


def texts_of(path: str | Path, kind: str | None = None, text_field: str = "text") -> Iterator[str]:
    """The texts of one file.

    Args:
        path: of the file.
        kind: its format; inferred from its name unless given.
        text_field: field of JSON lines, column of Parquet and CSV.

    Raises:
        ValueError: if it is missing, its format is not known, or it cannot be read, which includes invalid Unicode: a
            score with replaced characters would be that of another text.
    """
    (file,) = find_files([str(path)])
    config = SourceConfig.model_construct(name="FILES", format=_format(file, kind), text_field=text_field)
    source = Source(config, files=[file])
    try:
        for number, document in enumerate(source.documents(Cursor(0, 0)), start=1):
            document.require_unicode(number)
            yield document.text.decode()
    except ValueError as error:
        # The source's own message is about a config; only its cause applies here.
        raise ValueError(f"{file} cannot be read: {error.__cause__ or error}") from error


def _format(file: Path, kind: str | None) -> Any:
    found = kind or format_of(file)
    if found is None:
        raise ValueError(
            f"the format of {file} cannot be inferred from its name (known endings: {' '.join(FORMATS)}); give it with "
            f"--format text (or {', '.join(sorted(set(FORMATS.values()) - {'text'}))})"
        )
    return found
