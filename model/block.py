"""One decoder layer: attention and SwiGLU feed-forward, each after an RMSNorm, with or without routers.

    dense      x + attention, then + feed-forward, for every token
    layer      one router decides on both together; a skipped token passes unchanged
    module     two routers, one for the attention and one for the feed-forward

Keys and values are computed for every token in all three. Gradients reach a router through the gate's value, which
multiplies what the site adds to the residual stream, and through the price of the budget (``model/budget.py``).

Dimension letters: B batch, T tokens, N executed tokens, D width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention
from model.cache import KeysValues, KVCache
from model.config import Capacity, ModelConfig, RouterConfig
from model.linear import Linear
from model.norm import RMSNorm
from model.router import ROUTERS, Gate, RoutingInputs
from model.selection import Selection
from model.sequence import SequenceGroup
from model.visibility import Visibility


@dataclass(frozen=True)
class PassInputs:
    """What every layer of one forward pass shares.

    Attributes:
        cos, sin: rotation of the tokens, [B, T, K].
        visibility: which keys each query sees.
        routing: what routers read.
        cache: the KV cache to append to, if any.
        recompute: activation checkpointing: recompute a layer's activations in the backward pass.
        capacity: how many tokens of a row a routed site computes; None where shapes depend on the decisions.
        one_on_host: every row has one token, and the host reads decisions at no cost: decoding on a CPU.
        lockstep: every rank must call the same modules, because ZeRO 3 gathers their parameters collectively.
    """

    cos: Tensor
    sin: Tensor
    visibility: Visibility
    routing: RoutingInputs
    cache: KVCache | None
    recompute: bool
    capacity: Capacity | None = None
    one_on_host: bool = False
    lockstep: bool = False

    @property
    def sequence(self) -> SequenceGroup | None:
        """The ranks that share the windows; None where every rank has whole ones."""
        return self.routing.sequence


class Decision(NamedTuple):
    """What a router asked for and what was done.

    Attributes:
        gate: the router's answer.
        selection: the tokens that are computed.
        explored: skipped tokens for which the site's output is computed without a gradient of its own, and not added.
        kept: bool [B, T], tokens that execute, where a capacity may have dropped some; None: all that the gate selects.
    """

    gate: Gate
    selection: Selection
    explored: Selection | None = None
    kept: Tensor | None = None

    @property
    def executed(self) -> Tensor:
        """bool [B, T], tokens that execute."""
        return self.gate.executed if self.kept is None else self.kept

    def with_gate(self, gate: Gate) -> Decision:
        """The same decisions, with everything else from ``gate``."""
        return self._replace(gate=gate._replace(decided=self.gate.executed, explored=self.gate.explored))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.width, config.ffn_width)
        self.up_proj = Linear(config.width, config.ffn_width)
        self.down_proj = Linear(config.ffn_width, config.width)

    def forward(self, h: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Block(nn.Module):
    """Decoder layer number ``layer``; its routed sites are numbered from ``first_site``."""

    def __init__(self, config: ModelConfig, layer: int, first_site: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = FeedForward(config)
        self.routed = config.router if layer in config.routed_layers else None
        if self.routed is not None:
            make = ROUTERS[self.routed.kind]
            if self.routed.granularity == "layer":
                self.router = make(self.routed, config.width, first_site)
            else:
                self.attention_router = make(self.routed, config.width, first_site)
                self.ffn_router = make(self.routed, config.width, first_site + 1)

    def forward(self, x: Tensor, inputs: PassInputs) -> tuple[Tensor, list[Decision]]:
        """x: [B, T, D] -> [B, T, D] and the decisions of this layer's routed sites, in site order."""
        if self.routed is None:
            return self._dense(x, inputs), []
        if self.routed.granularity == "layer":
            sites = [_Site(self.router, self.input_layernorm, self._layer_update, True)]
        else:
            first, second = self.input_layernorm, self.post_attention_layernorm
            sites = [
                _Site(self.attention_router, first, self._attention_update, True),
                _Site(self.ffn_router, second, self._ffn_update, False),
            ]
        decisions = []
        for site in sites:
            x, decision = self._routed(site, self.routed, x, inputs)
            decisions.append(decision)
        return x, decisions

    def _dense(self, x: Tensor, inputs: PassInputs) -> Tensor:
        selection = Selection.everything(*x.shape[:2])

        def update(x: Tensor) -> Tensor:
            h = self.input_layernorm(x)
            return self._layer_update(x, h, self._keys_values(h, inputs), selection, inputs)

        return selection.add(x, _recomputed(update, x) if _recomputes(inputs) else update(x))

    def _routed(self, site: _Site, config: RouterConfig, x: Tensor, inputs: PassInputs) -> tuple[Tensor, Decision]:
        """Apply ``site``: ``x`` plus its update, and its decision."""

        def gate(x: Tensor, h: Tensor) -> Gate:
            return site.router(h if config.input == "normed" else x, inputs.routing)

        def keys_values(h: Tensor) -> KeysValues | None:
            return self._keys_values(h, inputs) if site.attends else None

        h, recomputes = site.norm(x), _recomputes(inputs)
        shared = None if recomputes else keys_values(h)  # before the router, to overlap with its work
        decision = _decide(gate(x, h), config, inputs)
        if _nothing_to_do(decision, inputs):
            return x, decision
        if not recomputes:
            missed = _missed(decision, inputs, site.part, x, h, shared)
            update = site.part(x, h, shared, decision.selection, inputs)
            return _add(x, update, missed, decision, config), decision
        missed = None
        if decision.explored is not None:
            with torch.no_grad():  # keys and values, too: the backward pass computes its own
                missed = _missed(decision, inputs, site.part, x, h, keys_values(h))

        # Only masks and the explored tokens' missed updates are kept from above: the norm's output, which is as large
        # as x, and the gate are recomputed, for the tokens that were decided here.
        taken = decision._replace(
            gate=Gate(decision.gate.executed, explored=decision.gate.explored),
            selection=replace(decision.selection, recomputed=True),
        )

        def whole(x: Tensor, missed: Tensor | None) -> tuple[Tensor, Gate]:
            h = site.norm(x)
            shared = keys_values(h)
            decision = taken.with_gate(gate(x, h))
            update = site.part(x, h, shared, decision.selection, inputs)
            return _add(x, update, missed, decision, config), decision.gate

        x, learning = _recomputed(whole, x, missed)
        return x, taken.with_gate(learning)

    def _layer_update(
        self, x: Tensor, h: Tensor, shared: KeysValues | None, selection: Selection, inputs: PassInputs
    ) -> Tensor:
        """Update of the selected tokens by attention and feed-forward together, [N, D]."""
        attended = self._attention_update(x, h, shared, selection, inputs)
        return attended + self.mlp(self.post_attention_layernorm(selection.gather(x) + attended))

    def _attention_update(
        self, x: Tensor, h: Tensor, shared: KeysValues | None, selection: Selection, inputs: PassInputs
    ) -> Tensor:
        assert shared is not None
        cos, sin = selection.gather(inputs.cos), selection.gather(inputs.sin)
        return self.self_attn(h, shared, cos, sin, selection, inputs.visibility)

    def _ffn_update(
        self, x: Tensor, h: Tensor, shared: KeysValues | None, selection: Selection, inputs: PassInputs
    ) -> Tensor:
        return self.mlp(selection.gather(h))

    def _keys_values(self, h: Tensor, inputs: PassInputs) -> KeysValues:
        """Keys and values of all tokens, including cached ones and other ranks'; new ones go into the cache, if any."""
        project = self.self_attn.keys_values
        if inputs.cache is not None:
            return inputs.cache.append(self.layer, h, inputs.cos, inputs.sin, project)
        keys, values = project(h, inputs.cos, inputs.sin)
        if inputs.sequence is not None:
            return inputs.sequence.keys_values(keys, values)
        return lambda: (keys, values)


@dataclass(frozen=True)
class _Site:
    """A routed site.

    Attributes:
        router: decides for each token.
        norm: applied to the residual stream.
        part: computes the update of the selected tokens, [N, D], from the residual stream, the normed stream, and all
            tokens' keys and values.
        attends: contains attention, which needs keys and values of every token.
    """

    router: nn.Module
    norm: RMSNorm
    part: Callable[[Tensor, Tensor, KeysValues | None, Selection, PassInputs], Tensor]
    attends: bool


def _recomputes(inputs: PassInputs) -> bool:
    return inputs.recompute and inputs.cache is None and torch.is_grad_enabled()


def _recomputed(part: Callable[..., Any], *args: Tensor | None) -> Any:
    """Activation checkpointing: ``part(*args)``; its activations are dropped and recomputed in the backward pass."""
    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)


def _decide(gate: Gate, config: RouterConfig, inputs: PassInputs) -> Decision:
    room, explored = inputs.capacity, None
    if gate.explored is not None:
        explored, _ = _select(gate.explored, None if room is None else room.explored, inputs.sequence)
    if inputs.one_on_host and room is None and config.execution != "reference":
        return Decision(gate, Selection.of_rows(gate.rows()), explored)
    gate = gate._replace(decided=gate.executed)  # computed once for all readers
    if config.execution == "reference":
        batch, tokens = gate.executed.shape
        return Decision(gate, Selection.everything(batch, tokens, exact=False), explored)
    selection, kept = _select(gate.executed, None if room is None else room.executed, inputs.sequence)
    return Decision(gate, selection, explored, kept)


def _select(wanted: Tensor, capacity: int | None, sequence: SequenceGroup | None) -> tuple[Selection, Tensor | None]:
    """The tokens of ``wanted``, bool [B, T], to compute; and those a capacity kept, counted over the whole window."""
    if capacity is None:
        return Selection.of(wanted), None
    if sequence is None:
        return Selection.capped(wanted, capacity)
    kept = wanted & sequence.local_part(sequence.all_gather(wanted).cumsum(dim=1) <= capacity)
    return Selection.of(kept), kept  # a rank's number of them varies from step to step


def _nothing_to_do(decision: Decision, inputs: PassInputs) -> bool:
    """True where generation may skip a site. Elsewhere its modules run on zero rows, for ZeRO's collectives."""
    return inputs.cache is not None and not inputs.lockstep and decision.selection.size == 0


def _weigh(update: Tensor, decision: Decision, config: RouterConfig) -> Tensor:
    """Multiply an update [N, D] by its tokens' gate values; executed tokens' gates learn from it."""
    if config.causal and not torch.is_grad_enabled():  # these values are 1, and 0 for fillers
        if decision.selection.exact:
            return update
        executed = decision.selection.gather(decision.executed)
        return torch.where(executed[:, None], update, 0.0)  # not a product: a filler's output may be non-finite
    value = torch.where(decision.executed, decision.gate.value, 0.0)  # 0 for dropped tokens, too
    return update * decision.selection.gather(value)[:, None].to(update.dtype)


def _missed(decision: Decision, inputs: PassInputs, part: Callable[..., Tensor], *args: Any) -> Tensor | None:
    """What ``part`` would have added to the explored tokens, [N, D], without a gradient of its own.

    Called before the executed tokens' pass: under ZeRO 3 a module's last call in the forward pass must be the one that
    has a backward pass, or its weights are not released there.
    """
    if decision.explored is None:
        return None
    with torch.no_grad():
        return part(*args, decision.explored, inputs)


def _add(x: Tensor, update: Tensor, missed: Tensor | None, decision: Decision, config: RouterConfig) -> Tensor:
    """``x`` [B, T, D] with executed tokens' updates; explored tokens' gates learn what they missed."""
    x = decision.selection.add(x, _weigh(update, decision, config))
    if missed is None or decision.explored is None:
        return x
    gate = decision.gate
    value = torch.where(gate.executed, 0.0, gate.value)  # 0 for all: fillers may be tokens that execute
    return decision.explored.add(x, missed * decision.explored.gather(value)[:, None].to(missed.dtype))
