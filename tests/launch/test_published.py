"""The plan's counts against published runs, and docs/clusters.md against both.

Sources: Llama: Touvron et al. 2023a (arXiv:2302.13971), GPU-hours of table 15, tokens/s of the section on efficient
implementation. Llama 2: Touvron et al. 2023b (arXiv:2307.09288), table 2. Llama 3.1 405B: its model card (2024) for
GPU-hours, Grattafiori et al. 2024 (arXiv:2407.21783) for sizes and tokens. TinyLlama: README of its repository.
Parameter counts are those of the weights on Hugging Face.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from launch.plan.communication import UTILISATION
from launch.plan.gpus import GPUS
from launch.plan.workload import forward_flops
from model.config import ModelConfig
from model.flops import TRAINING_FACTOR, parameter_counts
from tests.launching import ROOT


class Published(NamedTuple):
    """A run as its authors report it; ``gpu_hours`` or ``tokens_per_s`` of one GPU."""

    sizes: tuple[int, int, int, int, int, int]
    """Layers, width, heads, kv heads, feed-forward width, vocabulary."""
    parameters: int
    sequence_tokens: int
    gpu: str
    tokens: float = 0
    gpu_hours: float = 0
    tokens_per_s: float = 0

    @property
    def model(self) -> ModelConfig:
        names = ("layers", "width", "heads", "kv_heads", "ffn_width", "vocab_size")
        return ModelConfig.model_validate(dict(zip(names, self.sizes, strict=True)))

    @property
    def mfu(self) -> float:
        """What the run comes to with our FLOPs and our peak."""
        rate = self.tokens_per_s or self.tokens / (self.gpu_hours * 3600)
        return rate * TRAINING_FACTOR * forward_flops(self.model, self.sequence_tokens, 1.0) / (
            GPUS[self.gpu].tflops * 1e12
        )  # fmt: skip


SEVEN, THIRTEEN = (32, 4096, 32, 32, 11008, 32000), (40, 5120, 40, 40, 13824, 32000)
RUNS = {
    "Llama 7B": Published(SEVEN, 6_738_415_616, 2048, "a100-80g", 1.0e12, 82_432),
    "Llama 13B": Published(THIRTEEN, 13_015_864_320, 2048, "a100-80g", 1.0e12, 135_168),
    "Llama 65B": Published((80, 8192, 64, 64, 22016, 32000), 65_285_660_672, 2048, "a100-80g", 1.4e12, 1_022_362),
    "Llama 65B, tokens/s": Published(
        (80, 8192, 64, 64, 22016, 32000), 65_285_660_672, 2048, "a100-80g", tokens_per_s=380
    ),
    "Llama 2 7B": Published(SEVEN, 6_738_415_616, 4096, "a100-80g", 2.0e12, 184_320),
    "Llama 2 13B": Published(THIRTEEN, 13_015_864_320, 4096, "a100-80g", 2.0e12, 368_640),
    "Llama 2 70B": Published((80, 8192, 64, 8, 28672, 32000), 68_976_648_192, 4096, "a100-80g", 2.0e12, 1_720_320),
    "Llama 3.1 405B": Published(
        (126, 16384, 128, 8, 53248, 128_256), 405_853_388_800, 8192, "h100-80g", 15.6e12, 30_840_000
    ),
    "TinyLlama 1.1B, tokens/s": Published(
        (22, 2048, 32, 4, 5632, 32000), 1_100_048_384, 2048, "a100-40g", tokens_per_s=24_000
    ),
}


@pytest.mark.parametrize(("name", "run"), RUNS.items(), ids=list(RUNS))
def test_parameters_are_the_published_ones(name: str, run: Published) -> None:
    assert parameter_counts(run.model)["total"] == run.parameters


@pytest.mark.parametrize(("name", "run"), RUNS.items(), ids=list(RUNS))
def test_published_runs_lie_in_the_range_that_a_plan_takes(name: str, run: Published) -> None:
    low, high = UTILISATION
    assert low < run.mfu < high + 0.03


@pytest.mark.parametrize(("name", "run"), RUNS.items(), ids=list(RUNS))
def test_the_docs_say_what_comes_out(name: str, run: Published) -> None:
    """Source, published value, ours at the middle of the range, ratio."""
    assert row(name, run) in (ROOT / "docs" / "clusters.md").read_text()


def row(name: str, run: Published) -> str:
    """The table's line."""
    middle = sum(UTILISATION) / 2
    if run.tokens_per_s:
        published, ours = f"{run.tokens_per_s:,} tokens/s a GPU", run.tokens_per_s * middle / run.mfu
        return f"| {name} | {run.gpu} | {published} | {ours:,.0f} | {middle / run.mfu:.2f} | {run.mfu:.1%} |"
    published, ours = f"{run.gpu_hours:,.0f} GPU-hours", run.gpu_hours * run.mfu / middle
    return f"| {name} | {run.gpu} | {published} | {ours:,.0f} | {run.mfu / middle:.2f} | {run.mfu:.1%} |"


if __name__ == "__main__":
    print("\n".join(row(name, run) for name, run in RUNS.items()))
