"""Exit statuses of a run that say whether to start it again; docs/training.md has all of them.

Any other status but 0 is a failure of a machine, a library or our own, after which a start from the newest checkpoint
may well get further.
"""

from __future__ import annotations

EXIT_PREEMPTED = 75
"""Exit status of a run that was asked to stop, saved its state and wants to be started again (EX_TEMPFAIL)."""
EXIT_STALLED = 76
"""Exit status of a run that made no progress for ``train.stall_timeout_s``, or that lost one of its ranks.

Nothing since the newest checkpoint is saved; starting it again is right, unless it happens again and again.
"""
EXIT_MISTAKE = 78
"""Exit status of a rank that a user's mistake has ended (EX_CONFIG): so would every start, until it is corrected."""
