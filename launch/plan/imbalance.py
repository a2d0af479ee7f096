"""What ranks lose by waiting for the busiest one: a simulation.

    python -m launch.plan.imbalance configs/skip_1b.yaml                       # a table over ranks and micro-batches
    python -m launch.plan.imbalance configs/skip_1b.yaml --ranks 64 512 --micro-batches 2 8 --site-spread 0.2

Routers decide how much of a window is executed, so windows differ in cost, and with them ranks. Ranks that synchronise
once a step (ZeRO 0 and 1) or after every micro-batch (ZeRO 2, which reduces gradients there) wait for the one whose
windows execute most over all sites. Ranks that synchronise at every layer (ZeRO 3, if nothing is prefetched) wait at
every site of every micro-batch for the one that executes most there. A capacity gives every window the same, larger
amount of work, and no rank waits.

Densities vary from window to window as in a run: normal, clipped to 0 and 1, with one standard deviation for a site and
one for the mean over sites, which a budget keeps small. This estimates ``speed/imbalance`` and
``speed/imbalance_every_layer`` in a run's metrics.

Dimension letters: R ranks, M windows of a micro-batch, S routed sites.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from settings import command_parser, parse_arguments, tables, user_errors

if TYPE_CHECKING:
    from launch.plan.workload import Workload

_NUMBERS = 2_000_000
"""Least number of draws per figure: enough for a stable second decimal."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations of densities from window to window.

    Attributes:
        site: of one site's density.
        mean: of the mean density over all sites.
    """

    site: float = 0.12
    mean: float = 0.018


@dataclass(frozen=True)
class Waiting:
    """Expected densities that set the pace of all ranks.

    Attributes:
        once: mean over sites and windows, of the rank where it is largest.
        every_layer: mean over sites and micro-batches of the largest density among ranks.
    """

    once: float
    every_layer: float


def simulate(
    spread: Spread, density: float, sites: int, ranks: int, micro_batch: int, accumulation: int = 1, seed: int = 0
) -> Waiting:
    """What R ranks wait for, each with ``accumulation`` micro-batches of M windows, at S sites.

    ``density`` is the expected one of every site before densities are clipped to 0 and 1.
    """
    generator = np.random.default_rng(seed)
    steps = -(-_NUMBERS // (ranks * micro_batch * accumulation * sites))
    once, every_layer = 0.0, 0.0
    for _ in range(steps):
        total = np.zeros(ranks)
        for _ in range(accumulation):
            own = generator.normal(0.0, spread.site, (ranks, micro_batch, sites))
            own += generator.normal(0.0, spread.mean, (ranks, micro_batch, 1)) - own.mean(axis=2, keepdims=True)
            executed = np.clip(density + own, 0.0, 1.0).mean(axis=1)  # [R, S]
            total += executed.mean(axis=1)
            every_layer += executed.max(axis=0).mean() / accumulation
        once += total.max() / accumulation
    return Waiting(float(once / steps), float(every_layer / steps))


def slowdowns(workload: Workload, spread: Spread, ranks: int, micro_batch: int, accumulation: int = 1) -> Waiting:
    """The same in FLOPs: those of the rank that all wait for over the mean of all.

    The densities are those of any step of a config whose routers keep their budget.
    """
    from launch.plan.workload import forward_flops

    model, tokens, density = workload.model, workload.config.data.sequence_tokens, workload.density
    waiting = simulate(spread, density, len(model.sites), ranks, micro_batch, accumulation)
    mean = forward_flops(model, tokens, density)
    return Waiting(*(forward_flops(model, tokens, share) / mean for share in (waiting.once, waiting.every_layer)))


def capacity_slowdown(workload: Workload) -> float:
    """FLOPs that a capacity computes, fillers included, over those that the routers choose; no rank waits."""
    from launch.plan.workload import computed_share, forward_flops

    model, tokens = workload.model, workload.config.data.sequence_tokens
    assert model.router is not None
    capped = model.model_copy(update={"router": model.router.model_copy(update={"execution": "capacity"})})
    share = computed_share(capped, tokens, workload.density)
    return forward_flops(model, tokens, share) / forward_flops(model, tokens, workload.density)


def sentence(workload: Workload, ranks: int) -> str:
    """What waiting adds to the compute of a config's step on ``ranks`` GPUs; empty where no rank waits."""
    model, config = workload.model, workload.config
    if ranks == 1 or model.router is None or model.router.kind != "learned" or model.router.execution == "reference":
        return ""
    if workload.shared > 1:  # even with a capacity, of which they have unequal shares
        return "waiting     for the rank that executes most is not estimated where ranks share windows; it adds to this"
    if model.router.execution == "capacity":
        return ""
    micro_batch = config.train.micro_batch_samples
    stage = config.deepspeed.zero_stage
    found = slowdowns(workload, Spread(), ranks, micro_batch, config.accumulation(ranks) if stage < 2 else 1)
    low, high = (found.once, found.every_layer) if stage == 3 else (found.once, found.once)
    cost = f"{low - 1:.0%}" if low == high else f"{low - 1:.0%} to {high - 1:.0%}"
    return f"waiting     {cost} more compute at ZeRO {stage} for the rank that executes most, not in the figures here"


def table(workload: Workload, spread: Spread, ranks: list[int], micro_batches: list[int]) -> str:
    """A row for each number of ranks and micro-batch size, without accumulation."""
    capacity = f"{capacity_slowdown(workload):.2f}"
    rows = [["ranks", "micro-batch", "meet once a step", "meet at every layer", "capacity"]]
    for count in ranks:
        for micro_batch in micro_batches:
            found = slowdowns(workload, spread, count, micro_batch)
            rows.append([f"{count:,}", str(micro_batch), f"{found.once:.2f}", f"{found.every_layer:.2f}", capacity])
    return tables.columns(rows)


def main() -> int:
    """Print the table."""
    arguments = parse_arguments(_parser())
    with user_errors():
        for name in ("site_spread", "mean_spread"):
            value = getattr(arguments, name)
            if not 0 <= value < 0.5:
                raise ValueError(
                    f"--{name.replace('_', '-')} is a standard deviation of densities, from 0 to below 0.5, got "
                    f"{value:g}; leave it out for a measured one"
                )
        for name in ("ranks", "micro_batches"):
            if min(getattr(arguments, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {min(getattr(arguments, name))}")
        from launch.plan.workload import read_workload

        workload = read_workload(arguments.config, arguments.overrides)
        if not workload.model.sites:
            raise ValueError(f"{arguments.config} has no router, so all ranks do the same; give a config that has one")
        spread = Spread(arguments.site_spread, arguments.mean_spread)
        print(
            f"{arguments.config}: forward FLOPs of the slowest rank over the mean of all; densities around "
            f"{workload.density:g} vary from window to window by {spread.site:g} at a site, {spread.mean:g} over all\n"
        )
        print(table(workload, spread, arguments.ranks, arguments.micro_batches))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("launch.plan.imbalance", __doc__)
    parser.add_argument("config", help="YAML file of either stage, with a router")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single fields")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 1024], metavar="N", help="GPUs (64 1024)")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=[1, 4, 16], metavar="M", help="windows of each (1 4 16)"
    )
    parser.add_argument(
        "--site-spread", type=float, default=Spread.site, help="deviation of a site's density between windows (0.12)"
    )
    parser.add_argument(
        "--mean-spread", type=float, default=Spread.mean, help="the same of the mean over sites (0.018)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
