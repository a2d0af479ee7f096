"""Load a config: defaults < YAML file < ``key.sub=value`` on the command line.

Three rules. Unknown keys are errors that name the key and the nearest valid one. Every problem that pydantic finds
is reported in one message, each with its key and the value it got. What was loaded can be written back with
:func:`to_yaml` and loaded again as it is.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from settings.parse import Dumper, Loader
from settings.suggestions import did_you_mean

Schema = TypeVar("Schema", bound=BaseModel)


def load(path: str | Path, overrides: Sequence[str], schema: type[Schema], block: str | None = None) -> Schema:
    """Read ``path``, apply ``overrides`` and validate against ``schema``.

    Args:
        path: a YAML file whose top level is a mapping.
        overrides: ``key.sub=value`` strings; values are parsed as YAML. Later ones win.
        schema: the pydantic model to validate against.
        block: validate only this top-level block (``data.*`` commands read only ``data`` of a run's config).

    Raises:
        ValueError: with one sentence per problem: missing file, bad YAML, unknown key, bad value.
    """
    try:
        return _load(Path(path), overrides, schema, block)
    except RecursionError:  # in the parser, or in formatting the value
        raise ValueError(
            f"{path}, or an override, holds lists or mappings nested too deeply; correct or quote it"
        ) from None


def _load(path: Path, overrides: Sequence[str], schema: type[Schema], block: str | None) -> Schema:
    required = [name for name, field in schema.model_fields.items() if field.is_required()]
    raw = _read_yaml(path, [block] if block else required or schema.model_fields)
    if block is not None:
        _require_blocks(path, overrides, [block, *(str(name) for name in raw if name != block)])
    for override in overrides:
        _apply_override(raw, override)
    if block is not None:
        if block not in raw:
            raise ValueError(f"{path} has no '{block}:' block; this command reads only that block, so add one")
        raw = raw[block]
    prefix = f"{block}." if block else ""
    unknown = _unknown_keys(raw, schema, prefix, [f"{prefix}{path}" for path in key_paths(schema)])
    if unknown:
        raise ValueError(f"{path}: " + "; ".join(unknown))
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(_sentence(e, prefix) for e in error.errors())) from None


def peek(path: str | Path) -> dict[str, Any]:
    """The blocks of a YAML file, not validated; none if it is missing or not a mapping, which :func:`load` reports."""
    try:
        blocks = yaml.load(Path(path).read_bytes(), Loader=Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return blocks if isinstance(blocks, dict) else {}


def flatten(blocks: dict[str, Any]) -> dict[str, Any]:
    """The values of a config by ``block.field``; lists are kept."""
    found: dict[str, Any] = {}
    for name, value in blocks.items():
        inner = flatten(value).items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}.{key}".rstrip("."): held for key, held in inner}
    return found


def to_yaml(config: BaseModel) -> str:
    """The resolved config as YAML that :func:`load` accepts unchanged."""
    raw = config.model_dump(mode="json")
    return str(yaml.dump(raw, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))


def _read_yaml(path: Path, blocks: Iterable[str]) -> dict[str, Any]:
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        there = sorted(file.name for file in folder.glob("*.y*ml"))
        wrong = f"{path} is a folder, not a config file" if path.is_dir() else f"config file {path} does not exist"
        raise ValueError(wrong + (f"; files there: {', '.join(there)}" if there else ""))
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).replace(' in "<unicode string>",', " at").split())
        raise ValueError(f"{path} is not valid YAML: {said}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if raw is None:
        raise ValueError(f"{path} is empty; it must hold: {', '.join(blocks)}")
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold keys ({', '.join(blocks)}), got a {type(raw).__name__}")
    return raw


def _require_blocks(path: Path, overrides: Sequence[str], known: Sequence[str]) -> None:
    """Refuse an override of a block that the file does not have: a command reads only its own block, ``known[0]``."""
    for override in overrides:
        name = override.partition("=")[0].partition(".")[0]
        if name not in known and not name.startswith("-"):
            hint = did_you_mean(name, known)
            raise ValueError(
                f"override '{override}': {path} has no block '{name}', and only {known[0]} is read; {hint}"
            )


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ValueError(f"override '{override}' must look like key.sub=value, for example train.steps=100")
    try:
        value = _value(text)
    except yaml.YAMLError:
        raise ValueError(f"override '{override}': the value is not valid YAML; quote it") from None
    except ValueError as error:
        raise ValueError(f"override '{override}': {error}") from None
    *parents, last = key.split(".")
    here = raw
    for depth, name in enumerate(parents):
        if here.get(name) is None:
            here[name] = {}
        here = here[name]
        if not isinstance(here, dict):
            raise ValueError(
                f"override '{override}': '{'.'.join(parents[: depth + 1])}' is a value, not a block of keys"
            )
    here[last] = value


def _value(text: str) -> Any:
    """An override's value. There are no comments on a command line: ``runs/exp #3`` is a name with a # in it."""
    node = yaml.compose(text, Loader=Loader)
    if node is None:
        return text if text.strip() else None
    if not text[node.end_mark.index :].strip():
        return yaml.load(text, Loader=Loader)
    if isinstance(node, yaml.ScalarNode) and not node.style:
        return text
    raise ValueError("# begins a comment, so what follows it would be lost; leave it out, or quote the whole value")


def key_paths(schema: type[BaseModel]) -> list[str]:
    """Every key that an override can name, ``train`` and ``train.checkpoint`` as well as ``train.checkpoint.resume``.

    Keys inside lists and user-defined mappings are not included.
    """
    paths = []
    for name, field in schema.model_fields.items():
        paths.append(name)
        if typing.get_origin(field.annotation) not in (list, dict, Sequence):
            for nested in nested_schemas(field.annotation):
                paths += [f"{name}.{path}" for path in key_paths(nested)]
    return list(dict.fromkeys(paths))


def _unknown_keys(raw: Any, schema: type[BaseModel], prefix: str, paths: Sequence[str]) -> list[str]:
    """Every key below ``raw`` that the schema does not have, each as a sentence with the nearest valid one."""
    if not isinstance(raw, dict):
        return []
    problems = []
    for key, value in raw.items():
        field = schema.model_fields.get(str(key))
        if field is None:
            hint = did_you_mean(
                str(key), schema.model_fields, prefix=prefix, all_of_them="valid keys:", elsewhere=paths
            )
            problems.append(f"unknown key '{prefix}{key}'; {hint}")
            continue
        for nested in nested_schemas(field.annotation):
            for place, item in _items(value, field.annotation, f"{prefix}{key}"):
                problems += _unknown_keys(item, nested, f"{place}.", paths)
    return problems


def _items(value: Any, annotation: Any, place: str) -> list[tuple[str, Any]]:
    """The blocks in a field's raw value with their places: itself, a list's, or those of a user-defined mapping."""
    if isinstance(value, list):
        return [(f"{place}[{number}]", item) for number, item in enumerate(value)]
    if isinstance(value, dict) and typing.get_origin(annotation) is dict:
        return [(f"{place}.{name}", item) for name, item in value.items()]
    return [(place, value)]


def nested_schemas(annotation: Any) -> list[type[BaseModel]]:
    """The config blocks that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for part in typing.get_args(annotation) for schema in nested_schemas(part)]


def _sentence(error: Any, prefix: str) -> str:
    """One pydantic error as 'key: rule, got value'; our own cross-field sentences pass through as written."""
    key = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "value_error":
        sentence = str(error["ctx"]["error"])
        return f"{key.rstrip('.')}: {sentence}" if error["loc"] else sentence
    if error["type"] == "missing":
        return f"key '{key}' is required but missing"
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] in ("int_parsing", "int_type", "int_from_float"):
        message = "must be a whole number"
    elif error["type"] in ("float_parsing", "float_type"):
        message = "must be a number"
    is_word = isinstance(error["input"], bool) and error["type"] != "literal_error"
    quote = "; YAML reads yes, no, on and off as true and false: quote a word" if is_word else ""
    return f"{key}: {message}, got {error['input']!r}{quote}"
