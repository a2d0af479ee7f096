"""The end of a sentence about a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "", all_of_them: str = "there are:") -> str:
    """``did you mean 'PREFIXNEAR'?`` with the nearest known name, or ``there are: A, B`` where none is near.

    Args:
        name: what was asked for.
        known: what there is; an empty one is told as ``none``.
        prefix: goes before the near name, as the path before a key.
        all_of_them: begins the list.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{prefix}{near[0]}'?" if near else f"{all_of_them} {', '.join(names) or 'none'}"
