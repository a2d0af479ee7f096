"""What a run will take before it is started: memory, FLOPs, days, disk, and where more GPUs stop paying.

    python -m launch.plan configs/skip_1b.yaml --gpus 64 --gpu h100-80g
    python -m launch.plan configs/skip_1b.yaml train.micro_batch_samples=8 --gpus 512 --gpu a100-80g --network-gbps 800
    python -m launch.plan configs/skip_160m.yaml --gpus 8 --gpu rtx4090-24g --mfu 0.31 --disk-gbs 0.5

Nothing is run and no GPU is needed. Memory is counted from what DeepSpeed and autograd keep
(``launch/plan/memory_model.py``), time from executed FLOPs and a range of MFU (``launch/plan/communication.py``).
``--mfu`` takes the ``speed/mfu_executed`` of a short run of yours, which is worth more than any range.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from launch.plan import communication
from launch.plan.communication import Cluster, Step, expected_mfu, ladder, volume
from launch.plan.data import data_lines
from launch.plan.goodput import NODE_MTBF_DAYS, RESTART_S, Failures, interval_s, save_s
from launch.plan.gpus import GPUS
from launch.plan.imbalance import sentence
from launch.plan.memory_model import GIB, Memory, activation_bytes, checkpoint_bytes, memory
from launch.plan.workload import Workload, read_workload
from settings import (
    command_parser,
    counted,
    parse_arguments,
    positive_number,
    tables,
    user_errors,
    whole_number,
)
from settings.words import duration
from trainer.checkpoints.retention import most_at_once

LARGEST = 8192
"""GPUs up to which the scaling table goes."""
_MUCH = 0.2  # share of communication above which the table says so


def main() -> int:
    """Print the plan."""
    arguments = parse_arguments(_parser())
    with user_errors():
        workload = read_workload(arguments.config, arguments.overrides)
        print(describe(workload, arguments))
    return 0


def describe(workload: Workload, arguments: argparse.Namespace) -> str:
    """The whole report.

    Raises:
        ValueError: if the global batch does not divide over the GPUs.
    """
    workload.config.accumulation(arguments.gpus)
    gpu = GPUS[arguments.gpu]
    per_node = arguments.gpus_per_node
    network = arguments.network_gbps or gpu.network_gbps * per_node
    cluster = Cluster(gpu, per_node, network)
    mfu = (arguments.mfu, arguments.mfu) if arguments.mfu else expected_mfu(workload)
    parts = [
        _what(workload, arguments),
        _memory(workload, arguments),
        _sharing(workload, arguments, cluster),
        _time(workload, arguments, cluster, mfu) + f"\n{sentence(workload, arguments.gpus)}".rstrip(),
        _communication(workload, arguments.gpus, cluster),
        _scaling(workload, arguments.gpus, cluster, sum(mfu) / 2),
    ]
    return "\n\n".join(part for part in parts if part)


def _what(workload: Workload, arguments: argparse.Namespace) -> str:
    config, weights = workload.config, workload.weights
    train, dense = config.train, workload.dense_flops_per_token()
    nodes = -(-arguments.gpus // arguments.gpus_per_node)
    accumulation = config.accumulation(arguments.gpus)
    whose = "a GPU" if workload.shared == 1 else f"for {workload.shared} GPUs that share them"
    lines = [
        f"{arguments.config} on {arguments.gpus} x {arguments.gpu} ({counted(nodes, 'node')})",
        "",
        f"parameters  {weights.total:,}"
        + (f", of which {weights.trained:,} trained" if weights.trained < weights.total else "")
        + (f"; {workload.active_parameters:,} active at density {workload.density:g}" if workload.model.sites else ""),
        f"batch       {workload.tokens_per_step:,} tokens a step: {train.global_batch_samples:,} windows of "
        f"{config.data.sequence_tokens:,}; {counted(accumulation, 'micro-batch', 'micro-batches')} of "
        f"{train.micro_batch_samples} {whose}; {train.precision}, ZeRO {config.deepspeed.zero_stage}",
        f"FLOPs       {_flops(workload.flops_per_token())} a token, forward and backward"
        + (f"; without routers {_flops(dense)}" if workload.model.sites else ""),
    ]
    if weights.trained < weights.total:
        lines.append("            (memory below does not subtract the activations that frozen weights save)")
    return "\n".join([*lines, *data_lines(config)])


_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "master weights, moments": "optimizer",
    "buckets, gathered layers": "buffers",
    "activations": "activations",
    "logits, one layer's backward": "working",
    "instead: fp32 gradients *": "update",
    "CUDA and libraries (estimate)": "context",
    "peak": "peak",
}


def _memory(workload: Workload, arguments: argparse.Namespace) -> str:
    """One column a stage, the config's marked; and what checkpointing and density change."""
    gpu, ranks, config = GPUS[arguments.gpu], arguments.gpus, workload.config
    own, recompute = config.deepspeed.zero_stage, config.train.activation_checkpointing
    columns: list[Memory] = [memory(workload, stage, ranks) for stage in workload.stages]
    table = [["", *(f"ZeRO {stage}{' <' if stage == own else ''}" for stage in workload.stages)]]
    table += [[label, *(_gib(getattr(m, part)) for m in columns)] for label, part in _ROWS.items()]
    table.append(["fits", *("yes" if m.fits(gpu.memory_gib) else "no" for m in columns)])
    if config.deepspeed.offload != "none":
        table.append(["host memory, offloaded", *(_gib(m.host) for m in columns)])
    other = [memory(workload, stage, ranks, checkpointing=not recompute) for stage in workload.stages]
    table.append([f"peak {'without' if recompute else 'with'} checkpointing", *(_gib(m.peak) for m in other)])
    table.append(["fits", *("yes" if m.fits(gpu.memory_gib) else "no" for m in other)])
    lines = [
        f"peak memory of a GPU, GiB of {gpu.memory_gib:g}; checkpointing {'on' if recompute else 'off'}, as in the "
        "config",
        tables.columns(table),
        "* in the optimiser's step, when activations are gone: the peak has the larger of the two",
    ]
    if workload.model.sites:
        all_run = activation_bytes(workload, density=1.0)
        lines.append(
            f"activations are {_gib(all_run)} GiB if every token runs every layer; an untrained router runs about half"
        )
    return "\n".join(lines)


def _sharing(workload: Workload, arguments: argparse.Namespace, cluster: Cluster) -> str:
    """How many ranks must share a window for it to fit; nothing where none need to."""
    config, gpus, gpu = workload.config, arguments.gpus, GPUS[arguments.gpu]
    stage, recompute = config.deepspeed.zero_stage, config.train.activation_checkpointing
    if workload.shared == 1 and memory(workload, stage, gpus).fits(gpu.memory_gib):
        return ""
    table = [
        [
            "sequence_parallel",
            "peak, GiB",
            "fits",
            f"GiB {'without' if recompute else 'with'} checkpointing",
            "fits",
            "keys and values, s a step",
        ]
    ]
    shared = 1
    while shared <= gpus:
        other = workload.sharing(shared)
        if gpus % shared == 0 and not config.data.sequence_tokens % (2 * shared):
            held = [memory(other, stage, gpus, checkpointing=on) for on in (recompute, not recompute)]
            try:
                moved = communication.sequence_volume(other, other.config.accumulation(gpus))
                seconds = f"{communication.communication_s(moved, shared, cluster):.3g}"
            except ValueError:  # the global batch does not divide
                seconds = ""
            cells = [text for m in held for text in (_gib(m.peak), "yes" if m.fits(gpu.memory_gib) else "no")]
            table.append([f"{shared}{' <' if shared == workload.shared else ''}", *cells, seconds])
        shared *= 2
    head = (
        f"ranks that share a window of {config.data.sequence_tokens:,} tokens, at ZeRO {stage} and the same global "
        "batch: twice as many take twice the micro-batches"
    )
    return "\n".join([head, tables.columns(table)])


def _time(workload: Workload, arguments: argparse.Namespace, cluster: Cluster, mfu: tuple[float, float]) -> str:
    """Throughput and days between the low and the high MFU; the checkpoints."""
    config, stage = workload.config, workload.config.deepspeed.zero_stage
    slow, fast = (communication.step(workload, stage, arguments.gpus, cluster, share) for share in mfu)
    rates = [workload.tokens_per_step / seconds for seconds in (slow.worst_s, fast.best_s)]
    least_s, most_s = (workload.total_tokens / rate for rate in rates[::-1])
    gpu_hours = [arguments.gpus * seconds / 3600 for seconds in (least_s, most_s)]
    origin = "as given" if arguments.mfu else "from published dense bf16 runs, none of this code; measure yours: --mfu"
    size, keep = checkpoint_bytes(workload, stage), most_at_once(config.train) - 1
    host_bound = fast.host_s >= fast.compute_s
    return "\n".join(
        [
            f"MFU         {_range(mfu, '.0%')} on executed FLOPs ({origin})",
            f"speed       {_range(rates, ',.0f')} tokens/s, communication included; a step takes "
            f"{_range((fast.best_s, slow.worst_s), '.3g')} s",
            f"host        launches a step's work in {slow.host_s:.3g} s"
            + (", longer than the GPU takes for it at best: use larger micro-batches" if host_bound else ""),
            f"run         {config.train.steps:,} steps, {workload.total_tokens:,} tokens: "
            f"{' to '.join(dict.fromkeys((duration(least_s), duration(most_s))))}, "
            f"{_range(gpu_hours, ',.0f' if gpu_hours[0] >= 10 else '.2g')} GPU-hours, "
            "saving and evaluation not included",
            f"checkpoint  {size / 1e9:,.3g} GB, written in {size / 1e9 / arguments.disk_gbs:,.2g} s at "
            f"{arguments.disk_gbs:g} GB/s every {config.train.checkpoint.every_steps:,} steps; {keep} kept and one "
            f"being written take {(keep + 1) * size / 1e9:,.3g} GB",
            *_failures(workload, arguments, (fast.best_s + slow.worst_s) / 2),
        ]
    )


def _failures(workload: Workload, arguments: argparse.Namespace, step_s: float) -> list[str]:
    """What failures and saving cost as the config saves, and at best."""
    nodes = -(-arguments.gpus // arguments.gpus_per_node)
    stall_s, write_s = save_s(workload, arguments.gpus, arguments.disk_gbs)
    if arguments.save_stall_s is not None:
        stall_s = arguments.save_stall_s
    failures = Failures(arguments.node_mtbf_days * 86_400 / nodes, arguments.restart_s, stall_s, write_s)
    own_s, best_s = interval_s(workload, step_s), max(failures.best_interval_s, write_s, step_s)
    return [
        f"failures    one every {duration(failures.between_s)} if a node fails every {arguments.node_mtbf_days:g} "
        f"days, {arguments.restart_s:g} s to the next step: --node-mtbf-days, --restart-s",
        f"            saving every {duration(own_s)}, for which training waits {stall_s:.2g} s, "
        f"{failures.lost(own_s):.2%} of the time is lost;",
        f"            the least is {failures.lost(best_s):.2%}, saving every {best_s / step_s:,.0f} steps: "
        f"train.checkpoint.every_minutes={max(best_s / 60, 0.1):.2g}",
    ]


def _communication(workload: Workload, gpus: int, cluster: Cluster) -> str:
    """What a GPU sends in a step at each stage, and how long that takes by itself."""
    config = workload.config
    accumulation = config.accumulation(gpus)
    table = [["ZeRO", "sent, GB", "all-reduce", "all-gather", "reduce-scatter", "alone, s"]]
    for stage in workload.stages:
        moved = volume(workload, stage, accumulation)
        gigabytes = (moved.sent_bytes(gpus), moved.all_reduce, moved.all_gather, moved.reduce_scatter)
        mark = " <" if stage == config.deepspeed.zero_stage else ""
        alone = communication.communication_s(moved, gpus, cluster)
        table.append([f"{stage}{mark}", *(f"{g / 1e9:,.3g}" for g in gigabytes), f"{alone:.3g}"])
    return "\n".join(
        [
            f"communication of a GPU in a step; {cluster.gpu.link_gbs:g} GB/s within a node of "
            f"{cluster.gpus_per_node}, {cluster.network_gbps:g} Gbit/s a node between them",
            tables.columns(table),
        ]
    )


def _scaling(workload: Workload, gpus: int, cluster: Cluster, mfu: float) -> str:
    """The same global batch on more and more GPUs."""
    stage = workload.config.deepspeed.zero_stage
    counts = ladder(gpus, cluster.gpus_per_node, max(LARGEST, gpus))
    steps = [communication.step(workload, stage, count, cluster, mfu) for count in counts]
    table = [["GPUs", "compute, s", "host, s", "communication, s", "million tokens/s", "efficiency", "GiB a GPU", ""]]
    for s in steps:
        mark = " <" if s.gpus == gpus else ""
        if s.problem:
            continue
        rates = _range([workload.tokens_per_step / seconds / 1e6 for seconds in (s.worst_s, s.best_s)], ",.3g")
        assert s.memory is not None
        note = "" if s.memory.fits(cluster.gpu.memory_gib) else "does not fit"
        cells = [
            f"{s.compute_s:.3g}",
            f"{s.host_s:.3g}",
            f"{s.communication_s:.3g}",
            rates,
            _range(s.efficiency, ".0%"),
        ]
        table.append([f"{s.gpus:,}{mark}", *cells, _gib(s.memory.peak), note])
    overlap = "from no overlap of compute and communication to all of it" if stage == 3 else "no overlap"
    head = f"scaling of this global batch at MFU {mfu:.0%} and ZeRO {stage}; {overlap}"
    lines = [head, tables.columns(table), *_limits(workload, steps)]
    return "\n".join(lines)


def _limits(workload: Workload, steps: Sequence[Step]) -> list[str]:
    """Where the table above stops paying, and where it stops."""
    train, lines = workload.config.train, []
    poor = [s for s in steps if not s.problem and s.communication_s > _MUCH * s.worst_s]
    if poor:
        lines.append(
            f"from {poor[0].gpus:,} GPUs on communication can take more than {_MUCH:.0%} of the time; larger "
            "micro-batches at ZeRO 2 and 3, a lower ZeRO stage, or a larger global batch moves that"
        )
    impossible = [s for s in steps if s.problem]
    if impossible:
        counts = ", ".join(f"{s.gpus:,}" for s in impossible)
        lines.append(
            f"{counts} GPUs: {train.global_batch_samples:,} windows do not divide into micro-batches of "
            f"{train.micro_batch_samples} over them; {workload.most_ranks:,} GPUs is the most, with one micro-batch "
            "each" + (f" for {workload.shared} that share it" if workload.shared > 1 else "")
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("launch.plan", __doc__)
    parser.add_argument("config", help="YAML of a run of either stage, for example configs/skip_1b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--gpus", type=whole_number(), required=True, help="GPUs of the whole run")
    parser.add_argument("--gpu", required=True, choices=sorted(GPUS), help="kind of GPU, from launch/plan/gpus.py")
    parser.add_argument("--gpus-per-node", type=whole_number(), default=8, help="GPUs in a node (default 8)")
    parser.add_argument(
        "--network-gbps",
        type=positive_number(),
        help="network of a node, Gbit/s in one direction; the vendor's reference system's",
    )
    parser.add_argument(
        "--mfu", type=positive_number(1), help="speed/mfu_executed of a run of yours, at most 1 (default: a range)"
    )
    parser.add_argument(
        "--node-mtbf-days",
        type=positive_number(),
        default=NODE_MTBF_DAYS,
        help=f"days between failures of a node (default {NODE_MTBF_DAYS:g}, Llama 3's)",
    )
    parser.add_argument(
        "--restart-s",
        type=positive_number(),
        default=RESTART_S,
        help=f"seconds to the next step (default {RESTART_S:g})",
    )
    parser.add_argument(
        "--save-stall-s",
        type=positive_number(),
        help="seconds that training waits at a save, as a run's log says; estimated else",
    )
    parser.add_argument(
        "--disk-gbs", type=positive_number(), default=1.0, help="write speed of the run folder, GB/s (default 1)"
    )
    return parser


def _gib(count: float) -> str:
    gib = count / GIB
    return "<0.01" if 0 < gib < 0.005 else f"{gib:,.2f}"


def _flops(number: float) -> str:
    return f"{number / 1e9:,.3g} GFLOPs" if number >= 1e8 else f"{number / 1e6:,.3g} MFLOPs"


def _range(ends: Sequence[float], form: str) -> str:
    first, last = (format(end, form) for end in ends)
    return first if first == last else f"{first} to {last}"


if __name__ == "__main__":
    raise SystemExit(main())
