"""``python -m launch.doctor``: every warning and error that a CPU machine can have, and a report of real ranks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.files import nearest_folder
from launch.configs import load_either
from launch.doctor import __main__ as doctor
from launch.doctor import hosts, inputs, machine, ranks, storage
from launch.doctor.findings import Finding, merge, run, worst
from model.config import ModelConfig
from model.decoder import Decoder
from tests.launching import ROOT
from tests.launching import run as launch
from tests.trainer.checkpoints.test_resume import fake
from trainer import precision
from trainer.checkpoints.weights_folder import write_weights
from trainer.config import PretrainConfig
from trainer.config_blocks import TrainConfig
from trainer.distributed import ALONE
from tune.config import TuneFile


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit status and output of the command in this process, without ranks."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):  # of the one rank that other tests are
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "PROBE_BYTES", 2**20)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["launch.doctor", *arguments])
        try:
            status = doctor.main()
        except SystemExit as end:
            status = int(str(end.code))
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def only(findings: Iterable[Finding]) -> Finding:
    """The one finding."""
    (finding,) = findings
    return finding


def program(folder: Path, name: str, script: str) -> None:
    """An executable on the PATH."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_ready_run_is_told_so(
    tiny: dict[str, Any], write_config: Callable[..., str], examined: Callable[..., tuple[int, str]]
) -> None:
    status, out = examined(write_config(tiny))
    assert status == 0, out
    assert "ok       data" in out and "tokenizer and model agree on 400 ids" in out
    assert "looking; torch takes some seconds to load\n" in out
    assert "error" not in out and out.splitlines()[-1]


def test_json_is_for_scripts(examined: Callable[..., tuple[int, str]]) -> None:
    status, out = examined("--json")
    findings = json.loads(out)
    assert status == int(any(f["level"] == "error" for f in findings))
    assert {"python", "packages", "disk", "write speed", "port"} <= {f["check"] for f in findings}
    assert all(
        set(f) == {"check", "level", "found", "remedy"} and (f["remedy"] or f["level"] == "ok") for f in findings
    )


def test_two_ranks_make_one_report(tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path) -> None:
    """With what only ranks can find out, and without the machine's findings twice."""
    done = launch("launch.doctor", "--local_rank=0", write_config(tiny), processes=2)  # deepspeed gives that argument
    assert done.returncode == 0, done.stdout
    for line in ("2 ranks on 1 host, cpu", "the same on all 2 ranks", "GB/s a rank", "within ", "2 micro-batches of 2"):
        assert done.stdout.count(line) >= 1, done.stdout
    assert done.stdout.count("ok       python") == 1


# This machine.


def test_an_old_python_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.python()).level == "ok"
    monkeypatch.setattr(machine, "PYTHON", (9, 0))
    assert (only(machine.python()).level, only(machine.python()).remedy) == ("error", "make setup PYTHON=python9.0")


def test_packages_are_compared_with_the_requirements(tmp_path: Path) -> None:
    assert only(machine.packages()).level in ("ok", "warning")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# a comment\ntorch==1.0\nno-such-package==1.2\n")
    missing, other = machine.packages(requirements)
    assert missing.level == "error" and missing.remedy.endswith("pip install no-such-package==1.2")
    assert other.level == "warning" and "(tested: 1.0)" in other.found
    requirements.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    assert only(machine.packages(requirements)).level == "ok"


@pytest.mark.parametrize(
    ("driver", "built", "level", "words"),
    [
        ("12.4", None, "error", "this torch is a CPU build"),
        ("12.4", "13.0", "error", "torch needs CUDA 13.0, the driver knows up to 12.4"),
        ("13.0", "12.8", "error", "torch sees no GPU though the driver is there (CUDA_VISIBLE_DEVICES is '')"),
        (None, "12.8", "warning", "no NVIDIA driver here"),
        (None, None, "ok", "no NVIDIA driver here"),
    ],
)
def test_torch_is_compared_with_the_driver(
    driver: str | None, built: str | None, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver is not None:
        program(tmp_path, "nvidia-smi", f"echo '| NVIDIA-SMI 550.1  Driver Version: 550.1  CUDA Version: {driver} |'")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = only(machine.cuda())
    assert finding.level == level and words in finding.found
    assert bool(finding.remedy) == (level != "ok")


def test_free_gpu_memory_is_compared_with_the_plan() -> None:
    gib = 2**30
    assert machine.judge_gpu("0: H100", 78 * gib, 80 * gib, 60.0 * gib).level == "ok"
    assert "another process" in machine.judge_gpu("0: H100", 60 * gib, 80 * gib, None).found
    short = machine.judge_gpu("0: H100", 40 * gib, 80 * gib, 60.0 * gib)
    assert short.level == "error" and "40.0 of 80.0 GiB free; the config needs about 60.0" in short.found
    assert list(machine.gpus(1.0)) == []  # no GPU, nothing to say


def test_a_compiler_is_asked_for_only_where_something_is_compiled(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainConfig.model_validate(tiny["train"])
    assert list(machine.compiler(None)) == list(machine.compiler(plain)) == []
    compiled = plain.model_copy(update={"compile": True})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    missing = only(machine.compiler(compiled))
    assert missing.level == "error" and "train.compile" in missing.found
    program(tmp_path, "clang++", "")
    assert only(machine.compiler(compiled)).level == "ok"


def test_locks_of_killed_builds_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert only(machine.locks()).level == "ok"
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert only(machine.locks()).level == "warning"
    os.utime(lock, (time.time() - 3600,) * 2)
    stale = only(machine.locks())
    assert stale.level == "error" and stale.remedy == f"rm {lock}" and "60 min old" in stale.found


def test_limits_that_are_too_low_are_warnings() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        low = only(machine.limits())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert low.level == "warning" and low.found.startswith("at most 512") and low.remedy.startswith("ulimit -n ")
    assert machine.judge_shared_memory(64 * 2**20).level == "warning"
    assert machine.judge_shared_memory(8 * 2**30).level == "ok"


def test_a_taken_port_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        taken = only(machine.port())
    assert taken.level == "warning" and "--master_port" in taken.remedy
    assert only(machine.port()).level == "ok"


# Where the run writes.


def test_the_disk_must_hold_the_checkpoints(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert only(storage.space(tmp_path, None, 0)).level == "ok"
    assert only(storage.space(tmp_path, free / 10, keep=2)).level == "ok"
    assert only(storage.space(tmp_path, free / 2, keep=2)).level == "warning"
    full = only(storage.space(tmp_path, 2.0 * free, keep=2))
    assert full.level == "error" and "train.run_dir" in full.remedy


def test_write_speed_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    assert "GB/s" in only(storage.write_speed(tmp_path, None, probe_bytes=2**20)).found
    assert list(tmp_path.iterdir()) == []
    assert storage.judge_speed(1e9, 100e9).level == "ok"
    assert storage.judge_speed(1e8, 100e9).level == "warning"


def test_a_folder_that_cannot_be_written_is_an_error() -> None:
    finding = only(run({"write speed": lambda: storage.write_speed(Path("/proc"), None)}))
    assert finding.level == "error" and "/proc" in finding.found


def test_a_run_folder_in_use_is_an_error(tiny: dict[str, Any], tmp_path: Path) -> None:
    train = TrainConfig.model_validate(tiny["train"])
    assert only(storage.run_folder(train)).level == "ok"
    required = train.model_copy(update={"checkpoint": train.checkpoint.model_copy(update={"resume": "required"})})
    nothing = only(storage.run_folder(required))
    assert nothing.level == "error" and "nothing to resume from" in nothing.found
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    taken = only(run({"run folder": lambda: storage.run_folder(train)}))
    assert taken.level == "error" and "already holds step-00000002" in taken.found
    assert taken.remedy.startswith("set train.checkpoint.resume=auto")
    assert only(storage.run_folder(required)).level == "ok"


def test_a_tracker_that_cannot_be_used_is_an_error(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train = TrainConfig.model_validate(tiny["train"])
    assert only(storage.trackers(train)).found == "tensorboard"
    log = train.log.model_copy(update={"trackers": ["mlflow"]})
    finding = only(run({"trackers": lambda: storage.trackers(train.model_copy(update={"log": log}))}))
    assert finding.level == "error" and finding.found.startswith("train.log.trackers has mlflow, ")


def test_a_mirror_is_looked_at(tiny: dict[str, Any], tmp_path: Path) -> None:
    def finding(url: str, setting: str) -> Finding:
        block = tiny["train"] | {"checkpoint": {"mirror": url, "resume": setting}}
        return only(run({"mirror": lambda: storage.mirror(TrainConfig.model_validate(block))}))

    url = f"file://{tmp_path}/away"
    empty = finding(url, "auto")
    assert empty.level == "ok" and empty.found.startswith(
        f"{url}: no checkpoint there; a small file written and removed"
    )
    assert list((tmp_path / "away").iterdir()) == []
    assert "there is no checkpoint" in finding(url, "required").found
    fake(tmp_path / "away", 3)
    assert "the newest checkpoint there is step-00000003" in finding(url, "required").found
    taken = finding(url, "never")
    assert taken.level == "error" and taken.found == f"{url} already holds step-00000003"
    assert "the protocol 's33' is not known" in finding("s33://bucket/run", "auto").found
    unwritable = finding("file:///proc/none", "auto")
    assert (
        unwritable.level == "error" and "train.checkpoint.mirror file:///proc/none cannot be used" in unwritable.found
    )


def test_the_folder_asked_is_one_that_exists(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path


# What the run reads.


def test_shards_are_compared_with_tokenizer_and_model(tiny: dict[str, Any], tmp_path: Path) -> None:
    def finding() -> Finding:
        return only(run({"data": lambda: inputs.shards(PretrainConfig.model_validate(tiny))}))

    assert finding().level == "ok"
    tiny["model"]["vocab_size"] = tiny["data"]["tokenizer"]["vocab_size"] = 500
    assert "vocabulary of 400, data.tokenizer.vocab_size is 500" in finding().found
    tiny["model"]["vocab_size"] = tiny["data"]["tokenizer"]["vocab_size"] = 400
    tiny["data"]["validation"][0]["name"] = "absent"
    assert "absent/manifest.json does not exist" in finding().found
    tiny["data"]["dir"] = str(tmp_path / "nowhere")
    assert finding().level == "error" and "has no tokenizer: it holds neither" in finding().found


def test_stage_two_needs_its_base_its_tokenizer_and_its_files(
    tiny: dict[str, Any], corpus: dict[str, Any], tmp_path: Path, examined: Callable[..., tuple[int, str]]
) -> None:
    base, examples = tmp_path / "base", tmp_path / "examples.jsonl"
    blocks = yaml.safe_load((ROOT / "configs/tune_lora.yaml").read_text())
    source = {"name": "some", "files": [str(examples)]}
    blocks["base"]["path"] = str(base)
    blocks["data"] = {"sequence_tokens": 64, "sources": [source]}
    blocks["train"]["run_dir"] = str(tmp_path / "tuned")
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(blocks))
    status, out = examined(str(path))
    assert status == 1 and "holds no config.yaml with a model block" in out
    write_weights(Decoder(ModelConfig.model_validate(tiny["model"])), base, Path(corpus["dir"]), {"source": "test"})
    status, out = examined(str(path))
    assert status == 1 and f"no file matches '{examples}'" in out
    examples.write_text('{"prompt": "a", "response": "b"}\n')
    status, out = examined(str(path))
    assert status == 0 and "1 files" in out and "trained; about" in out, out
    tuned = tmp_path / "other"
    tuned.mkdir()
    (tuned / "config.yaml").write_text(f"base: {{path: x}}\n{(base / 'config.yaml').read_text()}")
    assert "is a stage-two run, whose weights lie on top" in examined(str(path), f"base.path={tuned}")[1]
    config = load_either(path)
    assert isinstance(config, TuneFile)
    small = ModelConfig.model_validate({**tiny["model"], "vocab_size": 300})
    finding = only(run({"data": lambda: inputs.examples(config.model_copy(update={"model": small}))}))
    assert finding.level == "error" and "has 400 pieces, the model's vocabulary is 300" in finding.found


def test_settings_that_no_run_starts_with_are_errors(tiny: dict[str, Any]) -> None:
    def finding() -> Finding:
        return only(run({"settings": lambda: inputs.settings(PretrainConfig.model_validate(tiny))}))

    assert finding().level == "ok"
    tiny["train"]["schedule"] = {"warmup_steps": 99}
    late = finding()
    assert late.level == "error" and "warmup_steps (99) must not exceed train.steps (4)" in late.found
    tiny["train"]["schedule"] = {}
    tiny["init"] = {"path": "nowhere"}
    assert finding().found == "there is no folder nowhere"
    (Path(tiny["train"]["run_dir"]) / "checkpoints/step-00000004").mkdir(parents=True)
    assert finding().level == "ok"  # goes on from its own


def test_it_tells_what_auto_is_here_and_warns_of_slow_bf16(
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    examined: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "fast_bf16", lambda *_: (False, "this CPU is slow"))
    path = write_config(tiny)
    assert "train.precision auto is fp32: this CPU is slow" in examined(path, "train.precision=auto")[1]
    out = examined(path, "train.precision=bf16")[1]
    assert "warning" in out and "train.precision bf16 is slow: this CPU is slow" in out
    assert "train.precision" not in examined(path, "train.precision=fp32")[1]


# Hosts.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one slots=8\ntwo 8\n", "line 2: 'two 8' is not 'host slots=N'"),
        ("one slots=0\n", "line 1: 'one slots=0' is not"),
        ("one slots=8\n\none slots=8\n", "line 3: one stands twice"),
        ("# nobody\n", "names no host"),
        (None, "does not exist"),
    ],
)
def test_a_hostfile_is_read_strictly(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    if text is not None:
        path.write_text(text)
    finding = only(run({"hostfile": lambda: hosts.hostfile(path)}))
    assert finding.level == "error" and words in finding.found and finding.remedy


def test_hosts_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hostfile"
    path.write_text("127.0.0.1 slots=2\nno-such-host.invalid slots=4\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hosts.unreachable("127.0.0.1") == "there is no ssh command here"
    program(tmp_path, "ssh", "echo 'Permission denied (publickey).' >&2; exit 255")
    told, differ, *problems = hosts.hostfile(path)
    assert told.found.endswith("2 hosts, 6 slots") and differ.level == "warning"
    assert [p.level for p in problems] == ["error", "error"]
    assert problems[0].found.startswith("127.0.0.1: ssh: Permission denied (publickey).")
    program(tmp_path, "ssh", "exit 0")
    path.write_text("127.0.0.1 slots=2\n")
    assert [f.level for f in hosts.hostfile(path)] == ["ok", "ok"]
    monkeypatch.setattr(hosts, "TIMEOUT_S", 0.2)
    program(tmp_path, "ssh", "exec /bin/sleep 5")
    assert "did not end within" in str(hosts.unreachable("127.0.0.1"))


# Ranks.

HERE = ranks.Facts(0, "one", "cuda:0", "0a1b", "torch 2.13", "abc", 100.0)


def test_ranks_that_differ_are_errors() -> None:
    other = replace(HERE, rank=1, host="two", code="def")
    code, software = ranks.same_everywhere([HERE, other, replace(other, rank=2)])
    assert code.level == "error" and "abc on one (rank 0); def on two (rank 1 and 1 more)" in code.found
    assert software.level == "ok" and "all 3 ranks" in software.found


def test_clocks_apart_and_shared_gpus_are_warnings() -> None:
    late = replace(HERE, rank=1, host="two", clock_s=107.5)
    assert only(ranks.clocks([HERE, late])).found.startswith("two is 7.5 s ahead of one")
    assert only(ranks.clocks([HERE, late])).level == "warning"
    assert only(ranks.clocks([HERE, HERE])).level == "ok"
    shared = only(ranks.devices([HERE, late]))  # two containers, each of which calls it its number 0
    assert shared.level == "warning" and "rank 0 on one and rank 1 on two share GPU 0a1b" in shared.found
    assert only(ranks.devices([HERE, replace(late, gpu="2c3d")])).level == "ok"
    assert only(ranks.devices([replace(one, device="cpu", gpu="none") for one in (HERE, late)])).level == "ok"


def test_a_slow_network_is_a_warning_on_gpus_only() -> None:
    assert ranks.judge_all_reduce(1e9, 1e-4, 2**28, "cuda").level == "warning"
    assert ranks.judge_all_reduce(1e9, 1e-4, 2**22, "cpu").level == "ok"
    assert ranks.judge_all_reduce(200e9, 1e-5, 2**28, "cuda").level == "ok"


def test_a_batch_that_does_not_divide_is_an_error(tiny: dict[str, Any]) -> None:
    config = PretrainConfig.model_validate(tiny)
    assert only(ranks.batch(config, ALONE)).level == "ok"
    finding = only(run({"batch": lambda: ranks.batch(config, replace(ALONE, size=3))}))
    assert finding.level == "error" and "2 x 3 = 6" in finding.found
    tiny["deepspeed"]["sequence_parallel"] = 2
    shared = PretrainConfig.model_validate(tiny)
    finding = only(ranks.batch(shared, replace(ALONE, size=4)))
    assert "2 micro-batches of 2 on each of 2 groups of 2 ranks that share their windows" in finding.found
    finding = only(run({"batch": lambda: ranks.batch(shared, replace(ALONE, size=3))}))
    assert finding.level == "error" and "must divide the number of ranks (3)" in finding.found


# The report.


def test_a_broken_check_never_breaks_the_others() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("who knows")

    first, second = run({"broken": broken, "fine": lambda: [Finding("fine", "ok", "all well")]})
    assert first.level == "warning" and "RuntimeError: who knows" in first.found
    assert second.level == "ok"


def test_findings_of_several_hosts_become_one_list() -> None:
    fine, bad = Finding("disk", "ok", "room"), Finding("disk", "error", "full", "make room")
    clock = Finding("port", "ok", "free")
    assert merge([("one", [fine, clock]), ("two", [fine])]) == [fine, clock]
    merged = merge([("one", [fine]), *((f"n{i}", [bad]) for i in range(6))])
    assert merged == [replace(bad, found="n0, n1, n2, n3 and 2 more: full")]
    assert merge([("one", [bad]), ("one", [])]) == [bad]  # one host needs no name
    gpus = [Finding("gpus", "ok", f"{number}: H100") for number in range(3)]
    assert merge([("one", gpus[:1]), ("one", gpus[1:2]), ("two", gpus[2:])]) == gpus[:2]
    assert worst([fine, bad]) == "error" and worst([]) == "ok"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("configs/skip_2b.yaml",), "config file configs/skip_2b.yaml does not exist"),
        (("configs/demo.yaml", "deepspeed.zero=3"), "did you mean"),
        (("configs/demo.yaml", "train.steps"), "must look like key.sub=value"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: tuple[str, ...],
    sentence: str,
    examined: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    status, out = examined(*arguments)
    assert status == 1 and sentence in out and out.startswith("error: ") and len(out.splitlines()) == 1


def test_files_of_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"context": "a", "answer": "b"}\n' * 2)
    files, named = run({"tasks": lambda: inputs.tasks([str(path), "piqa"])})
    assert (files.level, files.found) == ("ok", "1 files with 2 questions")
    assert named.found == "lm-evaluation-harness's piqa are loaded when the run starts"
    path.write_text('{"context": "a"}\n')
    assert "own.jsonl, line 1 has the fields context" in only(run({"tasks": lambda: inputs.tasks([str(path)])})).found
    assert run({"tasks": lambda: inputs.tasks([])}) == []
