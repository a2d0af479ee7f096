"""What is looked at before anything is submitted: a mistake is one sentence, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.__main__ import main
from launch.slurm.jobs import parse_array
from tests.launch.slurm.dry_runs import CPUS, DRY, printed_scripts
from tests.trainer.checkpoints.test_resume import fake

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.stepz=3", *DRY], "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        (
            ["--dry-run"],
            "the number of ranks per node is not set; give --gpus-per-node N, or --tasks-per-node N for CPUs",
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
            "train.stall_timeout_s (960) must be below wait_s (960) of the site file, after which srun kills hanging",
        ),
        (
            ["--site", "{waiting}", *DRY],
            "srun --wait=60 duplicates wait_s; set wait_s in the site file instead, and leave",
        ),
        (["--spare-nodes", "-1", *DRY], "spare_nodes: input should be greater than or equal to 0, got -1"),
        (
            ["--prepare", "--tasks", "2", "--spare-nodes", "1", "--dry-run"],
            "--spare-nodes applies to a run, but --prepare",
        ),
        (["train.run_dir=my run", *DRY], "train.run_dir 'my run' is used in SLURM's options"),
        (["train.schedule.warmup_steps=99", *DRY], "train.schedule.warmup_steps (99) must not exceed train.steps (4)"),
        (["train.evaluation.tasks=[no.jsonl]", *DRY], "no.jsonl"),
        (["data.validation=[{{name: absent, files: [x]}}]", *DRY], "validation/absent/manifest.json does not exist"),
        (["init.path=nowhere", *DRY], "there is no folder nowhere; give init.path a stage-one run"),
        (["train.log.trackers=[mlflow]", *DRY], "train.log.trackers has mlflow, but its server is not set"),
        (["train.checkpoint.mirror=s33://a/b", *DRY], "train.checkpoint.mirror s33://a/b: the protocol 's33' is not"),
        (["train.checkpoint.resume=required", *CPUS], "cannot resume from {run}/checkpoints: there is no checkpoint"),
        (["--then", "{tuning}", "train.run_dir={run}/tuned", *DRY], "are the same, or one contains the other"),
        (["--then", "{tuning}", "data.test=[{{name: x, files: [no.jsonl]}}]", *DRY], "source 'x': no file matches"),
        (
            ["train.run_dir={run}:1", *DRY],
            "train.run_dir {run}:1 contains ':', the separator of PYTHONPATH",
        ),
        (
            ["--prepare", "--tasks", "1", "data.dir=a:b", "--dry-run"],
            "a:b contains ':', the separator of PYTHONPATH",
        ),
        (["--array", "train.seed", *DRY], "--array 'train.seed' must be a field and two or more different values"),
        (["--array", "train.seed=1,1", *DRY], "two or more different values"),
        (["--array", "train.sed=1,2", *DRY], "unknown key 'train.sed'; did you mean 'train.seed'?"),
        (["--then", "{config}", *DRY], "is not a config of stage two: it has no base block"),
        (["--then", "{tuning}", "base.path=x", *DRY], "leave base.path=x out"),
        (
            ["--then", "{tuning}", "--then", "{tuning}", "train.run_dir={run}", *DRY],
            "two runs of the chain use the folder",
        ),
        (["--export", "{full}", *DRY], "already exists and is not an empty folder; nothing is overwritten"),
        (["--tasks", "2", *DRY], "--tasks 2 divides a preparation; give --prepare, or leave it out"),
        (["--prepare", "--dry-run"], "--prepare needs --tasks N, the number of jobs that share the preparation"),
        (["--prepare", "--tasks", "2", *DRY], "--nodes, --tasks-per-node applies to a run, but --prepare submits none"),
        (["--prepare", "--tasks", "0", "--dry-run"], "--tasks 0 must be from 1 to the number of parts, 2,"),
        (["--prepare", "--tasks", "3", "--dry-run"], "lower data.part_bytes (500,000,000) for more parts"),
        (["--prepare", "--tasks", "1", "data.dir=nowhere", "--dry-run"], "nowhere has no tokenizer"),
        (
            ["--prepare", "--tasks", "1", "data.dir=my data", "--dry-run"],
            "data.dir 'my data' is used in SLURM's options",
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


def test_a_run_after_a_job_may_have_its_data_prepared_by_it(
    tiny: dict[str, Any], write_config: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (script,) = printed_scripts(capsys, write_config(tiny), *DRY, "data.dir=nowhere", "--after", "17")
    assert "    data.dir=nowhere \\\n" in script


def test_stage_two_needs_its_base_unless_a_job_before_makes_it(
    tuning: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for base, sentence in (("nowhere", "there is no folder nowhere; give base.path"), (tmp_path, "is a stage-two run")):
        (tmp_path / "config.yaml").write_text("base: {path: x}\n")
        with pytest.raises(SystemExit):
            main([tuning, f"base.path={base}", f"train.run_dir={tmp_path}-tuned", *DRY])
        assert sentence in capsys.readouterr().err
    (script,) = printed_scripts(capsys, tuning, *DRY, "--after", "17", "data.sources=[{name: x, files: [later.jsonl]}]")
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
        assert printed_scripts(capsys, *arguments, "--site", str(site))
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    assert printed_scripts(capsys, *arguments)


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
    (script,) = printed_scripts(capsys, write_config(tiny), *DRY, "train.checkpoint.resume=required")
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


@pytest.mark.parametrize("key", ["train.run_dir", "train.checkpoint.resume", "base.path"])
def test_an_array_over_what_every_job_sets_itself_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"--array {key} would be overridden"):
        parse_array(f"{key}=a,b")
