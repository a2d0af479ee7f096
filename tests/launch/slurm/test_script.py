"""Scripts of runs, arrays, chains and preparation, as launch.slurm prints them; in SLURM's hands: test_cluster.py."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.slurm.__main__ import main
from tests.launch.slurm.dry_runs import DRY, printed_scripts

pytestmark = pytest.mark.usefixtures("home")


def test_a_script_says_once_what_it_needs(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny["train"]["global_batch_samples"] = 64
    site = tmp_path / "site.yaml"
    site.write_text(
        "gpus_per_node: 8\ncpus_per_task: 6\npartition: gpu\naccount: lm\nqos: high\nsave_before_s: 600\n"
        "sbatch: [--mem=0]\nsrun: [--cpu-bind=cores]\nmodules: [cuda/11]\ninterface: ib0\n"
        "environment: {NCCL_IB_HCA: 'mlx5 0'}\n"
    )
    options = [
        "--nodes",
        "4",
        "--time",
        "1-00:00:00",
        "--modules",
        "cuda/12.8,gcc",
        "--partition",
        "big",
        "--sbatch=--exclusive",
        "--venv",
        "/v",
    ]
    arguments = [write_config(tiny), "--site", str(site), *options, "train.steps=9", "--job-name", "mine", "--dry-run"]
    (script,) = printed_scripts(capsys, *arguments)
    run = tiny["train"]["run_dir"]
    wanted = {
        "job-name=mine", f"chdir={Path.cwd()}", f"output={run}/logs/slurm-%j.out", "open-mode=append", "nodes=4",
        "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=6", "time=1-00:00:00", "partition=big", "account=lm",
        "qos=high", "mem=0", "exclusive", "requeue", "signal=USR1@600",
    }  # fmt: skip
    assert {line[10:] for line in script.splitlines() if line.startswith("#SBATCH ")} == wanted
    body = script.split("\n\n", 1)[1]
    assert "module load cuda/12.8 gcc || exit 1" in body and "export NCCL_IB_HCA='mlx5 0'" in body
    assert "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0" in body and "DS_ACCELERATOR" not in body
    assert "--cpu-bind=cores /v/bin/python -P -m pretrain.train" in body and "    train.steps=9 \\" in body
    assert not Path(run).exists()


def test_spare_nodes_are_part_of_the_job_and_not_of_the_run(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("tasks_per_node: 2\nspare_nodes: 1\nwait_s: 200\n")
    config = write_config(tiny)
    (script,) = printed_scripts(
        capsys, config, "train.stall_timeout_s=199", "--nodes", "2", "--site", str(site), "--dry-run"
    )
    assert "#SBATCH --nodes=3\n" in script and "#SBATCH --no-kill\n" in script and "#SBATCH --requeue\n" in script
    assert '--nodes=2 --ntasks=4 --nodelist="$nodes"' in script and "--wait=200 " in script
    (without,) = printed_scripts(capsys, config, *DRY)
    assert "#SBATCH --nodes=2\n" in without and "--no-kill" not in without and "guard" not in without


def test_cpus_containers_and_the_users_own_site_file(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    (home / ".config/hopscotch").mkdir(parents=True)
    (home / ".config/hopscotch/slurm.yaml").write_text("tasks_per_node: 2\ncontainer: apptainer exec /i.sif\n")
    (script,) = printed_scripts(capsys, write_config(tiny), "--dry-run")
    assert "apptainer exec /i.sif python3 -P -m pretrain.train" in script and "DS_ACCELERATOR=cpu" in script
    assert "#SBATCH --ntasks-per-node=2\n" in script and "gpus" not in script and "--time" not in script


def test_an_array_of_chains(
    tiny: dict[str, Any], tuning: str, write_config: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [write_config(tiny), *DRY, "--array", "train.optimizer.lr=1e-3,3e-3", "--export", "runs/hf"]
    first, second, third = printed_scripts(capsys, *arguments, "--then", tuning, "train.steps=2")
    assert all("#SBATCH --array=0-1\n" in script for script in (first, second, third))
    assert "values=(1e-3 3e-3)\n" in first and '"train.optimizer.lr=${values[$SLURM_ARRAY_TASK_ID]}"' in first
    assert f"run={tiny['train']['run_dir']}-$SLURM_ARRAY_TASK_ID\n" in first and "/run-%a/logs/" in first
    assert f"base.path={tiny['train']['run_dir']}-$SLURM_ARRAY_TASK_ID \\" in second and "values" not in second
    assert "-m tune.train" in second and "    train.steps=2 \\" in second
    assert '-m convert.to_hf "$run" runs/hf-$SLURM_ARRAY_TASK_ID' in third and "run-" not in third

    slashes = [*arguments[:-1], "runs/hf/", f"train.run_dir={tiny['train']['run_dir']}/"]
    assert printed_scripts(capsys, *slashes)[1].count("runs/hf-$SLURM_ARRAY_TASK_ID") == 1
    assert f"run={tiny['train']['run_dir']}-$SLURM_ARRAY_TASK_ID\n" in printed_scripts(capsys, *slashes)[0]

    assert main([*arguments[:-2], "--print-config", "--then", tuning]) == 0
    configs = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [config["train"]["run_dir"][-2:] for config in configs] == ["-0", "-1", "-0", "-1"]
    assert [config["train"]["optimizer"]["lr"] for config in configs[:2]] == [0.001, 0.003]
    assert configs[3]["base"]["path"] == configs[1]["train"]["run_dir"]


def test_an_array_that_prepares_data(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, site, folder = write_config(tiny), tmp_path / "site.yaml", tiny["data"]["dir"]
    site.write_text("gpus_per_node: 8\nnodes: 2\npartition: gpu\n")
    options = ["--prepare", "--tasks", "3", "--cpus-per-task", "32", "--partition", "cpu", "--site", str(site)]
    (script,) = printed_scripts(capsys, config, "data.part_bytes=5000", *options, "--dry-run")
    wanted = {
        f"job-name={Path(folder).name}-prepare", f"chdir={Path.cwd()}", f"output={folder}/logs/slurm-%j.out",
        "open-mode=append", "nodes=1", "ntasks=1", "cpus-per-task=32", "array=0-2", "partition=cpu", "requeue",
    }  # fmt: skip
    assert {line[10:] for line in script.splitlines() if line.startswith("#SBATCH ")} == wanted
    assert "-P -m data.prepare " in script and "    data.part_bytes=5000 \\\n" in script
    assert '--workers "$SLURM_CPUS_PER_TASK" --part "$SLURM_ARRAY_TASK_ID/3"\n' in script and "gpu" not in script
    assert main([config, *options, "--print-config", "data.part_bytes=5000"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["part_bytes"] == 5000


def test_what_the_job_sets_itself_is_passed_once(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (script,) = printed_scripts(
        capsys, write_config(tiny), *DRY, f"train.run_dir={tmp_path / 'other'}", "train.steps=9"
    )
    assert script.count("train.run_dir=") == 1 and f"run={tmp_path / 'other'}\n" in script and "train.steps=9" in script


def test_a_rank_with_a_gpu_has_some_cores(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (gpu,) = printed_scripts(capsys, write_config(tiny), "--gpus-per-node", "2", "--dry-run")
    (cpu,) = printed_scripts(capsys, write_config(tiny), *DRY)
    assert "#SBATCH --cpus-per-task=4\n" in gpu and "#SBATCH --cpus-per-task=1\n" in cpu


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--job-name", "two words", '--job-name="two words"'),
        ("--job-name", "it's #1", '--job-name="it\'s #1"'),
        ("--account", "lm/2026", "--account=lm/2026"),
        ("--job-name", 'a"b', None),
        ("--partition", "a\\b", None),
        ("--qos", "a\nb", None),
        ("--sbatch", "--exclusive\nrm", None),
    ],
)
def test_options_are_quoted_or_refused(
    option: str,
    value: str,
    line: str | None,
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [write_config(tiny), "--tasks-per-node", "1", f"{option}={value}", "--dry-run"]
    if line is None:
        with pytest.raises(SystemExit):
            main(arguments)
        assert "leave out quotes and backslashes" in (err := capsys.readouterr().err) or "leave it out" in err
    else:
        (script,) = printed_scripts(capsys, *arguments)
        assert f"#SBATCH {line}\n" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
