"""A writable cache for the Hub's libraries, on machines with a read-only home (containers, batch users)."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path


def ensure_hub_cache() -> None:
    """Set a temporary ``HF_HOME`` if the usual one is not writable; before importing ``datasets``, ``huggingface_hub``.

    Raises:
        ValueError: ``HF_HOME`` is set, and cannot be written.
    """
    given = os.environ.get("HF_HOME")
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface")
    folder = Path(given or usual)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        reason = error.strerror
    if given:
        raise ValueError(
            f"HF_HOME={given}, the cache of the Hub's libraries, is not writable ({reason}); set it to a folder of "
            "yours"
        )
    made = tempfile.mkdtemp(prefix="hopscotch-hub-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    os.environ["HF_HOME"] = made
    print(
        f"note: {folder} is not writable ({reason}), so the Hub's libraries use {made} as their cache until this "
        "command ends; set HF_HOME to keep it",
        file=sys.stderr,
        flush=True,
    )
