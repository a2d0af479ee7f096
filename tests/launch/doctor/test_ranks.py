"""What the doctor says of ranks together: code, clocks, GPUs that they share, network and batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launch.doctor import ranks
from launch.doctor.findings import run
from tests.launch.doctor.helpers import only
from trainer.config import PretrainConfig
from trainer.distributed import ALONE

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
