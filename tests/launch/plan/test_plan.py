"""``python -m launch.plan``: what it prints, how it scales, and what it refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data.batches import TrainingData
from launch.plan import __main__ as plan
from launch.plan import communication
from launch.plan.communication import Cluster, communication_s, expected_mfu, ladder, volume
from launch.plan.gpus import GPUS
from launch.plan.memory_model import GIB, memory
from launch.plan.workload import Workload, read_workload
from model.config import ModelConfig
from model.decoder import Decoder
from model.flops import TRAINING_FACTOR, dense_flops
from tests.launching import ROOT, run
from trainer.checkpoints.weights_folder import write_weights
from trainer.config import load_run

H100 = Cluster(GPUS["h100-80g"], gpus_per_node=8, network_gbps=3200)
LARGE = str(Path(__file__).parent / "large.yaml")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit status and output of the command."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["launch.plan", *arguments])
        try:
            status = plan.main()
        except SystemExit as end:
            status = int(str(end.code))
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def test_the_sample_in_the_documentation_is_what_it_prints(planned: Callable[..., tuple[int, str]]) -> None:
    text = (ROOT / "docs/clusters.md").read_text()
    command = "launch.plan configs/skip_1b.yaml --gpus 64 --gpu h100-80g"
    sample = text.partition(f"python -m {command}\n")[2].split("```\n")[2]
    assert sample.split() == planned(*command.split()[1:])[1].split()  # long lines are folded there


def test_the_command_prints_every_part_and_no_noise() -> None:
    done = run("launch.plan", LARGE, "--gpus", "64", "--gpu", "h100-80g", "train.steps=5000", launcher="python")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{LARGE} on 64 x h100-80g (8 nodes)\n")
    for part in (
        "1,213,401,088",
        "697,452,544 active",
        "GFLOPs a token",
        "ZeRO 3 <",
        "GPU-hours",
        "checkpoint",
        "scaling",
    ):
        assert part in done.stdout
    assert "Warning" not in done.stdout and max(map(len, done.stdout.splitlines())) < 170


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!t]*.yaml")), ids=lambda path: path.stem)
def test_every_stage_one_config_can_be_planned(path: Path, planned: Callable[..., tuple[int, str]]) -> None:
    status, out = planned(str(path), "--gpus", "2", "--gpu", "rtx4090-24g")
    assert status == 0, out
    assert f"{load_run(path).train.steps:,} steps" in out


def test_epochs_of_each_source_in_each_stage(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], str], planned: Callable[..., tuple[int, str]]
) -> None:
    weights = [{"code": 1}, {"code": 1}]
    tiny["data"]["stages"] = [
        {"name": name, "from_share": share, "weights": own}
        for name, share, own in zip(("main", "end"), (0, 0.75), weights, strict=True)
    ]
    asked = (write_config(tiny), "--gpus", "1", "--gpu", "a100-80g", "train.steps=100")
    status, out = planned(*asked)
    (entry,) = TrainingData(load_run(asked[0], ["train.steps=100"]).data).summary(800)
    assert (
        status == 0
        and f"data        main from token 0 on: code 19,200 tokens ({600 / entry.windows:.2f} epochs)" in out
    )
    assert f"            end from token 19,200 on: code 6,400 tokens ({200 / entry.windows:.2f} epochs)" in out
    status, out = planned(*asked, "data.dir=nowhere")
    assert status == 0 and "code 19,200 tokens\n" in out and "epochs are not known here, where not all shards" in out


def test_fp32_takes_as_much_longer_as_its_products(planned: Callable[..., tuple[int, str]]) -> None:
    """312 against 19.5 TFLOP/s; with nothing else in the time, one GPU and a given MFU."""
    hours = []
    for precision in ("bf16", "fp32"):
        options = [f"train.precision={precision}", "--gpus", "1", "--gpu", "a100-80g", "--mfu", "0.4"]
        status, out = planned("configs/skip_160m.yaml", *options)
        assert status == 0, out
        (found,) = re.findall(r" ([\d.,]+) GPU-hours", out)
        hours.append(float(found.replace(",", "")))
    assert hours[1] / hours[0] == pytest.approx(312 / 19.5, rel=0.03)


def test_small_numbers_are_no_zeros_and_one_is_no_plural(planned: Callable[..., tuple[int, str]]) -> None:
    status, out = planned("configs/demo.yaml", "train.micro_batch_samples=8", "--gpus", "1", "--gpu", "a100-80g")
    assert status == 0 and "1 micro-batch of 8" in out and "(1 node)" in out
    (row,) = [line for line in out.splitlines() if line.startswith("weights")]
    assert "<0.01" in row and "0.00" not in row


def test_auto_is_planned_in_bf16(planned: Callable[..., tuple[int, str]]) -> None:
    asked = (LARGE, "--gpus", "8", "--gpu", "h100-80g")
    assert load_run(LARGE).train.precision == "auto"
    assert planned(*asked) == planned(*asked, "train.precision=bf16")


def test_sizes_that_are_text_are_told(planned: Callable[..., tuple[int, str]]) -> None:
    words = ["configs/skip_1b.yaml", "--gpus", "8", "--gpu", "h100-80g"]
    status, out = planned(*words, 'deepspeed.extra={zero_optimization: {reduce_bucket_size: "5e8"}}')
    assert status == 1 and "reduce_bucket_size must be a number of elements above 0, got '5e8'; write it without" in out
    status, out = planned(*words, "deepspeed.extra={zero_optimization: {reduce_bucket_size: 5e8}}")
    assert status == 0, out  # a number in YAML 1.2, and here


def test_flops_and_time_are_those_of_the_counts() -> None:
    dense = read_workload(LARGE, ["model.router=null", "train.activation_checkpointing=false"])
    tokens = dense.config.data.sequence_tokens
    exact = TRAINING_FACTOR * dense_flops(dense.model, tokens, tokens * (tokens + 1) / 2) / tokens
    assert dense.flops_per_token() == dense.dense_flops_per_token() == pytest.approx(exact)
    assert dense.active_parameters == dense.weights.total
    routed = read_workload(LARGE)
    assert routed.dense_flops_per_token() == pytest.approx(exact)
    assert 0.5 < routed.flops_per_token() / exact < 0.6  # half the layers, and what is never skipped
    # Recomputing the layers costs a third of what is computed anyway, which MFU does not count.
    again = read_workload(LARGE, ["model.router=null"])
    assert 0.75 < expected_mfu(again)[0] / expected_mfu(dense)[0] < 0.8
    # The products of one step at half the peak.
    step = communication.compute_s(dense, 3, 64, H100.gpu, mfu=0.5)
    assert step == pytest.approx(exact * dense.tokens_per_step / 64 / 0.5 / 989e12, rel=0.01)


def test_volumes_are_the_stages() -> None:
    workload = read_workload(LARGE)
    weights = 2.0 * workload.weights.total
    sent = [volume(workload, stage, accumulation=4).sent_bytes(10**9) / weights for stage in (0, 1, 2, 3)]
    live = 1e9 / workload.weights.total  # what stage 3 need not gather twice
    assert sent == pytest.approx([2, 3, 9, 4 * (2 - live) + 4])
    assert volume(workload, 2, accumulation=1).sent_bytes(10**9) / weights == pytest.approx(3)
    assert volume(workload, 0, accumulation=1).sent_bytes(1) == 0


def test_communication_waits_for_the_slower_of_link_and_network() -> None:
    moved = volume(read_workload(LARGE), 1, accumulation=1)
    assert communication_s(moved, 1, H100) == 0
    inside, outside = communication_s(moved, 8, H100), communication_s(moved, 16, H100)
    assert inside == pytest.approx(3 * 2 * 1.2134e9 * 7 / 8 / 450e9 / 0.8, rel=0.02)
    slow = Cluster(H100.gpu, 8, network_gbps=100)
    assert communication_s(moved, 8, slow) == inside < outside
    assert communication_s(moved, 16, slow) == pytest.approx(3 * 2 * 1.2134e9 / 2 / 12.5e9 / 0.8, rel=0.02)
    assert communication_s(moved, 4096, H100) > communication_s(moved, 1024, H100)  # the ring's latency


def test_efficiency_falls_with_gpus_until_the_batch_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication, "HOST_MS", dict.fromkeys(communication.HOST_MS, 0.0))
    workload = read_workload(LARGE, ["train.global_batch_samples=8192", "train.micro_batch_samples=4"])
    steps = [communication.step(workload, 3, count, H100, 0.4) for count in ladder(8, 8, 8192)]
    possible = [s for s in steps if s.problem is None]
    worst, best = zip(*(s.efficiency for s in possible), strict=True)
    assert list(worst) == sorted(worst, reverse=True) and worst[0] > 0.85 > 0.6 > worst[-1]
    assert all(b >= w for w, b in zip(worst, best, strict=True))
    assert [s.gpus for s in steps if s.problem] == [4096, 8192]
    assert all(later.memory.peak < earlier.memory.peak for earlier, later in pairwise(possible))


def test_a_host_that_takes_longer_than_the_gpu_is_what_a_step_takes(planned: Callable[..., tuple[int, str]]) -> None:
    small = ["train.micro_batch_samples=1", "deepspeed.zero_stage=1", "train.activation_checkpointing=false"]
    found = communication.step(read_workload(LARGE, small), 1, 64, H100, 0.4)
    layers, micro_batches = 24, 1024 // 64
    assert found.host_s == pytest.approx(layers * micro_batches * communication.HOST_MS[False, False] / 1e3)
    assert found.host_s > found.compute_s and found.worst_s == found.host_s + found.communication_s
    assert found.efficiency[0] == found.compute_s / found.worst_s < 0.2
    slow = communication.step(read_workload(LARGE, small), 3, 64, H100, 0.4)
    assert slow.host_s / found.host_s == pytest.approx(14.8 / 11.1)
    told = "longer than the GPU takes for it at best: use larger micro-batches"
    asked, shipped = ["--gpus", "64", "--gpu", "h100-80g"], "configs/skip_1b.yaml"
    assert told in planned(shipped, *small, *asked)[1] and told not in planned(shipped, *asked)[1]


def test_stages_and_gpus_that_do_not_fit_are_marked(planned: Callable[..., tuple[int, str]]) -> None:
    status, out = planned(LARGE, "train.micro_batch_samples=16", "--gpus", "8", "--gpu", "rtx4090-24g")
    assert status == 0
    fits = next(line for line in out.splitlines() if line.startswith("fits"))
    assert fits.split() == ["fits", "no", "yes", "yes", "yes"]
    tight = planned(LARGE, "train.micro_batch_samples=64", "--gpus", "8", "--gpu", "rtx4090-24g")[1]
    assert "does not fit" in tight
    workload = read_workload(LARGE, ["train.micro_batch_samples=64"])
    assert memory(workload, 3, 8).peak > 24 * GIB


def test_the_plan_says_how_many_ranks_must_share_a_window(planned: Callable[..., tuple[int, str]]) -> None:
    long = ["data.sequence_tokens=131072", "model.max_positions=131072", "train.micro_batch_samples=1"]
    asked = ["--gpus", "8", "--gpu", "h100-80g", "train.global_batch_samples=32"]
    table = "ranks that share a window of"
    assert table not in planned(LARGE, *asked)[1]
    checkpointing = "train.activation_checkpointing=false"
    out = planned(LARGE, *long, *asked, checkpointing)[1]
    rows = {int(c[0]): c for line in out[out.index(table) :].splitlines()[2:6] if (c := line.replace("<", "").split())}
    assert list(rows) == [1, 2, 4, 8] and rows[1][2] == "no" and rows[8][2] == "yes"
    peaks = [float(row[1].replace(",", "")) for row in rows.values()]
    assert peaks == sorted(peaks, reverse=True)

    shared = planned(LARGE, *long, *asked, checkpointing, "deepspeed.sequence_parallel=8")[1]
    assert "32 micro-batches of 1 for 8 GPUs that share them" in shared and "8 <" in shared
    assert re.search(rf"^peak .* {peaks[3]:.2f}", shared, re.MULTILINE)
    status, told = planned(LARGE, *long, *asked, "deepspeed.sequence_parallel=3")
    assert status == 1 and "2 x deepspeed.sequence_parallel (6)" in told


def test_only_stages_that_the_config_allows_are_planned(planned: Callable[..., tuple[int, str]]) -> None:
    for override, stages in (
        ("train.compile=true", [0, 1, 2]),
        ("train.optimizer.kind=adafactor", [0]),
        ("deepspeed.offload=optimizer", [1, 2, 3]),
    ):
        stage = f"deepspeed.zero_stage={stages[0]}"
        assert read_workload(LARGE, [override, stage]).stages == stages
        out = planned(LARGE, override, stage, "--gpus", "8", "--gpu", "h100-80g")[1]
        assert [f"ZeRO {stage}" in out for stage in range(4)] == [stage in stages for stage in range(4)]
    assert "host memory, offloaded" in out


def test_a_measured_mfu_takes_the_place_of_the_range(planned: Callable[..., tuple[int, str]]) -> None:
    out = planned(LARGE, "--gpus", "8", "--gpu", "h100-80g", "--mfu", "0.31")[1]
    assert "MFU         31% on executed FLOPs (as given)" in out
    assert "none of this code" in planned(LARGE, "--gpus", "8", "--gpu", "h100-80g")[1]


def test_stage_two_plans_what_is_trained(tiny: dict[str, Any], corpus: dict[str, Any], tmp_path: Path) -> None:
    """From the base's config alone: full tuning trains all, LoRA little, and frozen weights have no optimiser state."""
    model = ModelConfig.model_validate(tiny["model"])
    write_weights(Decoder(model), tmp_path / "base", Path(corpus["dir"]), {"source": "test"})

    def workload(*overrides: str) -> Workload:
        path = str(ROOT / "configs/tune_lora_ensemble.yaml")
        return read_workload(path, [f"base.path={tmp_path / 'base'}", "data.sequence_tokens=64", *overrides])

    lora, full = workload("base.routers=frozen"), workload("adapter.kind=full")
    assert full.weights.total == full.weights.trained
    rank, layers, d, f = 8, model.layers, model.width, model.ffn_width
    kv = model.kv_heads * model.head_dim
    adapters = layers * rank * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f))
    ensemble = 2 * d + 3 * (d + 1) + d  # two norms more, router of three layers, the final norm
    assert lora.weights.trained == adapters + ensemble
    assert lora.weights.total == full.weights.total + adapters
    assert memory(lora, 0, 1).optimizer < 0.3 * memory(full, 0, 1).optimizer
    # As the metrics count them: no gradients of frozen matrices, none at all below what is trained.
    late = workload("base.routers=frozen", "adapter.layers=late", "ensemble.layers=2")
    assert late.flops_per_token() < lora.flops_per_token() < full.flops_per_token()
    assert 2 / 3 < lora.dense_flops_per_token() / full.dense_flops_per_token() < 3 / 4
    assert late.hardware_flops_per_token() >= late.flops_per_token()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("configs/skip_2b.yaml", "--gpus", "8", "--gpu", "h100-80g"), "skip_2b.yaml does not exist; files there"),
        (
            (LARGE, "--gpus", "48", "--gpu", "h100-80g"),
            "must be divisible by micro_batch_samples x ranks (4 x 48 = 192)",
        ),
        ((LARGE, "--gpus", "8", "--gpu", "h100"), "invalid choice: 'h100' (choose from"),
        ((LARGE, "--gpus", "0", "--gpu", "h100-80g"), "--gpus: must be a whole number, at least 1, got '0'"),
        (
            (LARGE, "--gpus", "8", "--gpu", "h100-80g", "--mfu", "40"),
            "--mfu: must be a number above 0, at most 1, got '40'",
        ),
        ((LARGE, "train.stepz=8", "--gpus", "8", "--gpu", "h100-80g"), "did you mean 'train.steps'?"),
        (("configs/tune_lora.yaml", "--gpus", "8", "--gpu", "h100-80g"), "holds no config.yaml with a model block"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: tuple[str, ...], sentence: str, planned: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    status, out = planned(*arguments)
    assert status in (1, 2)
    assert sentence in out and "Traceback" not in out
