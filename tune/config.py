"""A stage-two run's config: ``base``, ``ensemble``, ``adapter``, ``data``, ``train`` and ``deepspeed`` in one YAML.

The ``model`` block is the base's. It is filled in when the run starts, so that the saved config is complete and can be
run again as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from data.config import File, MixedSource, StreamConfig, refuse_names_twice
from model.config import EnsembleConfig, ModelConfig
from model.flops import Trained
from model.schedules import DensityRamp
from settings import PathText, Strict
from trainer.config import StageConfig
from trainer.config_blocks import DeepSpeedSettings, TrainConfig

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class BaseConfig(Strict):
    """What is tuned."""

    path: PathText
    """A stage-one run (its newest whole checkpoint; in a resume, the one that was tuned), one of its checkpoints, or
    what ``convert.from_hf`` wrote."""
    routers: Literal["frozen", "tuned"] = "frozen"
    """Skip routers stay as they are and decide greedily, or keep learning under the budget, at their schedules' end."""
    density: float | None = Field(None, gt=0, le=1)
    """Target density of tuned routers; the base's unless given."""
    ramp: DensityRamp = DensityRamp()
    """How the target density of tuned routers comes down from 1."""
    seed: int | None = Field(None, ge=0, lt=2**62)
    """Seed of routers of kind ``random``; the base's unless given."""
    cache_states: PathText | None = None
    """Folder that caches the output of frozen first layers for each window, so that it is computed once; for methods
    that train none of them. A window takes sequence_tokens x width numbers, with ``adapter.kind: none`` times the
    ensemble's layers."""
    sha256: str | None = None
    """Hash of the base's manifest: filled in when the run starts, so that a different base is detected."""


class AdapterConfig(Strict):
    """Which weights of the decoder are trained, and how. The ensemble's norms and router always are."""

    kind: Literal["full", "lora", "dora", "none"] = "lora"
    """``full``: all weights. ``lora`` (Hu et al. 2021), ``dora`` (Liu et al. 2024): low-rank updates, through PEFT.
    ``none``: the backbone stays frozen, which needs an ensemble."""
    rank: int = Field(8, ge=1)
    """lora, dora: rank of an update."""
    alpha: float = Field(16.0, gt=0)
    """lora, dora: an update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """lora, dora: share of an adapter's inputs that is dropped in training."""
    targets: list[Projection] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """lora, dora: the projections that carry an adapter."""
    final_norm: bool = False
    """lora, dora, none: train the final norm too, as an ensemble always does; a control to separate the two effects."""
    layers: Literal["all", "early", "late"] = "all"
    """lora, dora: in every layer, only in those before the ensemble's (the paper's parameter-saving variant), or only
    in the ensemble's."""


class ChatConfig(Strict):
    """How a list of messages becomes text: each message as its role's text, then its content, then ``end``."""

    system: str = "System: "
    """Before a system message."""
    user: str = "User: "
    """Before a user's message."""
    assistant: str = "Assistant:"
    """Before an assistant's message, whose content is learned."""
    before_response: str = " "
    """Before an assistant's content, learned with it."""
    end: str = "\n"
    """After every message except the last, an assistant's, which ends with the end-of-document token; not learned."""


class ExampleSource(MixedSource):
    """One named set of examples: JSON lines (.jsonl, compressed or not) or plain text files."""

    files: list[File] = Field(min_length=1)
    """As in stage one: paths or glob patterns (``**`` allowed), read in sorted order."""
    format: Literal["response", "chat", "text", "question"] = "response"
    """``response``: a prompt and a response per line. ``chat``: a list of messages per line, with ``role`` and
    ``content``. ``text``: documents, learned as a whole; longer ones are cut into windows. ``question``: a question per
    line, with its own choices if it has any, as ``evals.harness`` and ``train.evaluation.tasks`` read them."""
    prompt_field: str = "prompt"
    """response: the field with the prompt."""
    response_field: str = "response"
    """response: the field with the response."""
    messages_field: str = "messages"
    """chat: the field with the messages."""
    text_field: str = "text"
    """text: the field or column with the document (.jsonl, .json, .parquet, .csv); any other file is one document."""
    choices: list[str] = Field(default_factory=list)
    """response, in evaluation: the possible responses; the most likely one is compared with the right one."""
    choices_field: str = "choices"
    """response: the field with a line's own choices, used where ``choices`` are not given and the line has it."""


class ExamplesConfig(StreamConfig):
    """From examples to batches: packed into windows, attention confined to its example, loss on responses only."""

    sources: list[ExampleSource] = Field(min_length=1)
    """What to tune on."""
    validation: list[ExampleSource] = Field(default_factory=list)
    """Named sets, evaluated at ``train.evaluation.every_steps``."""
    test: list[ExampleSource] = Field(default_factory=list)
    """Named sets, evaluated in full after the last step only."""
    tokenizer: PathText | None = None
    """Folder of ``tokenizer.model`` or ``tokenizer.json``; the base's unless given."""
    pack: bool = True
    """Several examples per window; otherwise one, and the rest is padding."""
    too_long: Literal["refuse", "leave_out"] = "refuse"
    """An example that does not fit into a window: end with an error, or leave it out and report how many were."""
    chat: ChatConfig = ChatConfig()
    """How messages become text."""

    @model_validator(mode="after")
    def _unique_names(self) -> ExamplesConfig:
        refuse_names_twice(sources=self.sources, validation=self.validation, test=self.test)
        return self


class TuneFile(Strict):
    """A stage-two run as written: :class:`TuneConfig`, except that the model may be left to the base."""

    base: BaseConfig
    """What is tuned."""
    model: ModelConfig | None = None
    """The base's unless given; must equal it if given."""
    ensemble: EnsembleConfig | None = None
    """The late-layer ensemble; the final layer alone unless given."""
    adapter: AdapterConfig = AdapterConfig()
    """Which weights are trained, and how."""
    data: ExamplesConfig
    """Examples and their order."""
    train: TrainConfig
    """Optimisation, evaluation, checkpoints, metrics."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    """ZeRO."""


class TuneConfig(StageConfig):
    """A stage-two run, resolved."""

    base: BaseConfig
    """What is tuned."""
    ensemble: EnsembleConfig | None = None
    """The late-layer ensemble; the final layer alone unless given."""
    adapter: AdapterConfig = AdapterConfig()
    """Which weights are trained, and how."""
    data: ExamplesConfig
    """Examples and their order."""

    @property
    def tokenizer_folder(self) -> Path:
        """See :class:`StageConfig`."""
        assert self.data.tokenizer is not None  # filled in when the run starts
        return Path(self.data.tokenizer)

    def structure(self) -> dict[str, Any]:
        """Fields that determine base, adapter and what the ensemble computes."""
        chosen = {
            "base": self.base.model_dump(mode="json", include={"routers", "seed", "sha256"}),
            "adapter": self.adapter.model_dump(mode="json", exclude={"dropout"}),
            "ensemble": {"layers": None, "temperature": None, "top": None},
        }
        if self.ensemble is not None:
            chosen["ensemble"] = self.ensemble.model_dump(mode="json", include={"layers", "temperature", "top"})
        return {f"{block}.{field}": value for block, fields in chosen.items() for field, value in fields.items()}

    @property
    def frozen_layers(self) -> int:
        """Number of first layers without any trained weight, not counting skip routers."""
        return layers_adapted(self.adapter, self.model.layers, self.ensemble).start

    @property
    def trained(self) -> Trained:
        """Which parts of the decoder get gradients: with adapters the matrices get none."""
        first = self.frozen_layers
        if self.base.routers == "tuned":
            first = min(first, self.model.routed_layers[0])
        read = 0 if self.base.cache_states is None else self.frozen_layers
        return Trained(matrices=self.adapter.kind == "full", first_layer=first, read_layers=read)

    @model_validator(mode="after")
    def _possible_method(self) -> TuneConfig:
        problems = []
        ensemble, adapter, layers = self.ensemble, self.adapter, self.model.layers
        if ensemble is not None and ensemble.layers > layers:
            problems.append(
                f"ensemble.layers ({ensemble.layers}) must not exceed the base's {layers} layers; lower it to at most "
                f"{layers}"
            )
        trains = ensemble is not None or adapter.kind != "none" or adapter.final_norm or self.base.routers == "tuned"
        if not trains:
            problems.append(
                "adapter.kind none without an ensemble and with frozen routers trains nothing; add an ensemble block, "
                "or set adapter.kind to lora, dora or full"
            )
        if adapter.layers == "late" and ensemble is None:
            problems.append(
                "adapter.layers late means the ensemble's layers, and there is no ensemble; add an ensemble block, or "
                "set adapter.layers: all"
            )
        if adapter.kind in ("full", "none") and adapter.layers != "all":
            problems.append(
                f"adapter.layers {adapter.layers} applies to lora and dora, but adapter.kind is {adapter.kind}; leave "
                "adapter.layers out, or set adapter.kind to lora or dora"
            )
        if self.base.cache_states is not None:
            problems += self._why_no_states()
        if adapter.layers == "early" and (ensemble is None or ensemble.layers >= layers):
            problems.append(
                "adapter.layers early means the layers before the ensemble's, and there are none; add an ensemble "
                f"block with fewer layers than the base's {layers}, or set adapter.layers: all"
            )
        if adapter.dropout and self.train.activation_checkpointing:
            problems.append(
                f"adapter.dropout ({adapter.dropout}) must be 0 with train.activation_checkpointing, which would draw "
                "other values when it recomputes; set one of them to 0 or false"
            )
        if self.base.routers == "frozen" and (self.base.density is not None or self.base.ramp != DensityRamp()):
            problems.append(
                "base.density and base.ramp apply to tuned routers, but base.routers is frozen; set it to tuned, or "
                "leave them out"
            )
        if self.base.routers == "tuned" and not self.model.sites:
            problems.append("base.routers tuned needs skip routers, but the base is a dense model; set it to frozen")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _why_no_states(self) -> list[str]:
        """Reasons that forbid ``base.cache_states``, a sentence each."""
        problems = []
        if not self.frozen_layers:
            others = "adapter.kind: none" + ("" if self.adapter.kind == "full" else " or adapter.layers: late")
            problems.append(
                f"base.cache_states caches the output of frozen first layers, but adapter.kind {self.adapter.kind} "
                f"with adapter.layers {self.adapter.layers} trains the first one; set {others}, or leave "
                "base.cache_states out"
            )
        if self.model.sites:
            problems.append(
                "base.cache_states needs a dense base, but this one has routers, whose decisions are counted in every "
                "step; leave it out"
            )
        if self.deepspeed.zero_stage == 3:
            problems.append(
                "base.cache_states needs deepspeed.zero_stage 0, 1 or 2: at 3 all ranks must run the same layers, and "
                "they find different windows; lower it"
            )
        if self.deepspeed.sequence_parallel > 1:
            problems.append(
                "base.cache_states caches the states of whole windows, but deepspeed.sequence_parallel "
                f"({self.deepspeed.sequence_parallel}) divides each among ranks; set that to 1, or leave "
                "base.cache_states out"
            )
        return problems


def layers_adapted(adapter: AdapterConfig, layers: int, ensemble: EnsembleConfig | None) -> range:
    """The layers, counted from 0, in which ``adapter`` trains; an empty range after the last with ``kind: none``."""
    if adapter.kind == "none":
        return range(layers, layers)
    if adapter.layers == "all" or adapter.kind == "full" or ensemble is None:
        return range(layers)
    first_late = max(layers - ensemble.layers, 0)
    return range(first_late) if adapter.layers == "early" else range(first_late, layers)
