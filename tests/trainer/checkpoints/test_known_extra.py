"""What ``deepspeed.extra`` may hold trains as without it, is saved, and resumes on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from settings import load
from tests.once import once
from tests.trainer.checkpoints.saved_runs import STEPS, masters_of, save_runs
from tests.trainer.one_rank import engine_for
from trainer.checkpoints import resume
from trainer.config import PretrainConfig
from trainer.deepspeed_config import KNOWN_EXTRA
from trainer.distributed import World

ZERO: dict[str, tuple[int, Any]] = {
    "overlap_comm": (2, True),
    "round_robin_gradients": (2, True),
    "reduce_bucket_size": (2, 500),
    "allgather_bucket_size": (2, 500),
    "sub_group_size": (3, 700),
    "stage3_max_live_parameters": (3, 100),
    "stage3_max_reuse_distance": (3, 100),
    "stage3_prefetch_bucket_size": (3, 100),
    "zero_hpz_partition_size": (3, 2),
}
TOP: dict[str, tuple[int, Any]] = {"communication_data_type": (2, "fp32")}
CASES = {f"plain-{stage}": [f"deepspeed.zero_stage={stage}"] for stage in (2, 3)}
for name, (stage, value) in (ZERO | TOP).items():
    block = f"{{zero_optimization: {{{name}: {value}}}}}" if name in ZERO else f"{{{name}: {value}}}"
    CASES[name] = [f"deepspeed.zero_stage={stage}", f"deepspeed.extra={block}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    """A run of two ranks for each of them, in one start."""
    return once(tmp_path_factory, "extra-runs", lambda at: save_runs(at, corpus, CASES, ranks=2)) / "out"


def test_each_that_is_known_is_tried() -> None:
    assert ZERO.keys() == KNOWN_EXTRA["zero_optimization"].keys()
    assert TOP.keys() | {"zero_optimization"} == KNOWN_EXTRA.keys()


@pytest.mark.parametrize("case", [*ZERO, *TOP])
def test_it_changes_no_weight_and_resumes_on_one_rank(case: str, runs: Path, world: World) -> None:
    plain = torch.load(runs / f"plain-{(ZERO | TOP)[case][0]}" / "masters.pt", weights_only=True)
    overrides = [word for word in CASES[case] if "hpz" not in word]  # one rank has no node to share with
    config = load(runs.parent / "run.yaml", overrides, PretrainConfig)
    with engine_for(config, world) as engine:
        state, _ = resume.load(engine, runs / case / f"checkpoints/step-{STEPS:08d}", "f" * 64, config, world)
        assert state == {"step": STEPS}
        for name, weight in masters_of(engine, config).items():
            torch.testing.assert_close(weight, plain[name], rtol=1e-5, atol=1e-6)
