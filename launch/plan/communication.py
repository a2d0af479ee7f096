"""Communication among ranks in one optimiser step: its volume, its time, and where more GPUs stop paying off.

Volumes are those of DeepSpeed 0.19 as ``trainer/deepspeed_config.py`` sets it up; a test counts them on a real engine.
Per step, with P trained parameters in the step's dtype and A micro-batches a rank:

    stage   all-reduce   all-gather      reduce-scatter   overlaps with the backward pass
    0       P            -               -                no
    1       P            P               -                no
    2       A P          P               -                no
    3       -            A P to 2 A P    A P              yes

The ZeRO paper's stages 1 and 2 scatter where DeepSpeed all-reduces, so a rank sends 2 P there and 3 P here; stage 2
reduces every micro-batch's gradients, because it keeps only a part of them. Stage 3 gathers every layer for the forward
pass, and again for the backward pass what exceeded ``stage3_max_live_parameters``.

Ranks that share windows (deepspeed.sequence_parallel) gather the keys and values of every layer among themselves, and
reduce-scatter their gradients, :func:`sequence_volume`; the overlap with router and queries is not counted.

Time is bandwidth and latency: a gathered or scattered tensor of V bytes crosses a GPU's link as V (g - 1) / g within a
node of g GPUs, and the node's network as V (n - 1) / n between n nodes, at the same time; an all-reduce is both.
Latency grows with the ring. Sources of the bandwidths: ``launch/plan/gpus.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launch.plan.gpus import GPU
from launch.plan.memory_model import Memory, memory, zero_sizes
from launch.plan.workload import Workload, ZeroStage
from trainer.config import WEIGHT_BYTES

ACHIEVED = 0.8
"""Share of the nominal bandwidth that large collectives reach: an assumption; launch.doctor measures the real one."""
HOP_S = {"link": 2e-6, "network": 6e-6}
"""Latency of one hop of a ring within and between nodes: an assumption."""
UTILISATION = (0.35, 0.50)
"""Share of the peak that a step's matrix products reach: the range of published dense runs of 7 to 405 B parameters on
A100 and H100, counted as here (docs/clusters.md). No run of this project on a GPU is among them."""
_UPDATE_BYTES = 30  # read gradient, master, two moments; write the last three and the weight


HOST_MS = {(False, False): 11.1, (False, True): 15.7, (True, False): 14.8, (True, True): 20.8}
"""CPU milliseconds of the host per layer and micro-batch, by whether ZeRO is stage 3 and activations are recomputed.
``python -m bench.host`` on one core of a server Xeon of 2023, with its own small products included: rather high."""
_UNITS = 3
"""What ZeRO 3 gathers separately besides the layers: embedding, final norm, head."""


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes.

    Attributes:
        gpu: each device.
        gpus_per_node: devices in a node.
        network_gbps: between nodes, Gbit/s a node in one direction.
    """

    gpu: GPU
    gpus_per_node: int
    network_gbps: float


@dataclass(frozen=True)
class Volume:
    """Bytes of the full tensors that are reduced, gathered and scattered in a step, and the number of collectives."""

    all_reduce: float
    all_gather: float
    reduce_scatter: float
    collectives: int

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that one of ``ranks`` ranks sends in a ring."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (ranks - 1) / ranks


@dataclass(frozen=True)
class Step:
    """One optimiser step on a number of GPUs; ``problem`` says why there is none.

    Attributes:
        gpus: how many.
        compute_s: forward, backward, update.
        host_s: of the host that launches them; the device waits if it is longer.
        communication_s: all collectives, one after the other.
        best_s: the whole step, with all the overlap that DeepSpeed allows.
        memory: of one GPU; None where there is no step.
        problem: why the global batch cannot be split over them.
    """

    gpus: int
    compute_s: float = math.nan
    host_s: float = math.nan
    communication_s: float = math.nan
    best_s: float = math.nan
    memory: Memory | None = None
    problem: str | None = None

    @property
    def worst_s(self) -> float:
        """The whole step, if nothing overlaps."""
        return max(self.compute_s, self.host_s) + self.communication_s

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the time that is compute, in the worst and the best case."""
        return self.compute_s / self.worst_s, self.compute_s / self.best_s


def volume(workload: Workload, stage: ZeroStage, accumulation: int) -> Volume:
    """Volume of a step of ``accumulation`` micro-batches per rank at ZeRO ``stage``."""
    weights, model = workload.weights, workload.model
    width = WEIGHT_BYTES[workload.config.train.precision]
    bucket, live, _ = zero_sizes(workload)
    trained = width * weights.trained
    buckets = math.ceil(weights.trained / bucket)
    if stage < 3:
        reductions = accumulation if stage == 2 else 1
        gathered = trained if stage > 0 else 0
        return Volume(reductions * trained, gathered, 0, reductions * buckets + (1 if stage > 0 else 0))
    gathers = weights.total + max(weights.total - live, 0)
    return Volume(
        0,
        accumulation * width * gathers,
        accumulation * trained,
        accumulation * (2 * (model.layers + _UNITS) + buckets),
    )


def sequence_volume(workload: Workload, accumulation: int) -> Volume:
    """Volume among the ranks that share windows in a step, without the masks that a capacity needs."""
    model, train = workload.model, workload.config.train
    if workload.shared == 1:
        return Volume(0, 0, 0, 0)
    window = train.micro_batch_samples * workload.config.data.sequence_tokens
    tensor = WEIGHT_BYTES[train.precision] * window * 2 * model.kv_heads * model.head_dim
    routed = len(model.routed_layers)
    gathers = model.layers
    if train.activation_checkpointing:
        explores = model.router is not None and model.router.explores
        gathers += model.layers + (routed if explores else 0)  # the explored tokens' pass has its own
    passes = accumulation * gathers, accumulation * model.layers
    return Volume(0, passes[0] * tensor, passes[1] * tensor, sum(passes))


def communication_s(moved: Volume, ranks: int, cluster: Cluster) -> float:
    """Seconds that the collectives take one after the other."""
    if ranks == 1:
        return 0.0
    inside, nodes = min(ranks, cluster.gpus_per_node), math.ceil(ranks / cluster.gpus_per_node)
    one_way = 2 * moved.all_reduce + moved.all_gather + moved.reduce_scatter
    link = one_way * (inside - 1) / inside / (cluster.gpu.link_gbs * 1e9)
    network = one_way * (nodes - 1) / nodes / (cluster.network_gbps / 8 * 1e9)
    hops = (inside - 1) * HOP_S["link"] + (nodes - 1) * HOP_S["network"]
    return max(link, network) / ACHIEVED + moved.collectives * hops


def expected_mfu(workload: Workload) -> tuple[float, float]:
    """Low and high MFU on executed FLOPs: :data:`UTILISATION` times the counted share of what is computed."""
    counted = workload.flops_per_token() / workload.hardware_flops_per_token()
    return UTILISATION[0] * counted, UTILISATION[1] * counted


def compute_s(workload: Workload, stage: ZeroStage, ranks: int, gpu: GPU, mfu: float) -> float:
    """Seconds of one rank's share of a step: executed FLOPs at ``mfu``, the update at the memory's bandwidth."""
    flops = workload.flops_per_token() * workload.tokens_per_step / ranks
    updated = workload.weights.trained / (ranks if stage > 0 else 1)
    return flops / (gpu.peak_flops(workload.config.train.precision) * mfu) + updated * _UPDATE_BYTES / (
        gpu.memory_gbs * 1e9
    )


def host_s(workload: Workload, stage: ZeroStage, accumulation: int) -> float:
    """Seconds that a rank's host takes to launch a step of ``accumulation`` micro-batches."""
    milliseconds = HOST_MS[stage == 3, workload.config.train.activation_checkpointing]
    return accumulation * workload.model.layers * milliseconds / 1e3


def step(workload: Workload, stage: ZeroStage, ranks: int, cluster: Cluster, mfu: float) -> Step:
    """One optimiser step of the config's global batch on ``ranks`` GPUs."""
    try:
        accumulation = workload.config.accumulation(ranks)
    except ValueError:
        train = workload.config.train
        reason = "exceeds" if ranks > workload.most_ranks else "does not divide"
        return Step(ranks, problem=f"{ranks} x {train.micro_batch_samples} samples {reason} the global batch")
    host = host_s(workload, stage, accumulation)
    compute = compute_s(workload, stage, ranks, cluster.gpu, mfu)
    moved = volume(workload, stage, accumulation)
    communication = communication_s(moved, ranks, cluster)
    waited = communication_s(sequence_volume(workload, accumulation), workload.shared, cluster)
    # DeepSpeed overlaps by default at stage 3 only.
    busy = max(compute, host) + waited
    best = max(busy, communication) if stage == 3 else busy + communication
    communication += waited
    return Step(ranks, compute, host, communication, best, memory(workload, stage, ranks))


def ladder(gpus: int, gpus_per_node: int, limit: int) -> list[int]:
    """Powers of two from one node to ``limit`` GPUs, and ``gpus`` itself."""
    counts = {gpus}
    count = gpus_per_node
    while count <= limit:
        counts.add(count)
        count *= 2
    return sorted(counts)
