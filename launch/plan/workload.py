"""What a config needs on any machine: parameters, FLOPs and data of one optimiser step.

Counted on the decoder itself, built without storage, so that a plan cannot disagree with the model. FLOPs are those of
``model/flops.py`` with every routed site at its target density and full windows.

Dimension letters: T tokens in a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from launch.configs import load_either, without_storage
from model.config import ModelConfig
from model.flops import Routed, executed_flops, full_windows, training_flops, without_routers
from trainer.config import StageConfig

if TYPE_CHECKING:
    from torch import nn

ZeroStage = Literal[0, 1, 2, 3]
STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Weights:
    """Parameters by what ZeRO does with them.

    Attributes:
        total, trained: all, and those with a gradient and optimiser state.
        small: elements of parameters below ``deepspeed.persistence_threshold``, which stay whole at stage 3.
        moment_bytes: fp32 optimiser state besides the master weights, over all ranks.
    """

    total: int
    trained: int
    small: int
    moment_bytes: float


@dataclass(frozen=True)
class Workload:
    """A config with its parameters counted."""

    config: StageConfig
    weights: Weights

    @property
    def model(self) -> ModelConfig:
        """The decoder's sizes."""
        return self.config.model

    @property
    def density(self) -> float:
        """Target share of tokens that a routed site executes; 1 for a dense model."""
        return 1.0 if self.model.router is None else self.model.router.density

    @property
    def computed_share(self) -> float:
        """Share of tokens that a routed site computes, fillers of a capacity and masked tokens included."""
        return computed_share(self.model, self.config.data.sequence_tokens, self.density, self.shared)

    @property
    def stages(self) -> list[ZeroStage]:
        """ZeRO stages that the config could be set to: not all go with every optimiser, offloading or compilation."""
        return [stage for stage in STAGES if self.config.could_have(zero_stage=stage)]

    @property
    def shared(self) -> int:
        """How many ranks share a window."""
        return self.config.deepspeed.sequence_parallel

    @property
    def most_ranks(self) -> int:
        """Most ranks that the global batch can be split over, one micro-batch per rank or group that shares windows."""
        train = self.config.train
        return train.global_batch_samples // train.micro_batch_samples * self.shared

    def sharing(self, ranks: int) -> Workload:
        """The same with windows shared by a given number of ``ranks``."""
        settings = self.config.deepspeed.model_copy(update={"sequence_parallel": ranks})
        return replace(self, config=self.config.model_copy(update={"deepspeed": settings}))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all ranks and micro-batches."""
        return self.config.train.global_batch_samples * self.config.data.sequence_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.config.train.steps * self.tokens_per_step

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses on average at the target density, including all of the embedding and head."""
        d, k, model = self.model.width, self.model.head_dim, self.model
        attention, ffn = 2 * d * model.heads * k + d, 3 * d * model.ffn_width + d
        skippable = sum(attention * site.attends + ffn * site.feeds_forward for site in model.routed_sites)
        return self.weights.total - round((1 - self.density) * skippable)

    def flops_per_token(self) -> float:
        """Forward and backward, at the target density, as the metrics count them."""
        return self._training(self.model, self._counts(self.density))

    def dense_flops_per_token(self) -> float:
        """The same without routers."""
        dense, tokens = without_routers(self.model), self.config.data.sequence_tokens
        return self._training(dense, full_windows(dense, tokens, tokens, 1.0))

    def hardware_flops_per_token(self) -> float:
        """FLOPs that a device computes for them: with fillers, and with recomputation by activation checkpointing."""
        own, computed = self._counts(self.density), self._counts(self.computed_share)
        computed = replace(computed, explored_tokens=own.explored_tokens, explored_keys=own.explored_keys)
        flops = self._training(self.model, computed)
        if self.config.train.activation_checkpointing:
            forward = forward_flops(self.model, self.config.data.sequence_tokens, self.computed_share)
            again = 1 - self.config.trained.first_layer / self.model.layers  # no backward pass, nothing to recompute
            flops += again * (forward - 2 * self.model.width * self.model.vocab_size)
        return flops

    def _counts(self, density: float) -> Routed:
        tokens = self.config.data.sequence_tokens
        return full_windows(self.model, tokens, tokens, density)

    def _training(self, model: ModelConfig, counts: Routed) -> float:
        return training_flops(model, counts, self.config.trained) / counts.tokens


def forward_flops(model: ModelConfig, sequence_tokens: int, density: float) -> float:
    """FLOPs of a token's forward pass in full windows of T tokens, every routed site at ``density``."""
    return executed_flops(model, full_windows(model, sequence_tokens, sequence_tokens, density)) / sequence_tokens


def computed_share(model: ModelConfig, sequence_tokens: int, density: float, shared: int = 1) -> float:
    """Share of a window's tokens that a routed site computes in training when routers pick ``density`` of them.

    The ``shared`` ranks of a window compute only their own tokens of a capacity, and no fillers.
    """
    if model.router is None or model.router.execution == "reference":
        return 1.0
    capacity = model.router.capacity(sequence_tokens, model.router.density)
    return density if capacity is None or shared > 1 else capacity.executed / sequence_tokens


def read_workload(path: str, overrides: Sequence[str] = ()) -> Workload:
    """The workload of a stage-one or stage-two config on GPUs; precision ``auto`` is bf16, fast on all of ``gpus.py``.

    Raises:
        ValueError: with one sentence for each mistake.
    """
    config, decoder = without_storage(load_either(path, overrides))
    if config.train.precision == "auto":
        config = config.in_precision("bf16")
    return Workload(config, count_weights(decoder, config))


def count_weights(decoder: nn.Module, config: StageConfig) -> Weights:
    """Parameters of ``decoder``, which may be without storage."""
    named = dict(decoder.named_parameters())  # a tied head once
    trained = {name: p for name, p in named.items() if p.requires_grad}
    threshold = config.deepspeed.persistence_threshold
    return Weights(
        total=sum(p.numel() for p in named.values()),
        trained=sum(p.numel() for p in trained.values()),
        small=sum(p.numel() for p in named.values() if p.numel() < threshold),
        moment_bytes=sum(config.train.optimizer.moment_bytes(name, p.shape) for name, p in trained.items()),
    )
