"""The ``model`` block of a run's config: the decoder's sizes and its ``router`` block.

A dense model is a model without a ``router`` block; that block is the only difference between
``configs/dense_160m.yaml`` and ``configs/skip_160m.yaml``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from model.schedules import DensityRamp, Ramp
from settings import Strict


class Site(NamedTuple):
    """A routed site: a whole layer, or one of its two modules."""

    module: Literal["layer", "attention", "ffn"]
    layer: int
    """Its number, from 0."""

    @property
    def name(self) -> str:
        """``layer-03``, ``attention-03`` or ``ffn-03``."""
        return f"{self.module}-{self.layer:02d}"

    @property
    def attends(self) -> bool:
        """Whether attention is part of it."""
        return self.module != "ffn"

    @property
    def feeds_forward(self) -> bool:
        """Whether the feed-forward is part of it."""
        return self.module != "attention"


class RopeScaling(Strict):
    """Scaling of the rotary frequencies, for contexts longer than a model was trained on."""

    kind: Literal["linear", "llama3"]
    """``linear`` divides every frequency; ``llama3`` divides only the low ones (as Llama 3.1 does)."""
    factor: float = Field(gt=0)
    """By how much the context length grows."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: wavelengths above original_positions / this are divided by factor."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: wavelengths below original_positions / this stay as they are."""
    original_positions: int = Field(8192, gt=0)
    """llama3: the context length, in tokens, before scaling."""

    @model_validator(mode="after")
    def _a_band_between(self) -> RopeScaling:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor ({self.high_freq_factor}) must be larger than low_freq_factor "
                f"({self.low_freq_factor}); Llama 3.1 has 4 and 1"
            )
        return self


class BudgetConfig(DensityRamp):
    """What keeps the router at its density: a price, in nats per unit of density, on every routed site.

    See ``model/budget.py`` for the formulas. The paper's setting is ``per_layer``, coefficient 0.1, no warm-up,
    ``fixed``.
    """

    kind: Literal["per_layer", "global"] = "per_layer"
    """``per_layer`` holds every site at the target (Zeng et al.); ``global`` only their FLOP-weighted mean."""
    coefficient: float = Field(0.1, ge=0)
    """Weight of the squared density error in the loss."""
    controller: Literal["fixed", "adaptive", "quantile"] = "fixed"
    """``adaptive`` adds an integral term, so that the target is met whatever the coefficient. ``quantile`` sets no
    price: each site's threshold follows the quantile of its margins at the target density, so that routers learn from
    gain alone."""
    adaptive_rate: float = Field(0.001, gt=0)
    """adaptive: how far the price moves in one step, in nats per unit of density error."""

    @model_validator(mode="after")
    def _one_density(self) -> BudgetConfig:
        if self.controller == "quantile" and self.kind == "global":
            raise ValueError(
                "budget.controller 'quantile' holds every site at the target, but budget.kind 'global' lets sites "
                "differ; set kind: per_layer, or controller: adaptive"
            )
        return self


class Capacity(NamedTuple):
    """How many tokens of a window a routed site computes in training, whatever routers decide: static shapes.

    Attributes:
        executed: the most tokens that execute, first come first served along the window.
        explored: skipped tokens for which the site's output is computed for their gates to learn from, drawn from all
            of the window's; all of them where there are fewer.
    """

    executed: int
    explored: int = 0


class RouterConfig(Strict):
    """Which tokens a layer executes. ``learned`` is the method; the other kinds are baselines at the same density."""

    kind: Literal["learned", "random", "stride", "expert_choice"] = "learned"
    """``expert_choice`` (Raposo et al. 2024) looks at the whole sequence: not causal, refused for generation."""
    density: float = Field(gt=0, le=1)
    """Target share of tokens that a routed site executes: the paper's P."""
    granularity: Literal["layer", "module"] = "layer"
    """One decision per layer, or one for its attention and one for its feed-forward."""
    input: Literal["normed", "raw"] = "normed"
    """What the learned router reads: the layer's RMS-normed input, or the residual stream as in the paper."""
    always_on_first: int = Field(0, ge=0)
    """How many first layers have no router and execute every token."""
    always_on_last: int = Field(0, ge=0)
    """How many last layers have no router and execute every token."""
    layers: Literal["all", "every_other"] | list[int] = "all"
    """Which layers between those have a router: all; every other, beginning with the second (Raposo et al. 2024); or a
    list of their numbers, which count from 0."""
    noise: Ramp = Ramp(start=1.0, end=0.0, until=0.6)
    """Scale of the Gumbel noise on the logits in training; the paper's is 1 throughout."""
    temperature: Ramp = Ramp(start=1.0, end=1.0, until=1.0)
    """Temperature of the soft gate, which provides the hard gate's gradient."""
    execution: Literal["rounded", "capacity", "reference"] = "rounded"
    """How executed tokens are computed in training: ``rounded`` gathers them all, ``capacity`` a fixed number per
    window (static shapes, overflow dropped), ``reference`` computes every token and masks (slow). Evaluation and
    generation never drop."""
    capacity_factor: float = Field(1.25, ge=1)
    """capacity: room for this times the target density, rounded up to whole blocks of 128 tokens per window."""
    explore: float = Field(0.0, ge=0, le=1)
    """learned: share of skipped tokens for which training computes, forward only, what the site would have added, for
    their gates to learn from. 1 is textbook straight-through; with 0 only executed tokens' gates learn from the loss.
    With ``execution: capacity`` it is a fixed number per window: this share of those skipped at the target density,
    rounded up to whole blocks of 16 tokens."""
    budget: BudgetConfig = BudgetConfig()
    """How the learned router is held at its density."""

    @model_validator(mode="after")
    def _consistent(self) -> RouterConfig:
        if self.execution == "capacity" and self.budget.kind == "global":
            raise ValueError(
                "router.execution 'capacity' gives every site the same capacity, but router.budget.kind 'global' lets "
                "sites differ; set execution: rounded, or budget.kind: per_layer"
            )
        for name in ("noise", "temperature"):
            ramp = getattr(self, name)
            if min(ramp.start, ramp.end) < 0 or (name == "temperature" and min(ramp.start, ramp.end) == 0):
                raise ValueError(f"router.{name} must stay positive, got {ramp.start} to {ramp.end}")
        return self

    @property
    def learned(self) -> bool:
        """Whether this is the method itself: a learned decision for each token alone."""
        return self.kind == "learned"

    @property
    def causal(self) -> bool:
        """Whether no decision depends on later tokens, as generation and likelihoods need."""
        return self.kind != "expert_choice"

    @property
    def explores(self) -> bool:
        """Whether skipped tokens are computed in training, too."""
        return self.learned and self.explore > 0

    def capacity(self, tokens: int, target: float) -> Capacity | None:
        """Room for a window of ``tokens`` at density ``target``; None where shapes depend on the decisions."""
        if self.execution != "capacity":
            return None
        explored = self.explore * (1 - self.density) * tokens if self.explores else 0.0
        return Capacity(
            _whole_blocks(target * self.capacity_factor * tokens, 128, tokens), _whole_blocks(explored, 16, tokens)
        )


def _whole_blocks(wanted: float, block: int, most: int) -> int:
    """``wanted`` tokens rounded up to whole blocks, and no more than ``most``."""
    return min(math.ceil(wanted / block) * block, most)


def _layout_problems(router: RouterConfig, layers: int, routed: Sequence[int]) -> list[str]:
    """Why a model of ``layers`` layers cannot be routed as its router block says."""
    if not routed:
        named = "" if router.layers == "all" else f" and layers {router.layers}"
        return [
            f"router.always_on_first ({router.always_on_first}) + always_on_last ({router.always_on_last}){named} "
            f"leave none of the {layers} layers to route; lower them, or leave out the router block for a dense model"
        ]
    between = range(router.always_on_first, layers - router.always_on_last)
    if list(routed) != sorted(set(routed)) or not all(layer in between for layer in routed):
        return [
            f"router.layers {list(routed)} must be ascending numbers of layers that may have a router: {between.start} "
            f"to {between.stop - 1} of this model's {layers}"
        ]
    return []


class EnsembleConfig(Strict):
    """The last layers vote on the next token, each through its own norm (Luo and Specia 2024); stage two only."""

    layers: int = Field(3, ge=1)
    """How many last layers vote: the paper's k."""
    temperature: float = Field(1.0, gt=0)
    """Of the softmax over layers; above 1 spreads the weights."""
    top: int | None = Field(None, ge=2)
    """Only this many layers with the largest weights vote on a token; all of them unless given. At least 2: a single
    one would always have weight 1, and the router would learn nothing."""
    start: Literal["fit", "copy"] = "fit"
    """How the other layers' norms are initialised: ``fit`` to the final layer's normed state on some tokens of the
    data, or as a ``copy`` of the final norm."""
    final_weight: float = Field(0.9, gt=0, le=1)
    """Initial weight of the final layer; the others share the rest."""
    open_by: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the vote opens: it starts as the base model, with all weight on the final layer,
    which falls to what ``final_weight`` and the router give it. 0: open from the start."""
    balance: float = Field(0.0, ge=0)
    """Weight of the load-balancing term, which is smallest where all layers vote equally often."""
    distillation: float = Field(0.1, ge=0)
    """Weight of the KL divergence of each late layer's distribution from the final layer's: the paper's lambda."""
    distillation_temperature: float = Field(1.0, gt=0)
    """Both distributions are taken at this temperature, the loss times its square (Hinton et al. 2015)."""

    @model_validator(mode="after")
    def _top_of_layers(self) -> EnsembleConfig:
        if self.top is not None and self.top > self.layers:
            raise ValueError(
                f"ensemble.top ({self.top}) must not exceed ensemble.layers ({self.layers}); lower top, or leave it out"
            )
        return self


class ModelConfig(Strict):
    """Sizes of the decoder (Llama family: RMSNorm, rotary, grouped-query attention, SwiGLU)."""

    vocab_size: int = Field(gt=1)
    """Number of token ids."""
    layers: int = Field(gt=0)
    """Number of decoder layers."""
    width: int = Field(gt=0)
    """Width of the residual stream."""
    heads: int = Field(gt=0)
    """Query heads."""
    kv_heads: int = Field(gt=0)
    """Key/value heads; fewer than ``heads`` is grouped-query attention."""
    head_width: int | None = Field(None, gt=0)
    """Width of one head; width / heads unless given."""
    ffn_width: int = Field(gt=0)
    """Inner width of the SwiGLU feed-forward."""
    max_positions: int = Field(4096, gt=0)
    """Longest context, in tokens; written to exports and the size of a full KV cache."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies; none unless given."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Added to the mean square in every RMSNorm."""
    qk_norm: bool = False
    """RMS-norm queries and keys per head before the rotation."""
    tied_head: bool = False
    """Share one matrix between the token embedding and the LM head."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial weights; see the table in ``model/init.py``."""
    router: RouterConfig | None = None
    """Which tokens each layer executes; every token in every layer (dense) unless given."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def routed_layers(self) -> Sequence[int]:
        """The layers that have a router, in order; empty for a dense model."""
        if self.router is None:
            return range(0)
        between = range(self.router.always_on_first, self.layers - self.router.always_on_last)
        if isinstance(self.router.layers, list):
            return self.router.layers
        return between if self.router.layers == "all" else between[1::2]

    @property
    def routed_sites(self) -> list[Site]:
        """The routed sites in order; none for a dense model."""
        by_layer = self.router is None or self.router.granularity == "layer"
        modules: tuple[Literal["layer", "attention", "ffn"], ...] = ("layer",) if by_layer else ("attention", "ffn")
        return [Site(module, layer) for layer in self.routed_layers for module in modules]

    @property
    def sites(self) -> list[str]:
        """Names of :attr:`routed_sites`: ``layer-03``, or ``attention-03`` and ``ffn-03`` for module routers."""
        return [site.name for site in self.routed_sites]

    def require_causal(self, consequence: str) -> None:
        """Refuse routers that look at later tokens.

        Args:
            consequence: what that means here, as a clause.

        Raises:
            ValueError: with ``consequence`` and the causal kinds.
        """
        if self.router is not None and not self.router.causal:
            raise ValueError(
                f"router.kind {self.router.kind} picks tokens by looking at later ones, so {consequence}; use a causal "
                "kind: learned, random or stride"
            )

    def last_layers(self, count: int) -> list[str]:
        """Names of the last ``count`` layers: ``layer-03`` and so on."""
        return [Site("layer", layer).name for layer in range(self.layers - count, self.layers)]

    @model_validator(mode="after")
    def _possible_sizes(self) -> ModelConfig:
        problems = []
        if self.head_width is None and self.width % self.heads:
            problems.append(
                f"model.width ({self.width}) must be divisible by model.heads ({self.heads}), or give model.head_width"
            )
        elif self.head_dim % 2:
            problems.append(
                f"the head width ({self.head_dim}) must be even, because rotary embeddings rotate pairs of entries"
            )
        if self.heads % self.kv_heads:
            problems.append(f"model.heads ({self.heads}) must be divisible by model.kv_heads ({self.kv_heads})")
        if self.router is not None:
            problems += _layout_problems(self.router, self.layers, self.routed_layers)
        if problems:
            raise ValueError("; ".join(problems))
        return self
