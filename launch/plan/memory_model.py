"""How many bytes a rank holds, part by part, for a ZeRO stage and a number of ranks.

The state is what DeepSpeed 0.19 really keeps, which is more than the ZeRO paper's table (Rajbhandari et al. 2020,
figure 1): stage 1 holds whole gradients, bf16 gradients are summed in fp32 at stages 2 and 3, buckets have a fixed
size for any model, and stage 3 keeps gathered layers that it will soon need again. With w bytes per weight (bf16 2,
fp32 4), P parameters of which P_t are trained, N ranks, m bytes of moments per parameter (AdamW 8):

    stage   weights    gradients                     master and moments          fp32 gradients in the update
    0       w P        w P_t                         fp32 m P_t, else (4+m) P_t  4 P_t (bf16)
    1       w P        w P_t                         (4+m) P_t / N               4 P_t / N
    2       w P        w or 4 (bf16, several         (4+m) P_t / N               4 P_t / N
    3       w P / N    micro-batches) x P_t / N      (4+m) P_t / N               4 P_t / N

Activations are counted from what autograd keeps in ``model/block.py`` and ``model/head.py``, in elements of w bytes per
token: for every token the residual stream, its norm, keys and values; for an executed token the rest; with activation
checkpointing the residual stream before each layer or, with a router for each module, before each module. Ranks that
share a window each have their part of its tokens, and keys and values of all. Activations and the update's copies are
not held at once, so the peak is the larger of the two.

tests/launch/plan/test_memory_model.py counts the bytes of a real engine. D width, H query heads, G key/value heads, K
head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan.workload import Workload, ZeroStage, computed_share
from model.config import ModelConfig
from trainer.config import WEIGHT_BYTES
from trainer.deepspeed_config import PREFETCH, prefetch_elements

GIB = 2**30

CONTEXT_BYTES = 1.5 * GIB
"""CUDA context, NCCL's buffers, cuBLAS's workspace: an estimate, not measured."""
FRAGMENTATION = 0.05
"""Share of a device's memory that is left free for the allocator: an estimate."""
# DeepSpeed's defaults, in elements; deepspeed.extra may set others. tests/launch/plan/test_memory_model.py compares.
ZERO_DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": PREFETCH}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: in the dtype of the step.
        gradients: at the end of the last micro-batch's backward pass.
        optimizer: fp32 master weights and moments.
        buffers: buckets in which gradients are reduced, and layers that stage 3 has gathered.
        activations: kept for the backward pass, including the loss's gradient of the head.
        working: largest temporary: a chunk of logits, the head's gradient, one layer's backward pass.
        update: fp32 gradients in the optimiser's step, when activations have been freed.
        context: of CUDA and its libraries.
        host: pinned CPU memory for offloaded state.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    working: float
    update: float
    context: float
    host: float

    @property
    def peak(self) -> float:
        """Bytes of the device at the peak."""
        state = self.weights + self.gradients + self.optimizer + self.context
        return state + max(self.buffers + self.activations + self.working, self.update)

    @property
    def on_cpu(self) -> float:
        """Bytes of a rank on a CPU: no CUDA context, and of a bucket only its touched pages, which are few."""
        state = self.weights + self.gradients + self.optimizer
        return state + max(self.activations + self.working, self.update)

    def fits(self, memory_gib: float) -> bool:
        """True if it fits on a device and leaves the allocator some room."""
        return self.peak <= memory_gib * GIB * (1 - FRAGMENTATION)


def memory(
    workload: Workload, stage: ZeroStage, ranks: int, checkpointing: bool | None = None, density: float | None = None
) -> Memory:
    """What one of ``ranks`` ranks holds at ZeRO ``stage``.

    Args:
        workload: the config; its own stage is ignored, its offloading applies where the stage supports it.
        stage: of ZeRO.
        ranks: of the whole run.
        checkpointing: activation checkpointing; the config's unless given.
        density: share of tokens that routed sites execute; the target unless given.
    """
    config, weights = workload.config, workload.weights
    width = WEIGHT_BYTES[config.train.precision]
    fp32 = config.train.precision == "fp32"
    several = config.train.global_batch_samples * workload.shared > config.train.micro_batch_samples * ranks
    share = 1 / ranks if stage > 0 else 1.0
    held = float(width * weights.total)
    if stage == 3:
        held = width * (weights.total * share + weights.small * (1 - share))
    gradient_bytes = 4 if stage > 1 and several else width
    gradients = gradient_bytes * weights.trained * (share if stage > 1 else 1.0)
    masters = 0 if fp32 and stage == 0 else 4 * weights.trained
    optimizer = (masters + weights.moment_bytes) * share
    update = (4 if not fp32 else width if stage > 0 else 0) * weights.trained * share
    host = 0.0
    if config.deepspeed.offload != "none" and stage > 0:
        moved = optimizer + 4 * weights.trained * share
        host, optimizer, update = moved, 0.0, 0.0
        gradients = 0.0 if stage > 1 else gradients
    if config.deepspeed.offload == "all" and stage == 3:
        host += held
        held = float(width * weights.small)
    return Memory(
        weights=held,
        gradients=gradients,
        optimizer=optimizer,
        buffers=_buffers(workload, stage, ranks, width),
        activations=activation_bytes(workload, checkpointing, density),
        working=_working_bytes(workload, checkpointing, density),
        update=update,
        context=CONTEXT_BYTES,
        host=host,
    )


def activation_bytes(workload: Workload, checkpointing: bool | None = None, density: float | None = None) -> float:
    """Bytes that autograd keeps for one micro-batch: of the layers, the final norm and the head."""
    config, model = workload.config, workload.model
    width = WEIGHT_BYTES[config.train.precision]
    tokens, checkpointing, share = _asked(workload, checkpointing, density)
    layers = sum(
        _layer_elements(model, layer in model.routed_layers, share, checkpointing, workload.shared)
        for layer in _layers(model)
    )
    ends = 2 * model.width  # what the final norm reads, and the loss's gradient of what it returns
    return width * tokens * (layers + ends) + 4 * model.width * model.vocab_size


def _asked(workload: Workload, checkpointing: bool | None, density: float | None) -> tuple[int, bool, float]:
    """A rank's tokens of a micro-batch, checkpointing (the config's unless given), share of them that sites compute."""
    config = workload.config
    tokens = config.train.micro_batch_samples * config.data.sequence_tokens // workload.shared
    executed = workload.density if density is None else density
    share = computed_share(workload.model, config.data.sequence_tokens, executed, workload.shared)
    return tokens, config.train.activation_checkpointing if checkpointing is None else checkpointing, share


def _layer_elements(model: ModelConfig, routed: bool, share: float, checkpointing: bool, shared: int) -> float:
    """Elements that a layer keeps for each of a rank's tokens of the micro-batch; ``share`` of them are computed."""
    d, queries, keys_values = model.width, model.heads * model.head_dim, shared * 2 * model.kv_heads * model.head_dim
    if not routed:
        return d if checkpointing else 4 * d + 3 * queries + keys_values + 4 * model.ffn_width
    assert model.router is not None
    sites = 1 if model.router.granularity == "layer" else 2
    if checkpointing:
        return sites * d
    # The residual stream and its norm, which the router reads; an executed token's update, which its gate multiplies.
    return sites * 2 * d + keys_values + share * (3 * d + 3 * queries + 4 * model.ffn_width)


def _working_bytes(workload: Workload, checkpointing: bool | None, density: float | None) -> float:
    """The largest of three moments: a chunk of logits, the head's backward pass, the backward pass of one layer."""
    from model.chunks import rows_at_once  # torch

    config, model = workload.config, workload.model
    width = WEIGHT_BYTES[config.train.precision]
    head = model.width * model.vocab_size
    tokens, checkpointing, share = _asked(workload, checkpointing, density)
    rows = min(rows_at_once(model.vocab_size, on_cpu=False), tokens)
    chunk = (4 + width) * rows * model.vocab_size + (width * head if width < 4 else 0)
    # Gradients of the four tensors inside the feed-forward, and of the residual stream's three.
    layer = width * tokens * (share * 3 * model.ffn_width + 3 * model.width)
    if workload.shared > 1:  # gradients of all keys and values: assembled, split to send, and received
        layer += 3 * width * tokens * workload.shared * 2 * model.kv_heads * model.head_dim
    if checkpointing:
        layer += (
            width
            * tokens
            * max(
                _layer_elements(model, routed, share if routed else 1.0, False, workload.shared)
                - _layer_elements(model, routed, share if routed else 1.0, True, workload.shared)
                for routed in {layer in model.routed_layers for layer in _layers(model)}
            )
        )
    return max(chunk, (4 + width) * head, layer)


def zero_sizes(workload: Workload) -> tuple[float, ...]:
    """Elements of DeepSpeed's buckets and limits, in the order of ``ZERO_DEFAULTS``.

    Raises:
        ValueError: if ``deepspeed.extra`` has something else than a number for one.
    """
    zero = workload.config.deepspeed.extra.get("zero_optimization") or {}
    defaults = ZERO_DEFAULTS | {"stage3_prefetch_bucket_size": prefetch_elements(workload.model)}
    sizes = {name: zero.get(name, default) for name, default in defaults.items()}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | float) or size <= 0:
            raise ValueError(
                f"deepspeed.extra.zero_optimization.{name} must be a number of elements above 0, got {size!r}; "
                "write it without quotes, as in 5e8"
            )
    return tuple(sizes.values())


def _buffers(workload: Workload, stage: ZeroStage, ranks: int, width: int) -> float:
    """Buckets that gradients are reduced in with their flat copies, and what stage 3 gathers."""
    bucket, live, prefetch = zero_sizes(workload)
    filled = min(bucket, workload.weights.trained)
    if stage < 3:
        return width * (filled + (bucket if stage > 0 else 0))
    if ranks == 1:
        return width * (2 * filled + bucket)
    # Partitions arrive in a flat buffer, from which each parameter is assembled, before there are gradients to reduce.
    total = workload.weights.total
    return width * (bucket + min(total, live) + max(2 * filled, min(total, prefetch)))


def _layers(model: ModelConfig) -> range:
    return range(model.layers)


def checkpoint_bytes(workload: Workload, stage: ZeroStage) -> float:
    """Size of one checkpoint."""
    weights = workload.weights
    return workload.config.checkpoint_bytes(weights.total, weights.trained, weights.moment_bytes, stage)
