"""Whether a run folder holds the run that a benchmark would make there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer.checkpoints.layout import CONFIG

_SHOWN = 3


def refuse_other(
    folder: Path, read: Callable[[Path], BaseModel], asked: BaseModel, left_out: Collection[str] = ()
) -> None:
    """Refuse a run folder that holds a run of another config than the one asked for.

    Args:
        folder: with a config.
        read: its config, of the same class as ``asked``.
        asked: what the run should be.
        left_out: dotted keys that do not decide what it is, or that a start fills in.

    Raises:
        ValueError: it does.
    """
    advice = "remove the folder, or choose another --out"
    try:
        found = _leaves(read(folder / CONFIG))
    except ValueError as error:
        raise ValueError(f"{folder} holds a run that this version cannot read ({error}); {advice}") from None
    wanted = _leaves(asked)
    if wanted["train.precision"] == "auto":  # the run's own machine decided
        wanted["train.precision"] = found["train.precision"]
    other = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    other = [key for key in other if not any(key == given or key.startswith(f"{given}.") for given in left_out)]
    if other:
        differences = ", ".join(f"{key} {found.get(key)} instead of {wanted.get(key)}" for key in other[:_SHOWN])
        more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        raise ValueError(f"{folder} holds a run with another config: {differences}{more}; {advice}")


def _leaves(config: BaseModel) -> dict[str, Any]:
    """Dotted keys and values of all that decides what a run is; not where it lies nor how it was started."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else name)
        else:
            found[key] = value

    walk(config.model_dump(mode="json", exclude={"train": {"run_dir": True, "checkpoint": {"resume"}}}), "")
    return found
