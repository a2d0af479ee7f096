"""Exit statuses of a run that say whether to start it again; docs/training.md has all of them.

Any other nonzero status is a failure of a machine, a library or this code, after which a restart from the newest
checkpoint may get further.
"""

from __future__ import annotations

EXIT_PREEMPTED = 75
"""Exit status of a run that was asked to stop, saved its state and should be started again (EX_TEMPFAIL)."""
EXIT_STALLED = 76
"""Exit status of a run that made no progress for ``train.stall_timeout_s``, or that lost one of its ranks.

Steps since the newest checkpoint are lost; starting it again is right, unless this happens repeatedly.
"""
EXIT_MISTAKE = 78
"""Exit status of a rank that ended on a user's mistake (EX_CONFIG), as every start would until it is corrected."""
