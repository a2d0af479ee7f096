"""What sbatch is given: nothing of what is around the submission, and a complete copy of the code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import submit
from launch.slurm.__main__ import main
from tests.launch.slurm.dry_runs import CPUS, DRY
from tests.launching import ROOT

pytestmark = pytest.mark.usefixtures("home")


def test_without_slurm_there_is_still_the_dry_run(
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config(tiny)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit):
        main([config, *CPUS])
    assert "there is no sbatch here" in capsys.readouterr().err and not Path(tiny["train"]["run_dir"]).exists()
    assert main([config, *DRY]) == 0


def test_what_is_around_the_submission_does_not_change_the_job(
    tiny: dict[str, Any], write_config: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shell inside another job, and variables that sbatch reads before the script's options."""
    programs = tmp_path / "bin"
    programs.mkdir()
    said = {"sbatch": f'env > {tmp_path}/env; printf "%s\\n" "$@" > {tmp_path}/words; echo 17', "squeue": "true"}
    for name, line in said.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    for name in ("SLURM_CPU_BIND", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK", "SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_QOS"):
        monkeypatch.setenv(name, "x")
    words = ["--time", "2:00:00", "--job-name", "two words", "--sbatch=--comment=a # the rest"]
    assert main([write_config(tiny), *CPUS, *words]) == 0
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM_", "SRUN_"))} == {"SLURM_CONF", "SLURM_CLUSTERS"}
    assert "SBATCH_QOS" in names
    given = (tmp_path / "words").read_text().splitlines()
    assert {"--time=2:00:00", "--job-name=two words", "--comment=a", "--requeue"} <= set(given) and "#" not in given
    assert given[-1].endswith("/job.sbatch") and "export SLURM_EXPORT_ENV=ALL\n" in Path(given[-1]).read_text()


def test_the_copied_code_is_complete_and_knows_its_commit(tmp_path: Path) -> None:
    submit.copy_code(tmp_path / "code")
    check = (
        "from importlib.util import find_spec\n"
        "import trainer.git_state as state\n"
        "print(*(find_spec(n).origin for n in ('pretrain.train', 'tune.train', 'convert.to_hf')), state.commit())"
    )
    command = [sys.executable, "-P", "-c", check]
    environment = {"PYTHONPATH": str(tmp_path / "code"), "PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *files, commit = done.stdout.split()
    assert files == [str(tmp_path / f"code/{name}.py") for name in ("pretrain/train", "tune/train", "convert/to_hf")]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert commit.removesuffix("-dirty") == (head.stdout.strip() or "None")
