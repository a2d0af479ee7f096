"""The hostfile of the ``deepspeed`` launcher: its syntax, and whether every host answers.

worker-1 slots=8
worker-2 slots=8
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.doctor.findings import Finding

_LINE = re.compile(r"^(?P<host>\S+)\s+slots=(?P<slots>\d+)\s*$")
TIMEOUT_S = 5.0


def hostfile(path: Path) -> Iterator[Finding]:
    """Check the syntax; only if that is right, check the hosts.

    Raises:
        ValueError: naming the first line that is wrong.
    """
    slots = read_hostfile(path)
    yield Finding("hostfile", "ok", f"{path}: {len(slots)} hosts, {sum(slots.values())} slots")
    if len(set(slots.values())) > 1:
        listed = ", ".join(f"{host} {count}" for host, count in slots.items())
        yield Finding("hostfile", "warning", f"hosts differ in slots ({listed})", "nodes of one run should be alike")
    with ThreadPoolExecutor(max_workers=32) as pool:
        problems = list(pool.map(unreachable, slots))
    for host, problem in zip(slots, problems, strict=True):
        if problem is not None:
            remedy = f"ssh {host} true must work without a password: ssh-copy-id {host}, or check name and network"
            yield Finding("hosts", "error", f"{host}: {problem}", remedy)
    if not any(problems):
        yield Finding("hosts", "ok", "every host answers ssh without a password")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host.

    Raises:
        ValueError: for a line that is not ``host slots=N``, a host given twice, no slots, or no host at all.
    """
    if not path.is_file():
        raise ValueError(f"hostfile {path} does not exist; write one line 'host slots=GPUS' for every node")
    slots: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.match(line)
        if match is None or int(match["slots"]) == 0:
            raise ValueError(
                f"{path}, line {number}: {line!r} is not 'host slots=N'; write for example 'worker-1 slots=8'"
            )
        if match["host"] in slots:
            raise ValueError(f"{path}, line {number}: {match['host']} is listed twice; give all its slots in one line")
        slots[match["host"]] = int(match["slots"])
    if not slots:
        raise ValueError(f"{path} names no host; write one line 'host slots=GPUS' for every node")
    return slots


def unreachable(host: str) -> str | None:
    """Why the launcher could not start ranks on ``host``; None if it could."""
    if shutil.which("ssh") is None:
        return "there is no ssh command here"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={TIMEOUT_S:.0f}"]  # port, user, proxy: ~/.ssh/config
    try:
        done = subprocess.run(
            ["ssh", *options, host, "true"],
            check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=3 * TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"ssh did not end within {3 * TIMEOUT_S:g} s"
    output = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else f"ssh: {output[-1] if output else f'exit status {done.returncode}'}"
