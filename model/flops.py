"""Parameter and FLOP counts that follow the measured routing.

Counted: matrix products, two FLOPs per multiply-add, and the attention's two products over the keys that each query
actually saw. A routed site always pays for its keys and values and for its router; queries, output projection,
attention and feed-forward are paid for by the tokens that executed, the head by those whose logits are computed.
A skipped token that is computed only to fill up a shape (a filler of model/selection.py) is not counted.

Left out, as is usual: norms, rotary, softmax, activations, the embedding lookup, the optimiser, and what activation
checkpointing recomputes; and of a late-layer ensemble, its router and the logits inside the distillation term.
Training counts three times the forward pass, because each product has two gradients of the same cost; gradients that
:class:`Trained` excludes are not counted. Explored tokens are counted once: they have a forward pass only. Adapters are
left out: rank 8 in every matrix of a 135 M model is 2 % of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from model.config import ModelConfig, Site

TRAINING_FACTOR = 3


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: ``embedding``, ``layers``, ``routers``, ``norms``, ``head`` (0 if tied) and ``total``."""
    d, k = config.width, config.head_dim
    attention = d * k * (2 * config.heads + 2 * config.kv_heads)
    counts = {
        "embedding": config.vocab_size * d,
        "layers": config.layers * (attention + 3 * d * config.ffn_width),
        "routers": len(config.sites) * 2 * d if _has_weights(config) else 0,
        "norms": (2 * config.layers + 1) * d + (2 * k * config.layers if config.qk_norm else 0),
        "head": 0 if config.tied_head else config.vocab_size * d,
    }
    return {**counts, "total": sum(counts.values())}


@dataclass(frozen=True)
class Trained:
    """Which parts of a decoder a run trains, for counting its backward pass.

    Attributes:
        matrices: the backbone's own matrices have gradients, and so has the head.
        first_layer: the first layer, from 0, that trains anything: no gradient goes further down. The number of layers
            where none does.
        read_layers: number of first layers whose states are read from a cache, not computed.
    """

    matrices: bool = True
    first_layer: int = 0
    read_layers: int = 0


EVERYTHING = Trained()


@dataclass(frozen=True)
class Routed:
    """Counts of what ran, summed over some tokens (a batch, a step, a run).

    Attributes:
        tokens: how many tokens passed through the model.
        visible_keys: keys that they would see in one layer without a router.
        executed_tokens: per routed site, tokens that executed.
        attended_keys: per routed site, keys that those tokens saw.
        head_tokens: tokens whose logits were computed; all of them unless given.
        explored_tokens: per routed site, skipped tokens whose gates learned from what it would have added; none unless
            given.
        explored_keys: per routed site, keys that those saw.
    """

    tokens: float
    visible_keys: float
    executed_tokens: list[float]
    attended_keys: list[float]
    head_tokens: float | None = None
    explored_tokens: list[float] | None = None
    explored_keys: list[float] | None = None


def full_windows(config: ModelConfig, tokens: float, sequence_tokens: int, density: float) -> Routed:
    """Counts of training on ``tokens`` in whole windows of one document each, every routed site at ``density``."""
    visible, sites = tokens * (sequence_tokens + 1) / 2, len(config.sites)
    router = config.router
    explored = router.explore * (1 - density) if router is not None and router.explores else 0.0
    counts = [[share * total] * sites for share in (density, explored) for total in (tokens, visible)]
    return Routed(tokens, visible, counts[0], counts[1], explored_tokens=counts[2], explored_keys=counts[3])


def density_of(flops: Callable[[float], float], wanted: float) -> float:
    """The density at which ``flops``, linear in it, are ``wanted``; it may lie outside [0, 1]."""
    half, whole = flops(0.5), flops(1.0)
    return 1 + (wanted - whole) / (2 * (whole - half))


def training_flops(config: ModelConfig, counts: Routed, trained: Trained = EVERYTHING) -> float:
    """Forward and backward FLOPs of training on ``counts``, exploration included."""
    # Forward, the gradient of the input, and that of the matrix; for attention's products, those of both inputs.
    matrices = TRAINING_FACTOR if trained.matrices else TRAINING_FACTOR - 1
    total = matrices * _head_flops(config, counts) + _explored_flops(config, counts)
    for number, layer in enumerate(_layer_flops(config, counts)):
        if number >= trained.first_layer:
            total += matrices * layer.matrices + TRAINING_FACTOR * layer.attended
        elif number >= trained.read_layers:
            total += layer.matrices + layer.attended
    return total


def executed_flops(config: ModelConfig, counts: Routed) -> float:
    """Forward FLOPs that were spent on ``counts``."""
    layers = _layer_flops(config, counts)
    return _head_flops(config, counts) + sum(layer.matrices + layer.attended for layer in layers)


class _Layer(NamedTuple):
    """Forward FLOPs of a layer: of products with its matrices, and of queries with keys and of weights with values."""

    matrices: float
    attended: float


def _layer_flops(config: ModelConfig, counts: Routed) -> list[_Layer]:
    cost = _Costs(config)
    always = cost.keys_values
    skippable = cost.attention + cost.ffn
    plain = _Layer(counts.tokens * (always + skippable), counts.visible_keys * cost.per_key)
    layers = [plain] * config.layers
    for number in config.routed_layers:
        layers[number] = _Layer(counts.tokens * always, 0.0)
    router = cost.router if _has_weights(config) else 0
    for site, tokens, keys in zip(config.routed_sites, counts.executed_tokens, counts.attended_keys, strict=True):
        spent = _site_flops(site, cost, tokens, keys)
        before = layers[site.layer]
        matrices = before.matrices + counts.tokens * router + spent.matrices
        layers[site.layer] = _Layer(matrices, before.attended + spent.attended)
    return layers


def _head_flops(config: ModelConfig, counts: Routed) -> float:
    return _Costs(config).head * (counts.tokens if counts.head_tokens is None else counts.head_tokens)


def _explored_flops(config: ModelConfig, counts: Routed) -> float:
    """FLOPs of the explored tokens' forward pass, which reads the keys and values of the executed tokens' pass."""
    if config.router is None or not config.router.explores or counts.explored_tokens is None:
        return 0.0
    assert counts.explored_keys is not None
    sites = zip(config.routed_sites, counts.explored_tokens, counts.explored_keys, strict=True)
    return sum(sum(_site_flops(site, _Costs(config), tokens, keys)) for site, tokens, keys in sites)


def _site_flops(site: Site, cost: _Costs, tokens: float, keys: float) -> _Layer:
    """What a routed site spends on ``tokens`` that see ``keys``."""
    attention = tokens * cost.attention if site.attends else 0.0
    return _Layer(
        attention + (tokens * cost.ffn if site.feeds_forward else 0.0), keys * cost.per_key if site.attends else 0.0
    )


def dense_flops(config: ModelConfig, tokens: float, visible_keys: float, head_tokens: float | None = None) -> float:
    """Forward FLOPs of the same tokens in the model of the same size without routers."""
    return executed_flops(without_routers(config), Routed(tokens, visible_keys, [], [], head_tokens))


def without_routers(config: ModelConfig) -> ModelConfig:
    """The dense model of the same size."""
    return config.model_copy(update={"router": None})


def site_shares(config: ModelConfig, sequence_tokens: int) -> list[float]:
    """Each routed site's share of the skippable FLOPs of all sites, at full windows; sums to 1."""
    cost = _Costs(config)
    keys = (sequence_tokens + 1) / 2
    weights = {
        "attention": cost.attention + keys * cost.per_key,
        "ffn": cost.ffn,
        "layer": cost.attention + keys * cost.per_key + cost.ffn,
    }
    costs = [weights[site.module] for site in config.routed_sites]
    return [c / sum(costs) for c in costs]


class _Costs:
    """Forward FLOPs of the parts, per token (``per_key``: per pair of query and key)."""

    def __init__(self, config: ModelConfig):
        d, k = config.width, config.head_dim
        self.head = 2 * d * config.vocab_size
        self.keys_values = 2 * d * 2 * config.kv_heads * k
        self.attention = 2 * d * config.heads * k * 2
        self.per_key = 2 * 2 * config.heads * k
        self.ffn = 2 * 3 * d * config.ffn_width
        self.router = 2 * 2 * d


def layer_elements(config: ModelConfig) -> int:
    """Entries of the matrices of one layer."""
    cost = _Costs(config)
    return (cost.keys_values + cost.attention + cost.ffn) // 2


def _has_weights(config: ModelConfig) -> bool:
    return config.router is not None and config.router.kind in ("learned", "expert_choice")
