"""The base of every config block."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen config block that refuses unknown keys and takes each field's description from its docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
