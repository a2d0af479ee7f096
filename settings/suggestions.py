"""Suggestions for error messages about unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_TOLD = 4


def did_you_mean(
    name: str,
    known: Iterable[str],
    *,
    prefix: str = "",
    all_of_them: str = "there are:",
    elsewhere: Iterable[str] = (),
) -> str:
    """``did you mean 'PREFIXNEAR'?`` with the nearest known name, or ``there are: A, B`` where none is near.

    Args:
        name: what was asked for.
        known: the valid names; shown as ``none`` if there are none.
        prefix: goes before the nearest name, like the path before a key.
        all_of_them: begins the list.
        elsewhere: whole paths such as ``train.checkpoint.resume``, named if ``name`` is (nearly) the last part of one.
    """
    names, by_last_part = list(known), dict[str, list[str]]()
    for path in elsewhere:
        by_last_part.setdefault(path.rpartition(".")[2], []).append(path)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    last_part = [name] if name in by_last_part else difflib.get_close_matches(name, by_last_part, n=1, cutoff=0.8)
    if last_part and (not near or last_part == [name]):
        paths = by_last_part[last_part[0]][:_MOST_TOLD]
        return f"did you mean {' or '.join(map(repr, paths))}?"
    return f"did you mean '{prefix}{near[0]}'?" if near else f"{all_of_them} {', '.join(names) or 'none'}"
