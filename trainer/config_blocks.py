"""The blocks ``train`` and ``deepspeed`` of a run's config, the same in both stages.

Every quantity is specified once. The DeepSpeed JSON (batch sizes, precision, clipping, ZeRO) is generated from these
fields by ``trainer/deepspeed_config.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from data.config import File
from model.roles import role_of
from model.schedules import Progress
from settings import PathText, Strict

_LONGEST_WAIT_S = 1e9


class OptimizerConfig(Strict):
    """The optimiser and its parameter groups: matrices (decayed), norms (not decayed), routers (own rate)."""

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    """``adafactor`` has the settings of Zeng et al. 2023; ``muon`` is DeepSpeed's, with AdamW for embedding, head and
    norms."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """adamw, and muon's AdamW part: decay of the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """adamw, and muon's AdamW part: added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices."""
    router_lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of the skip routers and of the ensemble's router, relative to ``lr``; for the ensemble router's
    matrix it is also divided by the width."""
    router_weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of the skip routers and of the ensemble's router."""
    adafactor_beta2: float = Field(0.99, gt=0, lt=1)
    """adafactor: decay of the factored second moment."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """muon: momentum."""
    muon_lr_ratio: float = Field(10.0, gt=0)
    """muon: learning rate of the orthogonalised updates, relative to ``lr``."""

    def moment_bytes(self, name: str, shape: Sequence[int]) -> float:
        """Bytes of fp32 optimiser state of the parameter ``name`` of ``shape``, without its master copy."""
        matrix = len(shape) >= 2
        if self.kind == "adafactor" and matrix:
            return 4.0 * sum(shape)
        orthogonalised = self.kind == "muon" and matrix and role_of(name) not in ("embedding", "head")
        return 4.0 * math.prod(shape) * (1 if self.kind == "adafactor" or orthogonalised else 2)


class ScheduleConfig(Strict):
    """Learning rate over the run: a linear warm-up, then one of four shapes."""

    kind: Literal["cosine", "warmup_stable_decay", "inverse_sqrt", "constant"] = "cosine"
    """``inverse_sqrt`` stays at the peak up to ``inverse_sqrt_from`` steps, then falls with 1 / sqrt(step)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises from 0 to its peak."""
    final_ratio: float = Field(0.1, ge=0, le=1)
    """cosine, warmup_stable_decay: rate at the last step, relative to the peak."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """warmup_stable_decay: share of all steps, at the end, over which the rate falls linearly."""
    decay_steps: int | None = Field(None, gt=0)
    """warmup_stable_decay: the same in steps; ``decay_share`` unless given."""
    end_step: int | None = Field(None, gt=0)
    """cosine, warmup_stable_decay: the step at which the decay ends; after it the rate is constant. The run's last step
    unless given; changing ``steps`` does not move it."""
    inverse_sqrt_from: int = Field(10_000, gt=0)
    """inverse_sqrt: the step at which the rate starts to fall."""


class EvaluationConfig(Strict):
    """Losses on the named validation sets, and downstream tasks."""

    every_steps: int = Field(500, gt=0)
    """Evaluate after every this many steps, and after the last."""
    before_first: bool = True
    """Also evaluate before the first step, to measure what the run starts from."""
    samples: int = Field(64, gt=0)
    """Windows of each validation set to use: evenly spread over it, always the same."""
    with_noise: bool = True
    """Also measure the loss with the routers' training noise, to see how far greedy routing is from routing in
    training."""
    tasks: list[File] = Field(default_factory=list)
    """Downstream tasks to run on all ranks: files of questions (names or patterns that end in ``.jsonl``, ``{texts}``
    as in ``data``; docs/evaluation.md), and names or task files (``.yaml``) of lm-evaluation-harness."""
    task_limit: int | None = Field(200, gt=0)
    """Use only this many questions of each task, the first ones; null for all."""
    task_shots: int = Field(0, ge=0)
    """Few-shot examples before each question; for a task of the harness 0 keeps the task's own number."""
    task_every_steps: int | None = Field(None, gt=0)
    """Run the tasks only with the evaluations at multiples of this many steps, and after the last; with every
    evaluation unless given."""

    @model_validator(mode="after")
    def _tasks_with_evaluations(self) -> EvaluationConfig:
        every = self.task_every_steps
        if every is not None and every % self.every_steps:
            raise ValueError(
                f"task_every_steps ({every}) must be a multiple of every_steps ({self.every_steps}), because tasks are "
                "run with evaluations; change one of them"
            )
        return self

    def has_tasks(self, step: int, last_step: int) -> bool:
        """Whether tasks are run with the evaluation after ``step`` steps."""
        return bool(self.tasks) and (step % (self.task_every_steps or self.every_steps) == 0 or step == last_step)


class CheckpointConfig(Strict):
    """What is saved and when, and what a start resumes from."""

    every_steps: int = Field(1000, gt=0)
    """Save after every this many steps, and after the last."""
    every_minutes: float | None = Field(None, ge=0.1, allow_inf_nan=False)
    """Also save after a step that begins this many minutes or more after the last save began, by rank 0's clock; no
    timed saves unless given. ``launch.plan`` estimates what failures cost at any value."""
    keep: int = Field(2, ge=1)
    """How many of the newest whole checkpoints stay; older ones are removed once a newer one is whole."""
    keep_every_steps: int = Field(0, ge=0)
    """Checkpoints at multiples of this stay forever; 0 keeps none forever."""
    background: bool = True
    """Write while training continues; takes host memory for a copy of each rank's state. False: training waits."""
    max_gb: float | None = Field(None, gt=0)
    """Limit on the total size of the run's checkpoints, in GB (10^9 bytes), for disks whose quota does not show as free
    space; only the disk limits it unless given."""
    resume: Literal["never", "auto", "required"] = "never"
    """``never`` refuses a run folder that holds checkpoints, ``auto`` resumes if it does, ``required`` fails if it does
    not."""
    mirror: PathText | None = None
    """A URL such as ``s3://bucket/run``, of any kind that fsspec supports: whole checkpoints are copied there in the
    background, and if ``run_dir`` has none, a resume takes the newest from there. Each run needs its own; none unless
    given."""
    mirror_keep: int = Field(2, ge=1)
    """How many of the newest whole checkpoints stay in the mirror."""
    mirror_keep_every_steps: int = Field(0, ge=0)
    """Checkpoints at multiples of this stay in the mirror forever; 0 keeps none forever."""
    mirror_wait_s: float = Field(120.0, ge=0)
    """How long the run waits at its end for unfinished copies; what is still missing is reported, and copied by the
    next start."""
    accept_data: str | None = Field(None, pattern=r"^[0-9a-f]{12}$")
    """The first 12 digits of a checkpoint's data fingerprint, to resume from it although the data differ: another seed,
    other shards or weights. The error that refuses such a resume names them."""

    @field_validator("resume", mode="before")
    @classmethod
    def _no_checkpoint(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in get_args(cls.model_fields["resume"].annotation):
            raise ValueError(
                f"it takes never, auto or required, which go on from the newest whole checkpoint of train.run_dir, got "
                f"'{value}'; to go back to an earlier one: python -m launch.rewind RUN STEP; to begin another run from "
                "one: init.path in stage one, base.path in stage two"
            )
        return value


class SpikeConfig(Strict):
    """What counts as a spike of the loss or of the gradient norm, and what happens then."""

    window_steps: int = Field(200, ge=2)
    """Number of preceding steps whose mean and standard deviation a step is compared with; until there are as many,
    nothing counts as a spike."""
    threshold: float = Field(7.0, gt=0)
    """How many standard deviations above the mean a spike begins."""
    action: Literal["warn", "stop"] = "warn"
    """``stop`` ends the run once a spike has lasted for ``train.max_bad_steps`` steps."""


class LogConfig(Strict):
    """Metrics: ``metrics.jsonl``, trackers and the progress line."""

    every_steps: int = Field(10, gt=0)
    """Steps between two lines of metrics; values are means over them."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device in TFLOP/s, for MFU; the fastest matrix product measured at the start unless given."""
    images: bool = True
    """Draw the routing heat map at every evaluation."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=["tensorboard"])
    """Where metrics, images, config and code state go besides the run folder; no tracker slows or stops a run.
    Addresses and keys come from the trackers' own environment variables: ``MLFLOW_TRACKING_URI``, ``WANDB_API_KEY``,
    ``WANDB_MODE``."""
    project: str = Field("hopscotch", min_length=1)
    """wandb, mlflow: the project or experiment that the run belongs to; the run is named after its folder."""


class ProfileConfig(Strict):
    """A trace of a few steps from every rank, in ``RUN/profile``; ``launch.profile`` summarises it."""

    steps: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
    """The first and the last step of the trace, numbered as in the log; two to ten steps are enough. Avoid the first
    steps of a start, which are slower than the rest."""
    memory: bool = False
    """On a GPU also a memory snapshot with the stacks of allocations, for pytorch.org/memory_viz; these are recorded
    from the start of the run, so that the snapshot of an out-of-memory error has them too."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        first, last = self.steps
        if last < first:
            raise ValueError(f"steps must be the first and the last to profile, got {first} and {last}; swap them")
        return self


class TrainConfig(Strict):
    """How to train."""

    run_dir: PathText | None = None
    """Folder of this run: configs, metrics, logs, checkpoints; ``runs/`` and the config file's name unless given."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the weights and the routing noise; the data order has its own."""
    steps: int = Field(gt=0)
    """Optimiser steps of the whole run."""
    stop_at_step: int | None = Field(None, gt=0)
    """Stop after this step, saved and evaluated. Schedules still span ``steps``; a later start with a larger value
    continues the run."""
    global_batch_samples: int = Field(gt=0)
    """Windows in one optimiser step, over all ranks and micro-batches."""
    micro_batch_samples: int = Field(gt=0)
    """Windows in one forward pass of one rank, or of one group of ranks that share them."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of weights and activations in the step; master weights and optimiser state are fp32. ``auto``: bf16 where all
    devices have fast bf16 matrix products, else fp32; decided when the run starts, and a resume keeps its
    checkpoint's."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    clip_norm: float = Field(1.0, ge=0)
    """Gradient clipping: largest norm over all parameters; 0 for no clipping."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the z-loss, the squared log-partition function (PaLM uses 1e-4)."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass instead of storing them."""
    compile: bool = False
    """Compile each layer with torch.compile (needs a C++ compiler on the CPU, Triton on a GPU). ZeRO stages 0 to 2."""
    max_bad_steps: int = Field(5, gt=0)
    """Stop the run after this many steps in a row with a loss or gradient that is not finite."""
    spike: SpikeConfig = SpikeConfig()
    """Steps whose loss or gradient norm is finite but far too large."""
    timeout_s: float = Field(1800.0, gt=0)
    """How long a collective may wait for the other ranks."""
    stall_timeout_s: float = Field(900.0, gt=0)
    """Longest time without progress (a micro-batch, a compilation, a checkpoint that no longer grows); after it the
    stacks of all threads are logged and the run ends."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    log: LogConfig = LogConfig()
    """Metrics."""
    profile: ProfileConfig | None = None
    """Profile of the time and memory of some steps; nothing is profiled unless given."""

    @property
    def last_step(self) -> int:
        """The step after which this start of the run ends."""
        return self.steps if self.stop_at_step is None else min(self.stop_at_step, self.steps)

    def is_logged(self, step: int) -> bool:
        """Whether a line of metrics is written after ``step`` steps."""
        return step % self.log.every_steps == 0 or step == self.last_step

    def progress(self, step: int) -> Progress:
        """Where the run is after ``step`` steps."""
        return Progress(step, self.steps)

    @property
    def samples(self) -> int:
        """Windows of the whole run."""
        return self.steps * self.global_batch_samples

    def refuse_to_start(self) -> None:
        """Refuse settings that no run should start with, although the config of a finished run may hold them.

        Raises:
            ValueError: if the schedule never reaches its peak, a spike would never stop the run, the profiled steps
                come after the run's last, or a timeout is longer than the system can wait.
        """
        schedule, problems = self.schedule, []
        end_step = schedule.end_step if schedule.kind in ("cosine", "warmup_stable_decay") else None
        end, name = (end_step, "train.schedule.end_step") if end_step else (self.steps, "train.steps")
        if end_step and schedule.warmup_steps > end_step:
            problems.append(
                f"train.schedule.warmup_steps ({schedule.warmup_steps}) must not exceed {name} ({end}); set both"
            )
        if schedule.kind == "warmup_stable_decay" and (schedule.decay_steps or 0) > end:
            problems.append(
                f"train.schedule.decay_steps ({schedule.decay_steps}) must not exceed {name} ({end}); set both"
            )
        if self.spike.action == "stop" and self.max_bad_steps >= self.spike.window_steps:
            problems.append(
                f"train.max_bad_steps ({self.max_bad_steps}) must be below train.spike.window_steps "
                f"({self.spike.window_steps}), after which a spike counts as normal and no longer stops the run; "
                "change one of them"
            )
        if self.profile is not None and self.profile.steps[0] > self.steps:
            problems.append(
                f"train.profile.steps {list(self.profile.steps)} must not begin after the run's last step "
                f"({self.steps}); give earlier ones"
            )
        if max(self.timeout_s, self.stall_timeout_s) > _LONGEST_WAIT_S:
            problems.append(
                f"train.timeout_s ({self.timeout_s:g}) and train.stall_timeout_s ({self.stall_timeout_s:g}) must not "
                f"exceed {_LONGEST_WAIT_S:g} seconds, the longest that the system waits; lower them"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def accumulation(self, ranks: int, settings: DeepSpeedSettings) -> int:
        """Micro-batches of one rank in one optimiser step.

        Raises:
            ValueError: if the global batch cannot be divided among ``ranks`` that share windows as ``settings`` say, or
                the ranks cannot be divided into such groups.
        """
        groups = settings.groups(ranks)
        what = "ranks" if groups == ranks else "groups that share windows"
        one_pass = self.micro_batch_samples * groups
        if self.global_batch_samples % one_pass:
            more = -(-self.global_batch_samples // one_pass) * one_pass
            fewer = [m for m in range(1, self.micro_batch_samples) if self.global_batch_samples % (m * groups) == 0]
            other = f", or train.micro_batch_samples={fewer[-1]}" if fewer else ""
            raise ValueError(
                f"train.global_batch_samples ({self.global_batch_samples}) must be divisible by "
                f"micro_batch_samples x {what} ({self.micro_batch_samples} x {groups} = {one_pass}); "
                f"set train.global_batch_samples={more}{other}"
            )
        return self.global_batch_samples // one_pass


class DeepSpeedSettings(Strict):
    """What DeepSpeed does with the model's state."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is partitioned over the ranks: nothing, optimiser state, + gradients, + parameters."""
    sequence_parallel: int = Field(1, gt=0)
    """How many neighbouring ranks share every window, each with a part of its tokens: for windows whose activations do
    not fit on one device. The number of ranks must be a multiple of it, and ``sequence_tokens`` a multiple of twice it.
    A run can be resumed with any other value."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in CPU memory: optimiser state (stages 1 to 3), and parameters too (stage 3)."""
    persistence_threshold: int = Field(100_000, ge=0)
    """stage 3: parameters with fewer elements stay whole on every rank."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Merged into the generated DeepSpeed JSON, which it must not contradict. Only keys that are known to work here
    with training, saving and resuming: ``KNOWN_EXTRA`` in ``trainer/deepspeed_config.py``."""
    allow_untested: bool = False
    """Let ``extra`` hold other keys too, which are not tested with saving and resuming."""

    def groups(self, ranks: int) -> int:
        """Number of data-parallel workers: ranks, or groups of ranks that share their windows.

        Raises:
            ValueError: if ``ranks`` cannot be divided into such groups.
        """
        if ranks % self.sequence_parallel:
            raise ValueError(
                f"deepspeed.sequence_parallel ({self.sequence_parallel}) must divide the number of ranks ({ranks}), "
                "because each group of that many ranks shares its windows; change one of them"
            )
        return ranks // self.sequence_parallel
