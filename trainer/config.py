"""A run's config: one YAML with the blocks ``model``, ``data``, ``train`` and ``deepspeed``; how they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from data.config import DataConfig, StreamConfig
from model.config import EnsembleConfig, ModelConfig
from model.flops import EVERYTHING, Trained
from settings import PathText, Strict, load, peek
from trainer.config_blocks import DeepSpeedSettings, TrainConfig

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per weight during a step, by ``train.precision``."""


class StageConfig(Strict):
    """Blocks that the configs of both stages share, and the checks across blocks."""

    model: ModelConfig
    """The decoder."""
    data: StreamConfig
    """Text and its order."""
    train: TrainConfig
    """Optimisation, evaluation, checkpoints, metrics."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    """ZeRO."""

    def structure(self) -> dict[str, Any]:
        """Fields outside ``model`` that decide what is trained, by ``block.field``; the same in every resume."""
        return {}

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer, as the config names it: relative to where the run is started."""
        raise NotImplementedError

    def in_precision(self, precision: str) -> Self:
        """The same config with ``train.precision`` decided.

        Raises:
            ValueError: if that conflicts with the rest of the config.
        """
        decided = self.model_copy(update={"train": self.train.model_copy(update={"precision": precision})})
        decided._check()
        return decided

    def could_have(self, **settings: Any) -> bool:
        """Whether the config would be valid with these values in its ``deepspeed`` block."""
        blocks = self.model_dump(mode="json")
        try:
            type(self).model_validate({**blocks, "deepspeed": {**blocks["deepspeed"], **settings}})
        except ValidationError:
            return False
        return True

    @model_validator(mode="after")
    def _fits_together(self) -> StageConfig:
        self._check()
        return self

    def _check(self) -> None:
        problems = [*self._model_against_data(), *self._optimizer_against_zero(), *self._shared_windows()]
        problems += self._timeouts_and_schedule()
        if problems:
            raise ValueError("; ".join(problems))

    def _model_against_data(self) -> list[str]:
        if self.data.sequence_tokens <= self.model.max_positions:
            return []
        return [
            f"data.sequence_tokens ({self.data.sequence_tokens}) must not exceed model.max_positions "
            f"({self.model.max_positions}); lower data.sequence_tokens, or in stage one raise model.max_positions"
        ]

    def _optimizer_against_zero(self) -> list[str]:
        kind, stage, offload = self.train.optimizer.kind, self.deepspeed.zero_stage, self.deepspeed.offload
        problems = []
        if kind == "adafactor" and stage > 0:
            problems.append(
                "train.optimizer.kind adafactor needs deepspeed.zero_stage 0, because ZeRO flattens the matrices whose "
                f"rows and columns it averages over; got stage {stage}; take stage 0, or adamw"
            )
        if self.train.precision == "fp16" and stage == 0:
            problems.append(
                "train.precision fp16 needs deepspeed.zero_stage 1, 2 or 3, because at stage 0 DeepSpeed does not "
                "scale the loss but unscales the gradient; got 0"
            )
        if kind == "muon" and self.train.clip_norm > 0:
            problems.append(
                f"train.clip_norm ({self.train.clip_norm}) must be 0 with train.optimizer.kind muon, because DeepSpeed "
                "clips after the orthogonalisation, which shrinks every update"
            )
        if kind == "muon" and offload != "none":
            problems.append("train.optimizer.kind muon needs deepspeed.offload none; take adamw to offload")
        if offload != "none" and stage == 0:
            problems.append(f"deepspeed.offload {offload} needs deepspeed.zero_stage 1, 2 or 3, got 0")
        if offload == "all" and stage != 3:
            problems.append(f"deepspeed.offload all moves parameters, which needs deepspeed.zero_stage 3, got {stage}")
        if self.train.compile and stage == 3:
            problems.append(
                "train.compile needs deepspeed.zero_stage 0, 1 or 2, because stage 3 fetches parameters in hooks that "
                "torch.compile does not see; got 3"
            )
        return problems

    def _shared_windows(self) -> list[str]:
        ranks, window, router = self.deepspeed.sequence_parallel, self.data.sequence_tokens, self.model.router
        problems: list[str] = []
        if ranks == 1:
            return problems
        if window % (2 * ranks):
            nearest = [n for n in (window // (2 * ranks) * 2 * ranks, -(-window // (2 * ranks)) * 2 * ranks) if n]
            problems.append(
                f"data.sequence_tokens ({window}) must be divisible by 2 x deepspeed.sequence_parallel ({2 * ranks}), "
                "because a window is cut into two stretches for each of the ranks that share it; take "
                f"{' or '.join(map(str, nearest))}"
            )
        if router is not None and router.kind == "expert_choice":
            problems.append(
                f"deepspeed.sequence_parallel ({ranks}) must be 1 with model.router.kind expert_choice, which compares "
                "all tokens of a window; take a causal kind: learned, random or stride"
            )
        if self.train.compile:
            problems.append(
                "train.compile needs deepspeed.sequence_parallel 1, because a compiled layer that asks other ranks has "
                f"not been tried; got {ranks}"
            )
        return problems

    def _timeouts_and_schedule(self) -> list[str]:
        train, problems = self.train, []
        if train.stall_timeout_s >= train.timeout_s:
            problems.append(
                f"train.stall_timeout_s ({train.stall_timeout_s:g}) must be below train.timeout_s "
                f"({train.timeout_s:g}), because a collective that times out ends the ranks before they report where "
                "they hang; raise timeout_s or lower stall_timeout_s"
            )
        if train.checkpoint.mirror is not None and train.checkpoint.mirror_wait_s >= train.timeout_s:
            problems.append(
                f"train.checkpoint.mirror_wait_s ({train.checkpoint.mirror_wait_s:g}) must be below train.timeout_s "
                f"({train.timeout_s:g}), because the other ranks wait for rank 0 at the end; lower it"
            )
        if train.schedule.warmup_steps > train.steps:
            problems.append(
                f"train.schedule.warmup_steps ({train.schedule.warmup_steps}) must not exceed train.steps "
                f"({train.steps}); set both"
            )
        if train.global_batch_samples % train.micro_batch_samples:
            problems.append(
                f"train.global_batch_samples ({train.global_batch_samples}) must be divisible by "
                f"train.micro_batch_samples ({train.micro_batch_samples}); change one of them"
            )
        return problems

    @property
    def trained(self) -> Trained:
        """Which parts of the decoder are trained, for counting FLOPs."""
        return EVERYTHING

    def accumulation(self, world_size: int) -> int:
        """As :meth:`TrainConfig.accumulation`."""
        return self.train.accumulation(world_size, self.deepspeed)

    def checkpoint_bytes(self, total: int, trained: int, moment_bytes: float, stage: int | None = None) -> float:
        """Bytes of one checkpoint: forward-pass weights (at stage 3 only frozen ones), fp32 master weights, moments.

        Args:
            total, trained: numbers of all parameters and of those with a gradient.
            moment_bytes: optimiser state of all trained ones: see
                :meth:`trainer.config_blocks.OptimizerConfig.moment_bytes`.
            stage: ZeRO stage; the config's unless given.
        """
        stage = self.deepspeed.zero_stage if stage is None else stage
        width = WEIGHT_BYTES[self.train.precision]
        masters = 0 if stage == 0 and width == 4 else 4 * trained
        return width * (total - (trained if stage == 3 else 0)) + masters + moment_bytes


class InitConfig(Strict):
    """What a fresh run starts from; a resumed run continues from its own checkpoint and ignores this block."""

    path: PathText
    """A stage-one run (its newest whole checkpoint), one of its checkpoints, a folder of weights, or a Hugging Face
    folder that ``convert.from_hf`` can import, exports included."""
    kind: Literal["weights", "fork"] = "weights"
    """``weights``: the weights alone, at step 0 of this run's schedules; routers missing there execute everything at
    first. ``fork``: continues a checkpoint of the same model and optimiser in a new run folder, with its optimiser
    state and step, and with this config's data, schedules and budget."""


class PretrainConfig(StageConfig):
    """A stage-one run."""

    init: InitConfig | None = None
    """What the run starts from; randomly initialised weights unless given."""
    data: DataConfig
    """Text, tokenizer, shards, order."""

    @property
    def tokenizer_folder(self) -> Path:
        """See :class:`StageConfig`."""
        return Path(self.data.dir)

    def _model_against_data(self) -> list[str]:
        problems = super()._model_against_data()
        rows, ids = self.model.vocab_size, self.data.tokenizer.vocab_size
        if rows < ids or (rows > ids and self.init is None):  # given weights may have rows that no token uses
            problems.insert(
                0,
                f"model.vocab_size ({rows}) must equal data.tokenizer.vocab_size ({ids}), or with an init block be "
                "larger; set both to the same number",
            )
        return problems


class WeightsConfig(Strict):
    """The config stored beside weights that do not belong to a run: see trainer/checkpoints/weights_folder.py."""

    model: ModelConfig
    """The decoder's sizes and routers."""
    ensemble: EnsembleConfig | None = None
    """The late-layer ensemble; the final layer alone unless given."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the routing noise, which routers of kind ``random`` use in evaluation too."""
    thresholds: list[float | None] | None = None
    """Thresholds on the margins of learned routers, one per site, null for minus infinity; 0 unless given."""


def is_stage_two(path: str | Path) -> bool:
    """Whether a config file is of stage two, by its ``base`` block."""
    return "base" in peek(path)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """A run's config from its file and the command line, with the run folder's name and the stages' tokens filled in.

    Raises:
        ValueError: with one sentence for each mistake.
    """
    config: PretrainConfig = load(path, overrides, PretrainConfig)
    train = name_run(config.train, path)
    return config.model_copy(update={"train": train, "data": config.data.in_tokens(train.samples)})


def name_run(train: TrainConfig, path: str | Path) -> TrainConfig:
    """``train`` with ``run_dir`` filled in: ``runs/`` and the config file's name unless given."""
    if train.run_dir is not None:
        return train
    return train.model_copy(update={"run_dir": f"runs/{Path(path).stem}"})
