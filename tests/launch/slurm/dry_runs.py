"""What ``launch.slurm --dry-run`` prints, checked."""

from __future__ import annotations

import re
import subprocess

import pytest

from launch.slurm.__main__ import main

CPUS = ["--nodes", "2", "--tasks-per-node", "1"]
DRY = [*CPUS, "--dry-run"]


def printed_scripts(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What a dry run prints, a script each, which bash can parse and which leaves no trace."""
    assert main(arguments) == 0
    scripts = re.split(r"(?<=\n)\n(?=#!/bin/bash\n)", capsys.readouterr().out)
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        _, body = script.split("\n\n", 1)
        assert (
            "#SBATCH" not in body and "{{" not in script and "{%" not in script
        )  # SLURM reads no options after a command
    return scripts
