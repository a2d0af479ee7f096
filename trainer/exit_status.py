"""Exit statuses that ask to be started again. docs/training.md has all of them, settings/user_errors.py the others."""

from __future__ import annotations

EXIT_PREEMPTED = 75
"""Exit status of a run that was asked to stop, saved its state and wants to be started again (EX_TEMPFAIL)."""
EXIT_STALLED = 76
"""Exit status of a run that made no progress for ``train.stall_timeout_s``, or that lost one of its ranks.

Nothing since the newest checkpoint is saved; starting it again is right, unless it happens again and again.
"""
