"""Time whole training loops: ours, dense and routed, and ``transformers.Trainer`` with its DeepSpeed integration.

    python -m bench.loop                                   # two ranks of one thread each on a CPU: 22M parameters
    python -m bench.loop --steps 10 --repeats 5 --json loop.json
    python -m bench.loop --check                           # exit 1 if a limit of bench/common/limits.py is missed

Every contestant is what a user would start: the ``deepspeed`` launcher, ranks, ZeRO 2, AdamW and gradient clipping, on
the same windows of the same token files in the same order, logging metrics every --steps / 2 steps, also to
TensorBoard, with a checkpoint (weights and optimiser, the last two kept) in the middle of every turn. The learning rate
is constant and nothing is evaluated. The peer is Hugging Face's Llama of the same sizes. It starts from our dense
model's weights, and before anything is timed, its mean loss and gradient norm over the first steps must equal ours.
Routed contestants have a learned router as in the shipped configs, without and with exploration; untrained, it executes
about half of the tokens.

All contestants are started, but only one at a time takes steps (``bench/common/turns.py``): --steps per round. A turn
is timed from its first step until the last rank reaches the next one, so it includes data, logging and saving; for
ours, background writes too. Start-up is excluded and reported separately.

Columns as in ``bench.step``, per step; ``GiB`` is the peak memory of a rank: on a CPU, of its whole process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bench.common.options import (
    BATCH,
    CPU_BATCH,
    CPU_SIZES,
    CUDA_BATCH,
    CUDA_SIZES,
    DENSE,
    MODEL,
    add_densities,
    add_numbers,
    add_run,
    model_config,
    parser,
    refuse,
    resolve,
    routed_name,
)
from bench.common.report import Result, Row, spread, tell
from bench.common.timing import Spread, ratios
from bench.common.turns import Turns
from bench.loader import write_shards
from bench.loop import OURS, PEER, WINDOWS
from data.config import DataConfig
from data.files import write_atomically
from model.config import RouterConfig
from settings import path_argument, to_yaml, user_errors
from trainer.config import PretrainConfig
from trainer.local_ranks import deepspeed_launcher, environment_alone, free_port, visible_gpus

if TYPE_CHECKING:
    import torch

SECONDS = "step_s"
DATA_TOKENS = 2_000_000
LEARNING_RATE = 3e-4
LEAST_VOCAB = 300
"""The smallest that a run's config allows."""
RANKS = {"ranks": "processes of each contestant", "micro_samples": "samples in one forward pass of one rank"}


@dataclass
class Rounds:
    """Measurements of one contestant.

    Attributes:
        startup_s: from its command to its first step.
        first: rank 0's report of the unmeasured turn.
        seconds: per step, for each turn.
        steps_s: of rank 0's steps, for each turn.
        reports: of rank 0, for each turn.
        peak_bytes: of the rank that used most.
    """

    startup_s: float
    first: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    steps_s: list[list[float]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int = 0

    def total(self, name: str) -> float:
        """Sum of a figure over the turns."""
        return float(sum(report[name] for report in self.reports))


def name_of(density: float, explore: float) -> str:
    """Name of a routed contestant."""
    return routed_name(density) + (f"_explore_{explore:g}" if explore else "")


def run_config(options: argparse.Namespace, density: float | None, explore: float, data: DataConfig) -> PretrainConfig:
    """A contestant's run; dense where ``density`` is None."""
    model = model_config(options, density, options.tokens)
    if model.router is not None:
        router = {**model.router.model_dump(), "explore": explore, "budget": {"controller": "adaptive"}}
        model = model.model_copy(update={"router": RouterConfig.model_validate(router)})
    return PretrainConfig.model_validate(
        {
            "model": model.model_dump(),
            "data": {**data.model_dump(), "tokenizer": {"vocab_size": options.vocab}},
            "train": {
                "steps": all_steps(options),
                "global_batch_samples": options.samples,
                "micro_batch_samples": options.micro_samples,
                "precision": options.dtype,
                "optimizer": {"lr": LEARNING_RATE},
                "schedule": {"kind": "constant"},
                # Waiting for a turn must not count as a hang.
                "timeout_s": 14_400,
                "stall_timeout_s": 7_200,
                "evaluation": {"every_steps": 10**9},
                "checkpoint": {"every_steps": options.steps},
                "log": {"every_steps": warm_up(options)},
            },
            "deepspeed": {"zero_stage": 2},
        }
    )


def warm_up(options: argparse.Namespace) -> int:
    """Steps of the unmeasured turn: half a turn, so that checkpoints fall into the middle of the others."""
    return int(options.steps // 2)


def all_steps(options: argparse.Namespace) -> int:
    """Steps of the run, including the one before which the last turn ends."""
    return int(warm_up(options) + options.repeats * options.steps + 1)


def configs(options: argparse.Namespace, data: DataConfig) -> dict[str, PretrainConfig]:
    """Every contestant's run, dense first."""
    dense = run_config(options, None, 0.0, data)
    found = {DENSE: dense, PEER: dense}
    pairs = [(density, explore) for density in options.densities for explore in options.explore]
    return found | {name_of(*pair): run_config(options, *pair, data) for pair in pairs}


def command(folder: Path, name: str, config: PretrainConfig, port: int, options: argparse.Namespace) -> list[str]:
    """Command that starts a contestant; writes its config to ``folder``."""
    run = config.train.model_copy(update={"run_dir": str(folder / name)})
    path = folder / f"{name}.yaml"
    write_atomically(path, to_yaml(config.model_copy(update={"train": run})).encode())
    kind = PEER if name == PEER else OURS
    gpus = None if options.device == "cpu" else visible_gpus(options.ranks)
    launcher = deepspeed_launcher(options.ranks, free_port(), gpus)
    return [*launcher, "--module", "bench.loop.ranks", kind, str(path), name, str(port)]


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Environment of a contestant: the cores divided among its ranks."""
    own = environment_alone(max((os.cpu_count() or 1) // options.ranks, 1))
    return own | ({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})


def measure(options: argparse.Namespace) -> Result:
    """Write the data, start all contestants, compare the dense ones, give turns."""
    import torch

    from bench.loop.contestants import write_windows
    from data.batches import TrainingData
    from trainer.monitor.peak_flops import DTYPES, PeakFlops

    fastest = PeakFlops(torch.device(options.device), DTYPES[options.dtype])
    with tempfile.TemporaryDirectory(dir=options.disk) as place, Turns() as turns:
        folder = Path(place)
        (folder / "data").mkdir()
        data = write_shards(folder / "data", options.vocab, DATA_TOKENS, options.tokens)
        write_windows(TrainingData(data), all_steps(options) * options.samples, folder / "data" / WINDOWS)
        found: dict[str, Rounds] = {}
        bar = tqdm(unit="turn", disable=not sys.stderr.isatty())
        for name, config in configs(options, data).items():
            bar.set_postfix_str(f"starting {name}")
            start = command(folder, name, config, turns.port, options)
            startup_s, _ = turns.start(name, start, environment(options), options.ranks, folder / f"{name}.log")
            found[name] = Rounds(startup_s)
        for name, rounds in found.items():
            rounds.first = turns.give(name, warm_up(options))[1][0]
        compare(found[DENSE].first, found[PEER].first, DTYPES[options.dtype])
        for _ in range(options.repeats):
            fastest()
            for name, rounds in found.items():
                bar.set_postfix_str(name)
                take(rounds, *turns.give(name, options.steps), options.steps)
                bar.update()
        bar.close()
        turns.end()
    # On a CPU the fastest product uses all cores, which the ranks share; a GPU belongs to one rank.
    devices = 1 if options.device == "cpu" else options.ranks
    return result(found, options, fastest.flops_per_s * devices)


def compare(ours: Mapping[str, float], peers: Mapping[str, float], dtype: torch.dtype) -> None:
    """Both dense models must have learned the same in the unmeasured turn."""
    from bench.common.contestants import assert_same

    for name in ("loss", "grad_norm"):
        assert_same(ours[name], peers[name], dtype)


def take(rounds: Rounds, elapsed_s: float, reports: list[dict[str, Any]], steps: int) -> None:
    """Record a turn of ``steps`` steps."""
    rounds.seconds.append(elapsed_s / steps)
    rounds.steps_s.append(reports[0]["steps_s"])
    rounds.reports.append(reports[0])
    rounds.peak_bytes = max(report["peak_bytes"] for report in reports)


def result(found: Mapping[str, Rounds], options: argparse.Namespace, peak: float) -> Result:
    """Rows, and what saving and starting cost."""
    rows = [row(name, found, options, peak) for name in found]
    faster = {name: ratios(found[PEER].seconds, rounds.seconds) for name, rounds in found.items() if name != PEER}
    per_step = {name: options.samples * options.tokens / Spread.of(r.seconds).median for name, r in found.items()}
    alone_s = {name: without_saving(rounds, options) for name, rounds in found.items()}
    findings = [f"tokens a second, of {PEER}'s (quartiles), and what a checkpoint costs in seconds of training:"]
    for name, rounds in found.items():
        saving_s = options.steps * (Spread.of(rounds.seconds).median - alone_s[name])
        findings.append(
            f"  {name:24} {per_step[name]:8,.0f}  {spread(faster.get(name)):>23}, without saving "
            f"{alone_s[PEER] / alone_s[name]:.3f}; a checkpoint and the logs {saving_s:.2f} s, "
            f"start-up {rounds.startup_s:.1f} s"
        )
    loss = {name: rounds.first["loss"] for name, rounds in found.items()}
    findings.append(f"mean loss of the first {warm_up(options)} steps: {loss[DENSE]:.6f} and, {PEER}, {loss[PEER]:.6f}")
    measured = {f"loop/{name}": ratio.median for name, ratio in faster.items()}
    return Result(rows=rows, peak=peak, measured=measured, findings=findings)


def without_saving(rounds: Rounds, options: argparse.Namespace) -> float:
    """Seconds of a step before its turn's checkpoint, median over all."""
    before = options.steps - warm_up(options) - 1
    return statistics.median(second for steps_s in rounds.steps_s for second in steps_s[: max(before, 1)])


def row(name: str, found: Mapping[str, Rounds], options: argparse.Namespace, peak: float) -> Row:
    """A contestant's row; the peer executes what our dense model does."""
    rounds, counted = found[name], found[DENSE if name == PEER else name]
    step_s = Spread.of(rounds.seconds).median
    executed = counted.total("executed_flops") / (options.steps * len(rounds.seconds))
    return Row(
        name=name,
        density=counted.total("density") / len(counted.reports),
        device=options.device,
        dtype=options.dtype,
        tokens=options.samples * options.tokens,
        seconds=step_s,
        to_dense=ratios(rounds.seconds, found[DENSE].seconds),
        flop_bound_ratio=counted.total("executed_flops") / counted.total("dense_flops"),
        mfu_executed=executed / step_s / peak,
        peak_memory_bytes=rounds.peak_bytes,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options, with the device's defaults filled in."""
    options_parser = parser("bench.loop", __doc__)
    add_numbers(options_parser, MODEL | BATCH | RANKS)
    add_densities(options_parser, default=(0.5,))
    options_parser.add_argument(
        "--explore",
        type=float,
        nargs="*",
        default=[0.0, 0.1],
        help="the router's setting of that name: shares of skipped tokens, 0 to 1 (default: %(default)s)",
    )
    options_parser.add_argument("--steps", type=int, default=6, help="steps a turn (default: %(default)s)")
    options_parser.add_argument(
        "--disk",
        type=path_argument,
        default=Path(),
        help="folder to write data and checkpoints below (default: the current)",
    )
    add_run(options_parser, repeats=3)
    options = options_parser.parse_args(arguments)
    import torch

    devices = max(torch.cuda.device_count(), 1)
    resolve(
        options,
        cpu=CPU_SIZES | CPU_BATCH | {"ranks": 2, "micro_samples": 2},
        cuda=CUDA_SIZES | CUDA_BATCH | {"ranks": devices, "micro_samples": CUDA_BATCH["samples"] // devices},
    )
    refuse(options, {"tokens": 2, "samples": 1, "steps": 2, "vocab": LEAST_VOCAB, "ranks": 1, "micro_samples": 1})
    refuse_contestants(options)
    return options


def refuse_contestants(options: argparse.Namespace) -> None:
    """Refuse what the ranks could not run.

    Raises:
        ValueError: one sentence.
    """
    model_config(options, None, options.tokens)
    one_pass = options.micro_samples * options.ranks
    if options.samples % one_pass:
        raise ValueError(
            f"--samples ({options.samples}) must be divisible by --micro-samples x --ranks ({options.micro_samples} x "
            f"{options.ranks} = {one_pass}); change one of them"
        )
    if len(set(options.explore)) < len(options.explore):
        raise ValueError(f"--explore must differ from each other, got {options.explore}")
    for explore in options.explore:
        if not 0 <= explore <= 1:
            raise ValueError(f"--explore must lie between 0 and 1, got {explore:g}")
    if not options.disk.is_dir():
        raise ValueError(f"--disk {options.disk} is not a folder; create it first")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write, and judge if asked to."""
    with user_errors():
        options = parse(arguments)
        tell(options, measure(options), [*MODEL, *BATCH, *RANKS, "steps"], SECONDS)


if __name__ == "__main__":
    main()
