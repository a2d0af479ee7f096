"""The page of all config fields: name, type, default and meaning, generated from the schemas.

python -m settings.reference trainer.config:PretrainConfig tune.config:TuneFile > docs/config.md
"""

from __future__ import annotations

import importlib
import json
import re
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from settings.arguments import command_parser
from settings.load import nested_schemas

_TOP = """# Config fields

Written by `make docs` from the schemas: do not edit. A field without a default must be given. How a config is read: \
[training.md](training.md#starting).
"""


def reference(schemas: Sequence[type[BaseModel]]) -> str:
    """A section for each schema and a table for each block below it, as Markdown; each block's table appears once."""
    parts, places = [_TOP], dict[type[BaseModel], str]()
    for schema in schemas:
        parts.append(f"## {_words(schema.__doc__).rstrip('.')}\n")
        parts += _tables(schema, "", places)
    return "\n".join(parts)


def _tables(schema: type[BaseModel], place: str, places: dict[type[BaseModel], str]) -> list[str]:
    """The table of the fields of ``schema`` that are not blocks, and those of its blocks; adds to ``places``."""
    parts = []
    own = [field for field in schema.model_fields.items() if not nested_schemas(field[1].annotation)]
    if own:
        parts.append(
            "| field | type | default | meaning |\n|---|---|---|---|\n" + "".join(_row(*field) for field in own)
        )
    for name, field in schema.model_fields.items():
        for block in nested_schemas(field.annotation):
            many = "[]" if typing.get_origin(field.annotation) in (list, Sequence) else ""
            inner = f"{place}.{name}{many}".lstrip(".")
            text = f"As `{places[block]}`." if block in places else _words(block.__doc__)
            parts.append(f"### `{inner}`\n\n{text}{_unless_given(field)}\n")
            if block not in places:
                places[block] = inner
                parts += _tables(block, inner, places)
    return parts


def _unless_given(field: FieldInfo) -> str:
    """What applies if a block is left out."""
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        different = default.model_dump(mode="json", exclude_defaults=True)
        return f" Left out: `{json.dumps(different)}`." if different else ""
    return "" if default else " May be left out."


def _row(name: str, field: FieldInfo) -> str:
    default = "" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
    return f"| `{name}` | {_type(field.annotation)} | {default} | {_words(field.description)} |\n"


def _type(annotation: Any) -> str:
    """``int``, ``text``, ``list of int``, or the possible values."""
    if annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{_plain(value)}`" for value in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"[{', '.join(map(_type, arguments))}]"
    if arguments:
        return " or ".join(map(_type, arguments))
    return "text" if annotation is str else getattr(annotation, "__name__", str(annotation))


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[1:-1] if isinstance(value, str) else json.dumps(value)


def _words(text: str | None) -> str:
    """A docstring as one line of Markdown."""
    plain = " ".join((text or "").split()).replace("``", "`").replace("|", "\\|")
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", plain)


def main() -> None:
    """Print the page."""
    parser = command_parser("settings.reference", __doc__.splitlines()[0])
    parser.add_argument("schemas", nargs="+", metavar="MODULE:CLASS", help="a section each")
    schemas = []
    for argument in parser.parse_args().schemas:
        module, _, name = argument.partition(":")
        schemas.append(getattr(importlib.import_module(module), name))
    print(reference(schemas), end="")


if __name__ == "__main__":
    main()
