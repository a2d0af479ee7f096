"""Generates the DeepSpeed JSON: every quantity in it is specified once, in the run's config."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.flops import layer_elements
from trainer.config import StageConfig

PREFETCH = 50_000_000
"""DeepSpeed's default prefetch size, in elements."""
KNOWN_EXTRA: dict[str, Any] = {
    "communication_data_type": None,
    "zero_optimization": {
        "overlap_comm": None,
        "round_robin_gradients": None,
        "reduce_bucket_size": None,
        "allgather_bucket_size": None,
        "sub_group_size": None,
        "stage3_max_live_parameters": None,
        "stage3_max_reuse_distance": None,
        "stage3_prefetch_bucket_size": None,
        "zero_hpz_partition_size": None,
    },
}
"""Keys that ``deepspeed.extra`` may hold: each has a test that trains, saves and resumes with it."""


def deepspeed_config(config: StageConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize`` on ``world_size`` ranks.

    Raises:
        ValueError: if ``deepspeed.extra`` contradicts a generated key or holds an unknown one, or the batch cannot be
            divided among the ranks.
    """
    train, zero = config.train, config.deepspeed
    assert train.precision != "auto", "decided before: see trainer/precision.py"
    accumulation = config.accumulation(world_size)
    generated: dict[str, Any] = {
        # DeepSpeed assumes that every rank has its own windows; it only checks that these three numbers are consistent.
        "train_batch_size": train.global_batch_samples * zero.sequence_parallel,
        "train_micro_batch_size_per_gpu": train.micro_batch_samples,
        "gradient_accumulation_steps": accumulation,
        # Stage 0 in fp32 clips without reporting the norm, and steps on NaN; there trainer/step.py clips and skips
        # itself.
        "gradient_clipping": 0.0 if owns_clipping(config) else train.clip_norm,
        "zero_optimization": _zero(config),
        "zero_allow_untested_optimizer": True,
        # With offloading DeepSpeed otherwise requires its own Adam, which needs a compiler; PyTorch's fused one does
        # not.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    generated["bf16"] = generated["fp16"] = {"enabled": False}  # explicit, so that extra cannot turn them on unnoticed
    if train.precision == "bf16":
        generated["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if zero.zero_stage > 1 and accumulation > 1:
            # By default bf16 gradients are summed over micro-batches in bf16, which loses the small ones. Stage 1 would
            # switch to another optimiser class and file format for fp32, and stage 0 cannot do it.
            generated["data_types"] = {"grad_accum_dtype": "fp32"}
    if train.precision == "fp16":
        generated["fp16"] = {"enabled": True, "initial_scale_power": 12}
    if train.optimizer.kind == "muon":
        generated["optimizer"] = _muon(config)
    merged = _merge(generated, zero.extra, "deepspeed.extra")
    if not zero.allow_untested:
        _refuse_unknown(zero.extra, generated, KNOWN_EXTRA, "deepspeed.extra")
    return merged


def prefetch_elements(model: ModelConfig) -> int:
    """Elements that ZeRO 3 prefetches: DeepSpeed's default, or a whole layer where that is more."""
    return max(PREFETCH, layer_elements(model))


def owns_clipping(config: StageConfig) -> bool:
    """True where the trainer, not DeepSpeed, computes the gradient norm, clips, and skips a bad step."""
    return config.deepspeed.zero_stage == 0 and config.train.precision == "fp32"


def _zero(config: StageConfig) -> dict[str, Any]:
    settings = config.deepspeed
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage == 2 and config.train.precision != "fp16":
        # DeepSpeed's "scatter" is an all-reduce too, on a copy of the bucket whose result is copied back. Without it
        # the bucket itself is reduced, and divided by the number of ranks after the sum, which may overflow in fp16.
        zero["reduce_scatter"] = False
    if settings.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = settings.persistence_threshold
        prefetch = prefetch_elements(config.model)
        if prefetch > PREFETCH and "stage3_prefetch_bucket_size" not in (settings.extra.get("zero_optimization") or {}):
            zero["stage3_prefetch_bucket_size"] = prefetch
        if config.train.optimizer.kind == "muon":
            zero["reduce_scatter"] = False  # DeepSpeed refuses Muon at stage 3 otherwise
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if settings.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero


def _muon(config: StageConfig) -> dict[str, Any]:
    optimizer = config.train.optimizer
    return {
        "type": "Muon",
        "params": {
            "lr": optimizer.lr,  # every group brings its own; see trainer/engine.py
            "momentum": optimizer.muon_momentum,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "torch_adam": True,
        },
    }


def _refuse_unknown(extra: dict[str, Any], generated: dict[str, Any], known: dict[str, Any], path: str) -> None:
    """Raise for keys that are neither generated nor known; DeepSpeed itself ignores some unknown ones."""
    for key, value in extra.items():
        if isinstance(value, dict) and (isinstance(known.get(key), dict) or isinstance(generated.get(key), dict)):
            _refuse_unknown(value, generated.get(key) or {}, known.get(key) or {}, f"{path}.{key}")
        elif key not in known and key not in generated:
            raise ValueError(
                f"{path}.{key} is not among the settings known to work here in training, saving and resuming "
                f"({', '.join(sorted(known)) or 'nothing in this block'}); leave it out, or set "
                "deepspeed.allow_untested: true and check it yourself"
            )


def _merge(generated: dict[str, Any], extra: dict[str, Any], path: str) -> dict[str, Any]:
    """``extra`` merged over ``generated``; a key that both set to different values is an error."""
    merged = dict(generated)
    for key, value in extra.items():
        here = merged.get(key)
        if isinstance(here, dict) and isinstance(value, dict):
            merged[key] = _merge(here, value, f"{path}.{key}")
        elif key in merged and here != value:
            raise ValueError(
                f"{path}.{key} ({value!r}) contradicts the generated value ({here!r}); set the field of the run's "
                "config that it comes from, and leave it out of deepspeed.extra"
            )
        else:
            merged[key] = value
    return merged
