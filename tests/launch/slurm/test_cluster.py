"""Runs on a real cluster: cut short, robbed of a node, cancelled, in arrays and chains."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.config import DataConfig
from data.prepare.run import prepare
from settings import load
from tests.data.helpers import contents
from tests.launch.slurm.slurm_cluster import NODES, Cluster
from tests.launching import BIN, ROOT, run
from tests.programs import SLURM, needs
from trainer.checkpoints import manifest
from trainer.checkpoints.layout import newest_name
from trainer.distributed import ALONE

TWO_NODES = ("--nodes", "2", "--tasks-per-node", "1")
pytestmark = [pytest.mark.timeout(1800), needs(*SLURM)]


def _launch(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    site = str(ROOT / "launch/slurm/site.yaml")  # not that of whoever runs the tests
    command = [sys.executable, "-m", "launch.slurm", "--site", site, *arguments]
    return subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False)


def submit(cluster: Cluster, *arguments: str) -> list[str]:
    """What ``launch.slurm`` submits; the ids of its jobs."""
    done = _launch(cluster, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^job (\S+)", done.stdout, flags=re.MULTILINE)


def refused(cluster: Cluster, *arguments: str) -> str:
    """The sentence that ``launch.slurm`` ends with, with nothing submitted."""
    before = cluster.run("squeue", "--noheader", "--format=%i")
    done = _launch(cluster, *arguments)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert cluster.run("squeue", "--noheader", "--format=%i") == before
    return done.stderr


def steps_done(run_dir: str) -> int:
    """Lines of metrics so far."""
    metrics = Path(run_dir) / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def losses(run_dir: str) -> list[tuple[int, float]]:
    """Every step's training loss, as written."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def log(run_dir: str) -> str:
    """What the run's jobs printed."""
    return "".join(path.read_text() for path in sorted(Path(run_dir).glob("logs/slurm-*.out")))


@pytest.fixture
def long_run(tiny: dict[str, Any]) -> dict[str, Any]:
    """Enough steps to be interrupted in, without a checkpoint of its own on the way."""
    tiny["train"] |= {"steps": 100, "checkpoint": {"every_steps": 10_000}}
    tiny["train"] |= {"evaluation": {"every_steps": 10_000, "samples": 5}}
    tiny["train"]["log"]["images"] = False
    return tiny


Reference = Callable[..., list[tuple[int, float]]]


@pytest.fixture
def uninterrupted(long_run: dict[str, Any], write_config: Callable[..., str]) -> Reference:
    """Gives the losses of the same run, with further overrides, on two ranks without SLURM."""

    def reference(*overrides: str) -> list[tuple[int, float]]:
        folder = f"{long_run['train']['run_dir']}-straight"
        config = write_config(long_run)
        done = run("pretrain.train", config, f"train.run_dir={folder}", *overrides, processes=2, timeout_s=1500)
        assert done.returncode == 0, done.stdout[-3000:]
        return losses(folder)

    return reference


def test_a_run_told_to_stop_is_requeued_and_ends_as_if_it_had_not_been(
    cluster: Cluster, long_run: dict[str, Any], write_config: Callable[..., str], uninterrupted: Reference
) -> None:
    """By the signal that SLURM sends before the time limit."""
    run_dir = long_run["train"]["run_dir"]
    (job,) = submit(cluster, write_config(long_run), *TWO_NODES)
    cluster.wait(lambda: steps_done(run_dir) > 5, "step 5", 120)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING")
    cluster.start_now(job)
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(run_dir)[-3000:]
    assert losses(run_dir) == uninterrupted()
    printed = log(run_dir)
    assert f"== status 75; saved\n== job {job} goes back into the queue" in printed and "resumed from" in printed
    assert "restart 0, goes on from nothing" in printed and "restart 1, goes on from step-000" in printed


@pytest.mark.slow
def test_a_run_longer_than_its_time_limit_finishes_by_itself(
    cluster: Cluster,
    long_run: dict[str, Any],
    write_config: Callable[..., str],
    uninterrupted: Reference,
    tmp_path: Path,
) -> None:
    """A limit of two minutes, the shortest that leaves room for SLURM's being up to a minute early."""
    long_run["train"]["steps"] = 4000
    run_dir = long_run["train"]["run_dir"]
    site = tmp_path / "site.yaml"
    site.write_text("save_before_s: 30\n")
    (job,) = submit(cluster, write_config(long_run), *TWO_NODES, "--time", "2", "--site", str(site))
    straight = uninterrupted()  # meanwhile
    ends = ("COMPLETED", "FAILED", "TIMEOUT")
    while (found := cluster.wait_for(job, "PENDING", *ends, timeout_s=600))["JobState"] == "PENDING":
        cluster.start_now(job)
        cluster.wait_for(job, "RUNNING", *ends)
    assert found["JobState"] == "COMPLETED" and int(found["Restarts"]) >= 1, log(run_dir)[-3000:]
    assert losses(run_dir) == straight


@pytest.mark.slow
def test_a_run_that_loses_a_node_is_requeued_and_ends_as_if_it_had_not(
    cluster: Cluster, long_run: dict[str, Any], write_config: Callable[..., str], uninterrupted: Reference
) -> None:
    long_run["train"] |= {"steps": 300, "checkpoint": {"every_steps": 10}}
    run_dir = long_run["train"]["run_dir"]
    (job,) = submit(cluster, write_config(long_run), *TWO_NODES)
    cluster.wait(lambda: steps_done(run_dir) > 30, "step 30", 120)
    cluster.kill_node(NODES[1])
    assert cluster.wait_for(job, "PENDING", "COMPLETED")["JobState"] == "PENDING"
    cluster.start_node(NODES[1])
    found = cluster.wait_for(job, "COMPLETED", "FAILED", timeout_s=400)  # by itself, two minutes later
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log(run_dir)[-3000:]
    assert losses(run_dir) == uninterrupted()


@pytest.mark.slow
def test_failures_of_ranks_and_a_node_cost_one_job_seconds_and_no_loss(
    cluster: Cluster, long_run: dict[str, Any], write_config: Callable[..., str], uninterrupted: Reference
) -> None:
    """An abort, a kill, and a lost node by turns; the spare node takes over, then the one that failed longest ago."""
    long_run["train"] |= {"steps": 10_000, "checkpoint": {"every_steps": 5}}
    run_dir = long_run["train"]["run_dir"]
    (job,) = submit(cluster, write_config(long_run), *TWO_NODES, "--spare-nodes", "1")
    one, two, three = NODES
    failures = [
        (partial(_signal, run_dir, signal.SIGABRT), f"{two} failed first (task 1: Aborted", f"{one}, {three}"),
        (partial(_signal, run_dir, signal.SIGKILL), f"{three} failed first (task 1: Killed", f"{one}, {two}"),
        (partial(cluster.kill_node, two), f"{two} failed first (SLURM lost it)", f"{one}, {three}"),
    ]
    for fail, accused, nodes in failures:
        _wait_for_more(cluster, lambda: newest_name(Path(run_dir, "checkpoints")), "a checkpoint")
        fail()
        start = time.monotonic()
        _wait_for_more(cluster, lambda: log(run_dir).count("resumed from"), "the next start")
        _wait_for_more(cluster, lambda: steps_done(run_dir), "the next step")
        print(f"{accused}: the next step came {time.monotonic() - start:.1f} s later")
        assert re.search(rf"== status \d+; {re.escape(accused)}.*; ranks start again on {nodes}\n", log(run_dir))
    cluster.start_node(two)
    _wait_for_more(cluster, lambda: newest_name(Path(run_dir, "checkpoints")), "a checkpoint")
    cluster.run("scancel", job)
    assert cluster.wait_for(job, "CANCELLED", "FAILED", "PENDING")["Restarts"] == "0", log(run_dir)[-3000:]
    cluster.wait(lambda: "asked to stop" in log(run_dir), "the ranks' end")
    last = losses(run_dir)[-1][0]
    assert losses(run_dir) == uninterrupted(f"train.stop_at_step={last}")


@pytest.mark.slow
def test_a_job_with_spare_nodes_that_loses_its_first_one_is_requeued(
    cluster: Cluster, long_run: dict[str, Any], write_config: Callable[..., str]
) -> None:
    """The batch script dies with it, and SLURM itself would leave such a job as it is."""
    long_run["train"] |= {"steps": 10_000, "checkpoint": {"every_steps": 5}}
    run_dir = long_run["train"]["run_dir"]
    (job,) = submit(cluster, write_config(long_run), *TWO_NODES, "--spare-nodes", "1")
    _wait_for_more(cluster, lambda: newest_name(Path(run_dir, "checkpoints")), "a checkpoint")
    cluster.kill_node(NODES[0])
    assert cluster.wait_for(job, "PENDING", "COMPLETED", "FAILED")["JobState"] == "PENDING", log(run_dir)[-3000:]
    assert cluster.job(job)["Restarts"] == "1"
    cluster.run("scancel", job)
    cluster.start_node(NODES[0])


def _wait_for_more(cluster: Cluster, figure: Callable[[], object], what: str) -> None:
    """Until ``figure`` is no longer what it is now."""
    now = figure()
    cluster.wait(lambda: figure() != now, what, 300)


def _signal(run_dir: str, number: int) -> None:
    """Send it to rank 1."""
    os.kill(json.loads((Path(run_dir) / "heartbeat/rank-1.json").read_text())["pid"], number)


@pytest.mark.slow
def test_scancel_leaves_a_whole_checkpoint_of_the_last_step_and_nothing_in_the_queue(
    cluster: Cluster, long_run: dict[str, Any], write_config: Callable[..., str], uninterrupted: Reference
) -> None:
    long_run["train"]["steps"] = 400
    run_dir, config = long_run["train"]["run_dir"], write_config(long_run)
    (job,) = submit(cluster, config, *TWO_NODES)
    cluster.wait(lambda: steps_done(run_dir) > 5, "step 5", 120)
    again = refused(cluster, config, *TWO_NODES, "train.checkpoint.resume=auto")
    assert f"job {job} of {run_dir} is in the queue or running" in again
    cluster.run("scancel", job)
    found = cluster.wait_for(job, "CANCELLED")
    cluster.wait(lambda: "asked to stop" in log(run_dir), "the ranks' end")
    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), "an empty queue")
    assert found["Restarts"] == "0" and "goes back into the queue" not in log(run_dir)
    (saved,) = (Path(run_dir) / "checkpoints").iterdir()
    assert manifest.problem_of(saved, ALONE) is None and int(saved.name[5:]) == losses(run_dir)[-1][0] < 400

    assert "set train.checkpoint.resume=auto" in refused(cluster, config, *TWO_NODES)
    (job,) = submit(cluster, config, *TWO_NODES, "train.checkpoint.resume=auto")
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(run_dir)[-3000:]
    assert losses(run_dir) == uninterrupted()


@pytest.mark.slow
def test_a_mistake_ends_the_job_at_once_and_cancels_what_follows(
    cluster: Cluster, long_run: dict[str, Any], write_config: Callable[..., str], tmp_path: Path
) -> None:
    run_dir = long_run["train"]["run_dir"]
    shutil.copytree(long_run["data"]["dir"], tmp_path / "data")
    long_run["data"]["dir"] = str(tmp_path / "data")
    options = ["--export", str(tmp_path / "hf"), "--sbatch=--hold"]
    job, export = submit(cluster, write_config(long_run), *TWO_NODES, *options)
    shutil.rmtree(tmp_path / "data/train")
    cluster.run("scontrol", "release", job)
    found = cluster.wait_for(job, "FAILED", "COMPLETED")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "78:0", "0")
    assert log(run_dir).count("goes on from nothing") == 1 and "== status 78; a mistake" in log(run_dir)
    cluster.wait_for(export, "CANCELLED")


@pytest.mark.slow
def test_a_job_that_gets_nowhere_is_not_started_for_ever(
    cluster: Cluster, long_run: dict[str, Any], write_config: Callable[..., str]
) -> None:
    long_run["train"]["steps"] = 100_000
    run_dir = long_run["train"]["run_dir"]
    (job,) = submit(cluster, write_config(long_run), *TWO_NODES)
    for number in range(3):
        cluster.wait(lambda number=number: f"restart {number}, goes on from nothing" in log(run_dir), f"start {number}")
        cluster.run("scontrol", "requeue", job)
        cluster.wait_for(job, "PENDING")
        cluster.start_now(job)
    found = cluster.wait_for(job, "FAILED", "COMPLETED")
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "1:0")
    assert f"error: 3 starts of job {job} came no further than the beginning" in log(run_dir)


@pytest.mark.slow
def test_an_array_of_chains_in_one_command(
    cluster: Cluster, tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path
) -> None:
    """Two seeds, each pretrained, tuned and exported, by the code and with the settings that were submitted."""
    (tmp_path / "examples.jsonl").write_text('{"prompt": "def", "response": " f"}\n' * 20)
    tuning = {
        "base": {"path": "overridden"},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"sequence_tokens": 32, "sources": [{"name": "few", "files": [str(tmp_path / "examples.jsonl")]}]},
        "train": {**tiny["train"], "run_dir": str(tmp_path / "tuned")},
    }
    first, second = write_config(tiny), write_config(tuning, "tune.yaml")
    site = tmp_path / "site.yaml"
    container = f"env PATH={BIN}:/usr/bin:/bin"  # what goes before python3 need not be a container
    site.write_text(
        f"tasks_per_node: 1\ninterface: lo\nenvironment: {{GREETING: 'two words'}}\ncontainer: {container}\n"
    )
    options = ["--array", "train.seed=5,6", "--then", second, "train.steps=2", "--export", str(tmp_path / "hf")]
    jobs = submit(cluster, first, *options, "--site", str(site))
    assert len(jobs) == 3
    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), "the end of all jobs", 400)
    for task, seed in enumerate((5, 6)):
        run_dir = f"{tiny['train']['run_dir']}-{task}"
        assert len(losses(run_dir)) == 4, log(run_dir)[-3000:]
        assert yaml.safe_load(Path(run_dir, "config.yaml").read_text())["train"]["seed"] == seed
        tuned = yaml.safe_load((tmp_path / f"tuned-{task}/config.yaml").read_text())
        assert (tuned["base"]["path"], tuned["train"]["steps"]) == (run_dir, 2)
        assert (tmp_path / f"hf-{task}/model.safetensors").is_file(), log(str(tmp_path / f"tuned-{task}"))[-3000:]


@pytest.mark.slow
def test_an_array_prepares_data_on_both_nodes_and_a_run_waits_for_it(
    cluster: Cluster, tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path
) -> None:
    """Three tasks; what they leave is what one process leaves, and the run that was submitted meanwhile reads it."""
    folders = {name: tmp_path / name for name in ("alone", "array", "srun")}
    for folder in folders.values():
        folder.mkdir()
        for path in Path(tiny["data"]["dir"]).glob("tokenizer*"):
            shutil.copy(path, folder)
    tiny["data"] |= {"part_bytes": 20_000, "shard_tokens": 5000, "deduplicate": "exact"}
    config = write_config(tiny)
    prepare(load(config, [f"data.dir={folders['alone']}"], DataConfig, block="data"), workers=1)

    given = [config, f"data.dir={folders['array']}"]
    (job,) = submit(cluster, *given, "--prepare", "--tasks", "3", "--cpus-per-task", "1", "--sbatch=--hold")
    (run_job,) = submit(cluster, *given, *TWO_NODES, "--after", job)
    assert cluster.job(run_job)["Dependency"].startswith(f"afterok:{job}")
    assert f"job {job} of {folders['array']} is in the queue" in refused(cluster, *given, "--prepare", "--tasks", "1")
    assert not (folders["array"] / "train").exists()
    cluster.run("scontrol", "release", job)
    assert cluster.wait_for(run_job, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED", log(
        str(folders["array"])
    ) + log(tiny["train"]["run_dir"])
    said = log(str(folders["array"]))
    assert all(f"task {number} of 3 by --part" in said for number in range(3))
    assert prepared_of(folders["array"]) == prepared_of(folders["alone"])

    command = [sys.executable, "-m", "data.prepare", config, f"data.dir={folders['srun']}", "--workers", "1"]
    said = cluster.run("srun", "--ntasks=2", "--nodes=2", *command)
    assert all(f"task {number} of 2 by SLURM's step" in said for number in range(2))
    assert prepared_of(folders["srun"]) == prepared_of(folders["alone"])


@pytest.mark.slow
def test_an_array_that_loses_a_node_and_a_task_ends_with_the_same_bytes(
    cluster: Cluster, tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path
) -> None:
    """The node's task is requeued by SLURM; the one that was cancelled is submitted again by hand."""
    folders = {name: tmp_path / name for name in ("alone", "array")}
    for folder in folders.values():
        folder.mkdir()
        for path in Path(tiny["data"]["dir"]).glob("tokenizer*"):
            shutil.copy(path, folder)
    tiny["data"] |= {"part_bytes": 500_000, "shard_tokens": 50_000}
    tiny["data"]["sources"] = [{"name": "code", "format": "text", "files": ["{stdlib}/*.py", "{stdlib}/[a-m]*/*.py"]}]
    config = write_config(tiny)
    (job,) = submit(
        cluster, config, f"data.dir={folders['array']}", "--prepare", "--tasks", "2", "--cpus-per-task", "1"
    )
    cluster.wait(lambda: len(list(folders["array"].rglob("shard-*.bin"))) >= 4, "four shards")
    cluster.kill_node(NODES[1])
    cluster.run("scancel", f"{job}_0")
    cluster.start_node(NODES[1])
    prepare(load(config, [f"data.dir={folders['alone']}"], DataConfig, block="data"), workers=1)  # meanwhile
    assert not (folders["array"] / "train/code/manifest.json").exists()
    (script,) = (folders["array"] / "submit").glob("*/prepare.sbatch")
    cluster.run("sbatch", "--array=0", str(script))
    cluster.wait(cluster.is_idle, "idle nodes")
    if cluster.run("squeue", "--noheader"):  # what was requeued waits for two minutes
        cluster.start_now(f"{job}_1")
    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), "an empty queue", 400)
    assert prepared_of(folders["array"]) == prepared_of(folders["alone"]), log(str(folders["array"]))


def prepared_of(folder: Path) -> dict[str, bytes]:
    """Every prepared file of a data folder."""
    return {name: content for kind in ("train", "validation") for name, content in contents(folder / kind).items()}


@pytest.mark.slow
def test_what_surrounds_a_submission_is_not_the_job_s(
    cluster: Cluster, tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path
) -> None:
    """Inside another job, and where jobs begin without the environment of the shell: ranks run the copied code."""
    run_dir, site = tiny["train"]["run_dir"], tmp_path / "site.yaml"
    needed = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}  # to find SLURM
    site.write_text(yaml.safe_dump({"environment": needed}))
    around = {"SLURM_CPU_BIND": "map_cpu:63", "SLURM_NTASKS": "7", "SBATCH_TIMELIMIT": "1", "SBATCH_EXPORT": "NONE"}
    inside = copy(cluster)
    inside.environment = cluster.environment | around
    (job,) = submit(inside, write_config(tiny), *TWO_NODES, "--time", "20", "--sbatch=--hold", "--site", str(site))
    assert cluster.job(job)["TimeLimit"] == "00:20:00"
    (module,) = Path(run_dir).glob("submit/*/code/trainer/__init__.py")
    module.write_text("print('the copied code')")
    cluster.run("scontrol", "release", job)
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(run_dir)[-3000:]
    assert log(run_dir).count("the copied code") == 2


def test_what_sbatch_refuses_is_one_sentence_and_takes_the_chain_with_it(
    cluster: Cluster, tiny: dict[str, Any], write_config: Callable[..., str]
) -> None:
    said = refused(cluster, write_config(tiny), *TWO_NODES, "--partition", "no-such", "--export", "/tmp/never")
    assert said.startswith("error: sbatch refused the script of ") and "invalid partition specified: no-such" in said
