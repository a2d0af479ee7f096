"""What launch.slurm checks and writes; what SLURM makes of it is in test_slurm_cluster.py."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.slurm import submit
from launch.slurm.__main__ import main
from launch.slurm.config import SHIPPED_FILE, SlurmConfig, load_site, seconds
from launch.slurm.jobs import parse_array
from settings import load
from tests.launching import ROOT
from tests.trainer.checkpoints.test_resume import fake

CPUS = ["--nodes", "2", "--tasks-per-node", "1"]
DRY = [*CPUS, "--dry-run"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a site file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tuning(tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path) -> str:
    """Path of a stage-two config."""
    (tmp_path / "examples.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    source = {"name": "few", "files": [str(tmp_path / "examples.jsonl")]}
    train = {**tiny["train"], "run_dir": str(tmp_path / "tuned")}
    config = {"base": {"path": "nowhere"}, "data": {"sequence_tokens": 32, "sources": [source]}, "train": train}
    return write_config(config, "tune.yaml")


def _scripts(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
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
    (script,) = _scripts(capsys, *arguments)
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
    (script,) = _scripts(capsys, config, "train.stall_timeout_s=199", "--nodes", "2", "--site", str(site), "--dry-run")
    assert "#SBATCH --nodes=3\n" in script and "#SBATCH --no-kill\n" in script and "#SBATCH --requeue\n" in script
    assert '--nodes=2 --ntasks=4 --nodelist="$nodes"' in script and "--wait=200 " in script
    (without,) = _scripts(capsys, config, *DRY)
    assert "#SBATCH --nodes=2\n" in without and "--no-kill" not in without and "guard" not in without


def test_cpus_containers_and_the_users_own_site_file(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    (home / ".config/hopscotch").mkdir(parents=True)
    (home / ".config/hopscotch/slurm.yaml").write_text("tasks_per_node: 2\ncontainer: apptainer exec /i.sif\n")
    (script,) = _scripts(capsys, write_config(tiny), "--dry-run")
    assert "apptainer exec /i.sif python3 -P -m pretrain.train" in script and "DS_ACCELERATOR=cpu" in script
    assert "#SBATCH --ntasks-per-node=2\n" in script and "gpus" not in script and "--time" not in script


def test_an_array_of_chains(
    tiny: dict[str, Any], tuning: str, write_config: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [write_config(tiny), *DRY, "--array", "train.optimizer.lr=1e-3,3e-3", "--export", "runs/hf"]
    first, second, third = _scripts(capsys, *arguments, "--then", tuning, "train.steps=2")
    assert all("#SBATCH --array=0-1\n" in script for script in (first, second, third))
    assert "values=(1e-3 3e-3)\n" in first and '"train.optimizer.lr=${values[$SLURM_ARRAY_TASK_ID]}"' in first
    assert f"run={tiny['train']['run_dir']}-$SLURM_ARRAY_TASK_ID\n" in first and "/run-%a/logs/" in first
    assert f"base.path={tiny['train']['run_dir']}-$SLURM_ARRAY_TASK_ID \\" in second and "values" not in second
    assert "-m tune.train" in second and "    train.steps=2 \\" in second
    assert '-m convert.to_hf "$run" runs/hf-$SLURM_ARRAY_TASK_ID' in third and "run-" not in third

    slashes = [*arguments[:-1], "runs/hf/", f"train.run_dir={tiny['train']['run_dir']}/"]
    assert _scripts(capsys, *slashes)[1].count("runs/hf-$SLURM_ARRAY_TASK_ID") == 1
    assert f"run={tiny['train']['run_dir']}-$SLURM_ARRAY_TASK_ID\n" in _scripts(capsys, *slashes)[0]

    assert main([*arguments[:-2], "--print-config", "--then", tuning]) == 0
    configs = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [config["train"]["run_dir"][-2:] for config in configs] == ["-0", "-1", "-0", "-1"]
    assert [config["train"]["optimizer"]["lr"] for config in configs[:2]] == [0.001, 0.003]
    assert configs[3]["base"]["path"] == configs[1]["train"]["run_dir"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.stepz=3", *DRY], "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        (
            ["--dry-run"],
            "how many ranks a node has is not said; give --gpus-per-node N, or --tasks-per-node N for CPUs",
        ),
        (["--tasks-per-node", "3", "--dry-run"], "micro_batch_samples x ranks (2 x 3 = 6)"),
        (["--gpus-per-node", "2", *DRY], "tasks_per_node (1) must be gpus_per_node (2)"),
        (["--nodes", "0", "--tasks-per-node", "1"], "nodes: input should be greater than or equal to 1, got 0"),
        (["--time", "24h", *DRY], 'time must look like "24:00:00", "2-12:00:00" or "90" (minutes), got \'24h\''),
        (["--time", "6", *DRY], "time (6, 360 s) must be more than save_before_s (300 s) and the 60 s"),
        (["--container", "c", "--venv", "v", *DRY], "venv (v) and container (c) exclude each other"),
        (["--site", "no-such.yaml", *DRY], "config file no-such.yaml does not exist"),
        (["data.dir=nowhere", *DRY], "nowhere"),
        (
            ["train.stall_timeout_s=960", *DRY],
            "train.stall_timeout_s (960) must be below wait_s (960) of the site file, after which srun kills ranks",
        ),
        (["--site", "{waiting}", *DRY], "srun --wait=60 is what wait_s says; set wait_s in the site file, and leave"),
        (["--spare-nodes", "-1", *DRY], "spare_nodes: input should be greater than or equal to 0, got -1"),
        (["--prepare", "--tasks", "2", "--spare-nodes", "1", "--dry-run"], "--spare-nodes is of a run, and --prepare"),
        (["train.run_dir=my run", *DRY], "train.run_dir 'my run' stands in SLURM's options"),
        (["train.schedule.warmup_steps=99", *DRY], "train.schedule.warmup_steps (99) must not exceed train.steps (4)"),
        (["train.evaluation.tasks=[no.jsonl]", *DRY], "no.jsonl"),
        (["data.validation=[{{name: absent, files: [x]}}]", *DRY], "validation/absent/manifest.json does not exist"),
        (["init.path=nowhere", *DRY], "there is no folder nowhere; give init.path a stage-one run"),
        (["train.log.trackers=[mlflow]", *DRY], "train.log.trackers has mlflow, whose server must be named"),
        (["train.checkpoint.mirror=s33://a/b", *DRY], "train.checkpoint.mirror s33://a/b: the protocol 's33' is not"),
        (["train.checkpoint.resume=required", *CPUS], "cannot resume from {run}/checkpoints: there is no checkpoint"),
        (["--then", "{tuning}", "train.run_dir={run}/tuned", *DRY], "are the same, or one lies in the other"),
        (["--then", "{tuning}", "data.test=[{{name: x, files: [no.jsonl]}}]", *DRY], "source 'x': no file matches"),
        (["train.run_dir={run}:1", *DRY], "train.run_dir {run}:1 holds ':', at which PYTHONPATH is cut"),
        (["--prepare", "--tasks", "1", "data.dir=a:b", "--dry-run"], "a:b holds ':', at which PYTHONPATH is cut"),
        (["--array", "train.seed", *DRY], "--array 'train.seed' must be a field and two or more different values"),
        (["--array", "train.seed=1,1", *DRY], "two or more different values"),
        (["--array", "train.sed=1,2", *DRY], "unknown key 'train.sed'; did you mean 'train.seed'?"),
        (["--then", "{config}", *DRY], "is no config of stage two, it has no base block"),
        (["--then", "{tuning}", "base.path=x", *DRY], "leave base.path=x out"),
        (
            ["--then", "{tuning}", "--then", "{tuning}", "train.run_dir={run}", *DRY],
            "two runs of the chain have the folder",
        ),
        (["--export", "{full}", *DRY], "exists already and is no empty folder, and nothing is written over"),
        (["--tasks", "2", *DRY], "--tasks 2 shares out a preparation; give --prepare, or leave it out"),
        (["--prepare", "--dry-run"], "--prepare needs --tasks N, the number of jobs that share the preparation"),
        (["--prepare", "--tasks", "2", *DRY], "--nodes, --tasks-per-node is of a run, and --prepare submits none"),
        (["--prepare", "--tasks", "0", "--dry-run"], "--tasks 0 must be from 1 to the number of parts, 2,"),
        (["--prepare", "--tasks", "3", "--dry-run"], "lower data.part_bytes (500,000,000) for more parts"),
        (["--prepare", "--tasks", "1", "data.dir=nowhere", "--dry-run"], "nowhere has no tokenizer"),
        (
            ["--prepare", "--tasks", "1", "data.dir=my data", "--dry-run"],
            "data.dir 'my data' stands in SLURM's options",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    tiny: dict[str, Any],
    tuning: str,
    write_config: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, run = write_config(tiny), tiny["train"]["run_dir"]
    (waiting := Path(config).with_name("site.yaml")).write_text("srun: [--wait=60]\n")
    places = {"config": config, "tuning": tuning, "waiting": waiting, "run": run, "full": str(Path(config).parent)}
    with pytest.raises(SystemExit) as end:
        main([config, *(argument.format(**places) for argument in arguments)])
    printed = capsys.readouterr()
    assert end.value.code == 1 and not printed.out and not Path(run).exists()
    assert (
        printed.err.startswith("error: ") and sentence.format(**places) in printed.err and printed.err.count("\n") == 1
    )


def test_an_array_that_prepares_data(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, site, folder = write_config(tiny), tmp_path / "site.yaml", tiny["data"]["dir"]
    site.write_text("gpus_per_node: 8\nnodes: 2\npartition: gpu\n")
    options = ["--prepare", "--tasks", "3", "--cpus-per-task", "32", "--partition", "cpu", "--site", str(site)]
    (script,) = _scripts(capsys, config, "data.part_bytes=5000", *options, "--dry-run")
    wanted = {
        f"job-name={Path(folder).name}-prepare", f"chdir={Path.cwd()}", f"output={folder}/logs/slurm-%j.out",
        "open-mode=append", "nodes=1", "ntasks=1", "cpus-per-task=32", "array=0-2", "partition=cpu", "requeue",
    }  # fmt: skip
    assert {line[10:] for line in script.splitlines() if line.startswith("#SBATCH ")} == wanted
    assert "-P -m data.prepare " in script and "    data.part_bytes=5000 \\\n" in script
    assert '--workers "$SLURM_CPUS_PER_TASK" --part "$SLURM_ARRAY_TASK_ID/3"\n' in script and "gpu" not in script
    assert main([config, *options, "--print-config", "data.part_bytes=5000"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["part_bytes"] == 5000


def test_a_run_after_a_job_may_have_its_data_prepared_by_it(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (script,) = _scripts(capsys, write_config(tiny), *DRY, "data.dir=nowhere", "--after", "17")
    assert "    data.dir=nowhere \\\n" in script


def test_stage_two_needs_its_base_unless_a_job_before_makes_it(
    tuning: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for base, sentence in (("nowhere", "there is no folder nowhere; give base.path"), (tmp_path, "is a stage-two run")):
        (tmp_path / "config.yaml").write_text("base: {path: x}\n")
        with pytest.raises(SystemExit):
            main([tuning, f"base.path={base}", f"train.run_dir={tmp_path}-tuned", *DRY])
        assert sentence in capsys.readouterr().err
    (script,) = _scripts(capsys, tuning, *DRY, "--after", "17", "data.sources=[{name: x, files: [later.jsonl]}]")
    assert "-m tune.train" in script


def test_what_only_the_nodes_have_is_not_looked_for_here(
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    site = tmp_path / "site.yaml"
    for line in ("environment: {MLFLOW_TRACKING_URI: 'http://there'}", "container: c", "srun: [--container-image=c]"):
        site.write_text(f"{line}\n")
        arguments = [write_config(tiny), *DRY, "train.log.trackers=[mlflow]"]
        assert _scripts(capsys, *arguments, "--site", str(site))
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    assert _scripts(capsys, *arguments)


def test_an_earlier_run_is_not_gone_on_with_unasked(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(tiny["train"]["run_dir"]) / "checkpoints/step-00000004").mkdir(parents=True)
    sentence = "already holds step-00000004; set train.checkpoint.resume=auto"
    with pytest.raises(SystemExit):
        main([write_config(tiny), *CPUS])
    assert sentence in capsys.readouterr().err
    assert main([write_config(tiny), *DRY]) == 0  # nothing is submitted: the script, and what would be wrong with it
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash")
    assert printed.err.startswith(f"note: this would not be submitted: {tiny['train']['run_dir']}")
    (script,) = _scripts(capsys, write_config(tiny), *DRY, "train.checkpoint.resume=required")
    assert 'train.run_dir="$run" train.checkpoint.resume=required \\\n' in script
    assert script.count("train.checkpoint.resume=") == 1


def test_another_run_s_mirror_is_not_gone_on_with_unasked(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The job itself says resume=auto, as every later start goes on from there."""
    fake(tmp_path / "away", 3)
    arguments = [write_config(tiny), *DRY, f"train.checkpoint.mirror=file://{tmp_path}/away"]
    assert main(arguments) == 0
    assert f"file://{tmp_path}/away already holds step-00000003; set train.checkpoint" in capsys.readouterr().err
    assert main([*arguments, "train.checkpoint.resume=auto"]) == 0 and not capsys.readouterr().err


def test_what_the_job_sets_itself_is_passed_once(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (script,) = _scripts(capsys, write_config(tiny), *DRY, f"train.run_dir={tmp_path / 'other'}", "train.steps=9")
    assert script.count("train.run_dir=") == 1 and f"run={tmp_path / 'other'}\n" in script and "train.steps=9" in script


def test_a_rank_with_a_gpu_has_some_cores(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (gpu,) = _scripts(capsys, write_config(tiny), "--gpus-per-node", "2", "--dry-run")
    (cpu,) = _scripts(capsys, write_config(tiny), *DRY)
    assert "#SBATCH --cpus-per-task=4\n" in gpu and "#SBATCH --cpus-per-task=1\n" in cpu


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


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86_400), ("1-12:30", 131_400), ("1-12:30:15", 131_415),
        ("24h", None), ("1:2:3:4", None), ("", None), ("-1", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(time: str, expected: int | None) -> None:
    assert seconds(time) == expected


def test_an_unquoted_time_is_not_taken_for_minutes(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("tasks_per_node: 1\ntime: 24:00:00\n")  # a number to the base of sixty in YAML 1.1
    assert load_site(site, {}).time == "24:00:00"
    site.write_text("tasks_per_node: 1\ntime: 90\n")
    with pytest.raises(ValueError, match="time: must be in quotes"):
        load_site(site, {})


def test_every_field_is_described_shown_and_used(tmp_path: Path) -> None:
    text = SHIPPED_FILE.read_text()
    sources = "".join(path.read_text() for path in SHIPPED_FILE.parent.iterdir() if path.suffix in (".py", ".sbatch"))
    for name, field in SlurmConfig.model_fields.items():
        assert field.description and field.description.rstrip().endswith("."), name
        assert re.search(rf"^(# )?{name}:", text, re.MULTILINE), name
        assert re.search(rf"\b(site|self)\.{name}\b", sources), name
    for line in re.findall(r"^# (\w+:.*)", text, re.MULTILINE):  # each example is valid
        site = tmp_path / "site.yaml"
        needed = "" if "per_node" in line else "tasks_per_node: 1\n"
        site.write_text(needed + line)
        assert load(site, [], SlurmConfig)


@pytest.mark.parametrize("key", ["train.run_dir", "train.checkpoint.resume", "base.path"])
def test_an_array_over_what_every_job_sets_itself_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"--array {key} would be overridden"):
        parse_array(f"{key}=a,b")


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
        (script,) = _scripts(capsys, *arguments)
        assert f"#SBATCH {line}\n" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
