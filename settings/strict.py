"""The base of every config block."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Strict(BaseModel):
    """A frozen config block that refuses unknown keys and takes each field's description from its docstring.

    A YAML boolean (``yes``, ``on``) is refused where a number is expected.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items):
            kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(
                    f"must be a number, got {value!r} (YAML reads true, yes and on as True, and false, no and off as "
                    "False)"
                )
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that a field's values and their items may have."""
    if typing.get_origin(annotation) is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    parts = typing.get_args(annotation)
    return {kind for part in parts for kind in _kinds(part)} if parts else {annotation}
