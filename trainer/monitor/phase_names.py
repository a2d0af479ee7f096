"""Names of the ranges in a profile: written by ``profiler.py``, read by ``launch.profile`` without torch."""

from __future__ import annotations

FOLDER = "profile"
"""In a run folder."""
TRACE = ".pt.trace.json.gz"
"""After ``rank-N``: the suffix by which TensorBoard's plugin recognises a trace."""
PHASES = {"loading": "data", "training": "step", "saving": "save", "evaluating": "evaluate"}
"""Ranges by the heartbeat's phases: one after the other, they cover all of the time."""
PARTS = ("forward", "backward", "optimiser", "tracker")
"""Ranges within a step."""
