"""What failures cost a run: time lost to them and to saving, and the interval between saves that minimises it.

To first order in the interval over the time between failures, as in Young 1974 (Communications of the ACM 17(9)): a
failure costs the time to the next step, half an interval, and the time in which a checkpoint is still being written in
the background and cannot be used. The best interval is Daly's (2006, Future Generation Computer Systems 22(3), eq. 37).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launch.plan.memory_model import checkpoint_bytes
from launch.plan.workload import Workload
from trainer.config import WEIGHT_BYTES

NODE_MTBF_DAYS = 264.0
"""Days between failures of a node of 8 GPUs: Llama 3 had 419 unexpected interruptions in 54 days on 2,048 of them
(Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.4)."""
RESTART_S = 240.0
"""Assumed from a failure to the next step if the job keeps its nodes; a requeued one waits in the queue, too."""
COPY_GBS = 10.0
"""Assumed speed of copying a GPU's state to host memory, which training waits for, GB/s."""


@dataclass(frozen=True)
class Failures:
    """Times of failures and saves in a run, in seconds.

    Attributes:
        between_s: mean time between failures of any of its nodes.
        restart_s: from a failure to the next step.
        stall_s: for which training waits at a save.
        write_s: for which a checkpoint is written in the background.
    """

    between_s: float
    restart_s: float
    stall_s: float
    write_s: float = 0.0

    def lost(self, interval_s: float) -> float:
        """Share of the time that is lost with a save every ``interval_s``; capped at 1: no progress."""
        redone_s = interval_s / 2 + self.write_s
        return min(1.0, self.stall_s / interval_s + (redone_s + self.restart_s) / self.between_s)

    @property
    def best_interval_s(self) -> float:
        """The interval that loses least time."""
        ratio = self.stall_s / (2 * self.between_s)
        if ratio >= 1:
            return self.between_s
        first_order = math.sqrt(2 * self.stall_s * self.between_s)
        return first_order * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.stall_s


def save_s(workload: Workload, gpus: int, disk_gbs: float) -> tuple[float, float]:
    """Seconds that training waits at a save, and seconds of writing in the background.

    The rank with the most to copy decides: at stages 0 to 2 rank 0 saves the weights, at stage 0 everything.
    """
    config, stage = workload.config, workload.config.deepspeed.zero_stage
    size = checkpoint_bytes(workload, stage)
    write_s = size / 1e9 / disk_gbs
    if not config.train.checkpoint.background:
        return write_s, 0.0
    whole = {0: size, 3: 0.0}.get(stage, WEIGHT_BYTES[config.train.precision] * float(workload.weights.total))
    return (whole + (size - whole) / gpus) / 1e9 / COPY_GBS, write_s


def interval_s(workload: Workload, step_s: float) -> float:
    """Seconds between two saves of the config, by steps or by minutes, whichever comes first."""
    config = workload.config.train.checkpoint
    by_steps = config.every_steps * step_s
    return by_steps if config.every_minutes is None else min(by_steps, 60 * config.every_minutes)
