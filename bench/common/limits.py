"""The ratios that the project promises, and how ``--check`` judges them.

One table for all benchmarks: what is promised at the default sizes of each kind of device (``options.py``). The values
judged are medians of ratios within rounds, so both sides of a ratio come from one run on one machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limit:
    """One promise.

    Attributes:
        meaning: what is measured, in words.
        cpu: the limit on a CPU, a ratio.
        cuda: the limit on a CUDA device, a ratio.
        sense: whether the limit is an upper or a lower bound.
    """

    meaning: str
    cpu: float
    cuda: float
    sense: Literal["at most", "at least"] = "at most"


DECODE_BATCHES = (1, 2, 4, 8, 16, 64)
"""The batch sizes at which ``bench.decode`` is judged, and its default."""

LIMITS: dict[str, Limit] = {
    "step/routed_1": Limit("routed step at density 1 / dense step", cpu=1.02, cuda=1.08),
    "step/routed_0.5": Limit("routed step at density 0.5 / dense step", cpu=0.58, cuda=0.62),
    "step/routed_0.25": Limit("routed step at density 0.25 / dense step", cpu=0.36, cuda=0.45),
    "step/dense_to_peer": Limit("dense step / Hugging Face Llama's step", cpu=0.95, cuda=0.80),
    "step/dense_mfu": Limit("MFU of the dense step, of the measured matmul peak", 0.60, 0.50, "at least"),
    "step/memory_routed_0.5": Limit("peak memory of a step, routed at density 0.5 / dense", cpu=0.75, cuda=0.75),
    **{
        f"decode/batch_{batch}/routed_1": Limit(f"decoding at batch {batch}, routed at density 1 / dense", 1.02, 1.02)
        for batch in DECODE_BATCHES
    },
    **{
        f"decode/batch_{batch}/routed_0.5": Limit(f"decoding at batch {batch}, routed at density 0.5 / dense", 1.0, 1.0)
        for batch in DECODE_BATCHES
    },
    "decode/batch_1/routed_0.5": Limit("decoding at batch 1, routed at density 0.5 / dense", cpu=0.65, cuda=0.75),
    "attention/512/gathered_0.5": Limit("attention of half the queries / all of 512, masked", cpu=0.60, cuda=1.00),
    "attention/2048/gathered_0.5": Limit("attention of half the queries / all of 2048, masked", cpu=0.50, cuda=1.00),
    "loop/dense": Limit("tokens a second of our dense loop / transformers.Trainer's", 1.1, 1.1, "at least"),
    "loop/routed_0.5": Limit("of our loop routed at density 0.5 / transformers.Trainer's", 1.6, 1.6, "at least"),
    "evaluation/choices": Limit("our speed on choices / the harness's own loader's", 1.0, 1.0, "at least"),
    "evaluation/yes_or_no": Limit("our speed on yes or no / the harness's own loader's", 1.0, 1.0, "at least"),
    "tuning/lora": Limit("our LoRA step / PEFT's on Hugging Face's Llama", 1.0, 1.0),
    "tuning/dora": Limit("our DoRA step / PEFT's on Hugging Face's Llama", 1.0, 1.0),
    "loader/waited_share": Limit("share of a step spent waiting for data", cpu=0.01, cuda=0.01),
}


@dataclass(frozen=True)
class Verdict:
    """A measured value and its limit on the device where it was measured."""

    metric: str
    value: float
    limit: float
    sense: Literal["at most", "at least"]

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.value <= self.limit if self.sense == "at most" else self.value >= self.limit

    def __str__(self) -> str:
        return (
            f"{'ok' if self.holds else 'MISSED':6} {self.metric:26} {self.value:.4g}, {self.sense} {self.limit:g}: "
            f"{LIMITS[self.metric].meaning}"
        )


def judge(measured: Mapping[str, float], device: str) -> list[Verdict]:
    """A verdict for every measured metric that has a limit; nothing is promised for the others.

    Args:
        measured: values by metric.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    return [
        Verdict(metric, measured[metric], getattr(limit, kind), limit.sense)
        for metric, limit in LIMITS.items()
        if metric in measured
    ]


def require(verdicts: list[Verdict]) -> None:
    """Pass only if something was judged and all of it holds.

    Raises:
        ValueError: naming every missed limit.
    """
    if not verdicts:
        raise ValueError(
            "--check has nothing to check: nothing with a limit in bench/common/limits.py was measured; keep the "
            "default densities and batches"
        )
    missed = [f"{v.metric} is {v.value:.4g} ({v.sense} {v.limit:g})" for v in verdicts if not v.holds]
    if missed:
        raise ValueError(f"{len(missed)} of {len(verdicts)} limits missed: {'; '.join(missed)}")
