"""A chain of jobs is in the queue as a whole or not at all, whatever ends its submission."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.__main__ import main

CHAIN = ["--nodes", "2", "--tasks-per-node", "1", "--export"]
INTERRUPTED = "if [ $job = 2 ]; then kill -INT $PPID; sleep 0.2; fi"  # as Ctrl-C while it waits for the controller
REFUSED = "if [ $job = 2 ]; then echo 'sbatch: error: Invalid qos' >&2; exit 1; fi"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put SLURM's commands into the path: a job is a file in the folder that is returned, named by its id, 1, 2, ..."""

    def fake(in_sbatch: str, scancel: str = "rm") -> Path:
        programs, jobs = tmp_path / "bin", tmp_path / "queue"
        monkeypatch.setenv("HOME", str(tmp_path))  # which has no site file
        programs.mkdir()
        jobs.mkdir()
        count = f"echo >> {tmp_path}/asked; job=$(wc -l < {tmp_path}/asked)"
        lines = {
            "sbatch": f"{count}; {in_sbatch}\ntouch {jobs}/$job; echo $job",
            "scancel": f"cd {jobs} && {scancel} $*",
            "squeue": f"job=${{2#--jobs=}}; test -f {jobs}/$job && echo $job",
        }
        for name, line in lines.items():
            (programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        return jobs

    return fake


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("in_sbatch", "ended"), [(INTERRUPTED, 130), (REFUSED, 1)])
def test_half_a_chain_is_taken_back(
    in_sbatch: str, ended: int, queue: Callable[..., Path], tiny: dict[str, Any], write_config: Callable[..., str]
) -> None:
    jobs, run = queue(in_sbatch), Path(tiny["train"]["run_dir"])
    with pytest.raises(SystemExit) as end:
        main([write_config(tiny), *CHAIN, f"{run}-export"])
    assert end.value.code == ended
    assert _names(jobs) == [] and _names(run / "submit") == []
    assert main([write_config(tiny), *CHAIN, f"{run}-export"]) == 0  # the third and fourth
    assert _names(jobs) == ["3", "4"]
    assert [path.read_text() for path in run.glob("submit/*/jobs")] == ["3\n4\n"]


def test_a_job_that_cannot_be_taken_back_is_told_and_refuses_the_next_submission(
    queue: Callable[..., Path], tiny: dict[str, Any], write_config: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    jobs, run = queue(REFUSED, scancel="false"), Path(tiny["train"]["run_dir"])
    with pytest.raises(SystemExit):
        main([write_config(tiny), *CHAIN, f"{run}-export"])
    said = capsys.readouterr().err
    assert "note: 1 may still be in the queue; take them out: scancel 1\n" in said and "Invalid qos" in said
    assert _names(jobs) == ["1"]
    with pytest.raises(SystemExit):
        main([write_config(tiny), *CHAIN, f"{run}-export"])
    assert f"job 1 of {run} is in the queue or running" in capsys.readouterr().err
    assert _names(jobs) == ["1"]
