"""Programs of the system without which some tests cannot run, and the line that would install them on Debian.

``python3 -m tests.programs`` prints the packages of those that are not here: ``.ci/run`` installs them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
"""Where to look: daemons are not on the path of everybody."""
SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
HOSTS = ("pdsh", "ssh", "ssh-keygen", "sshd")
_PACKAGES = {
    **dict.fromkeys(SLURM, "slurm-wlm"),
    "munged": "munge",
    "pdsh": "pdsh",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "faketime": "faketime",
    "git": "git",
}
_BY_HAND = {"chromium": "chromium"}
"""Left out of what ``.ci/run`` installs: it takes more time than all others together."""


def where(program: str) -> str | None:
    """Its path, or None if it is not installed."""
    return shutil.which(program, path=SEARCH)


def reason(programs: Iterable[str]) -> str | None:
    """Why a test that uses ``programs`` cannot run here, with the line that helps; None if it can."""
    lacking = [program for program in programs if where(program) is None]
    return f"needs {', '.join(lacking)}: apt-get install {' '.join(_packages(lacking))}" if lacking else None


def needs(*programs: str) -> pytest.MarkDecorator:
    """Mark of tests that are skipped, with that line, where one of ``programs`` is not installed."""
    import pytest  # not above: the system's Python prints the packages, before there is an environment

    told = reason(programs)
    return pytest.mark.skipif(told is not None, reason=str(told))


def _packages(programs: Iterable[str]) -> list[str]:
    """What installs them, each package once."""
    return sorted({(_PACKAGES | _BY_HAND)[program] for program in programs})


if __name__ == "__main__":
    print(*_packages(program for program in _PACKAGES if where(program) is None))
