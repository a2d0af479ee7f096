"""One decoder layer: attention and SwiGLU feed-forward behind RMSNorms, with or without routers.

    dense      x + attention, then + feed-forward, for every token
    layer      one router decides on both together; a skipped token passes unchanged
    module     two routers, one for the attention and one for the feed-forward

Keys and values are computed for every token in all three. Gradients reach a router through the gate's value, which
multiplies what the site adds to the residual stream, and through the price of the budget (``model/budget.py``).

Dimension letters: B batch, T tokens, N executed tokens, D width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention
from model.cache import KVCache
from model.config import Capacity, ModelConfig, RouterConfig
from model.linear import Linear
from model.norm import RMSNorm
from model.router import ROUTERS, Gate, RoutingInputs
from model.selection import Selection
from model.visibility import Visibility


@dataclass(frozen=True)
class PassInputs:
    """What every layer of one forward pass shares.

    Attributes:
        cos, sin: rotation of the tokens, [B, T, K].
        visibility: which keys each query sees.
        routing: what routers read; None for a dense model.
        cache: the KV cache to append to, if any.
        recompute: activation checkpointing: recompute a layer's inside in the backward pass.
        capacity: how many tokens of a row a routed site computes; None where shapes follow the decisions.
    """

    cos: Tensor
    sin: Tensor
    visibility: Visibility
    routing: RoutingInputs | None
    cache: KVCache | None
    recompute: bool
    capacity: Capacity | None = None


class Decision(NamedTuple):
    """What a router asked for and what was done.

    Attributes:
        gate: the router's answer.
        executed: bool [B, T], tokens that execute: the gate's, less those beyond the capacity.
        selection: the tokens that are computed.
        explored: skipped tokens for which the site's output is computed without a gradient of its own, and not added.
    """

    gate: Gate
    executed: Tensor
    selection: Selection
    explored: Selection | None = None


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
            return self._run(inputs, self._dense, x), []
        if self.routed.granularity == "layer":
            return self._layer_routed(x, inputs, self.routed)
        return self._module_routed(x, inputs, self.routed)

    def _dense(self, x: Tensor, inputs: PassInputs) -> Tensor:
        selection = Selection.everything(*x.shape[:2])
        update = self._layer_update(x, self.input_layernorm(x), selection, inputs)
        return selection.add(x, update)

    def _layer_routed(self, x: Tensor, inputs: PassInputs, config: RouterConfig) -> tuple[Tensor, list[Decision]]:
        h = self.input_layernorm(x)
        decision = _decide(self.router(h if config.input == "normed" else x, inputs.routing), config, inputs)
        if _nothing_to_do(decision, inputs):
            self._write_keys_values(h, inputs)
            return x, [decision]
        missed = _missed(decision, inputs, self._layer_update, x, h)
        update = self._run(inputs, self._layer_update, x, h, decision.selection)
        return _add(x, update, missed, decision, config), [decision]

    def _module_routed(self, x: Tensor, inputs: PassInputs, config: RouterConfig) -> tuple[Tensor, list[Decision]]:
        h = self.input_layernorm(x)
        attention = _decide(self.attention_router(h if config.input == "normed" else x, inputs.routing), config, inputs)
        if _nothing_to_do(attention, inputs):
            self._write_keys_values(h, inputs)
        else:
            missed = _missed(attention, inputs, self._attention_update, h)
            update = self._run(inputs, self._attention_update, h, attention.selection)
            x = _add(x, update, missed, attention, config)

        h = self.post_attention_layernorm(x)
        ffn = _decide(self.ffn_router(h if config.input == "normed" else x, inputs.routing), config, inputs)
        if not _nothing_to_do(ffn, inputs):
            missed = _missed(ffn, inputs, self._ffn_update, h)
            update = self._run(inputs, self._ffn_update, h, ffn.selection)
            x = _add(x, update, missed, ffn, config)
        return x, [attention, ffn]

    def _layer_update(self, x: Tensor, h: Tensor, selection: Selection, inputs: PassInputs) -> Tensor:
        """What attention and feed-forward together add to the selected tokens, [N, D]."""
        attended = self._attention_update(h, selection, inputs)
        return attended + self.mlp(self.post_attention_layernorm(selection.gather(x) + attended))

    def _attention_update(self, h: Tensor, selection: Selection, inputs: PassInputs) -> Tensor:
        keys, values = self._keys_values(h, inputs)
        cos, sin = selection.gather(inputs.cos), selection.gather(inputs.sin)
        return self.self_attn(h, keys, values, cos, sin, selection, inputs.visibility)

    def _keys_values(self, h: Tensor, inputs: PassInputs) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, the cached ones included, [B, S, G, K] each."""
        if inputs.cache is None:
            return self.self_attn.keys_values(h, inputs.cos, inputs.sin)
        self._write_keys_values(h, inputs)
        return inputs.cache.read(self.layer, h.shape[1])

    def _write_keys_values(self, h: Tensor, inputs: PassInputs) -> None:
        assert inputs.cache is not None
        inputs.cache.write(self.layer, *self.self_attn.keys_values(h, inputs.cos, inputs.sin))

    def _ffn_update(self, h: Tensor, selection: Selection, inputs: PassInputs) -> Tensor:
        return self.mlp(selection.gather(h))

    def _run(self, inputs: PassInputs, part: Callable[..., Tensor], *args: Tensor | Selection) -> Tensor:
        """Call ``part``; with activation checkpointing drop its inside and recompute it for the backward pass.

        Decisions are taken outside, so that the recomputation sees the same executed tokens.
        """
        if inputs.recompute and torch.is_grad_enabled():
            return checkpoint(part, *args, inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*args, inputs)


def _decide(gate: Gate, config: RouterConfig, inputs: PassInputs) -> Decision:
    room, explored = inputs.capacity, None
    if gate.explored is not None:
        explored = Selection.of(gate.explored) if room is None else Selection.capped(gate.explored, room.explored)[0]
    if config.execution == "reference":
        batch, tokens = gate.executed.shape
        return Decision(gate, gate.executed, Selection.everything(batch, tokens, exact=False), explored)
    if room is not None:
        selection, executed = Selection.capped(gate.executed, room.executed)
        return Decision(gate, executed, selection, explored)
    return Decision(gate, gate.executed, Selection.of(gate.executed), explored)


def _nothing_to_do(decision: Decision, inputs: PassInputs) -> bool:
    """True where generation may leave a site out. In training its modules run on no rows, for ZeRO's collectives."""
    return inputs.cache is not None and decision.selection.size == 0


def _weigh(update: Tensor, decision: Decision, config: RouterConfig) -> Tensor:
    """Multiply an update [N, D] by its tokens' gate values; executed tokens' gates learn from it."""
    if config.causal and not torch.is_grad_enabled():  # these values are 1, and 0 for fillers
        if decision.selection.exact:
            return update
        executed = decision.selection.gather(decision.executed)
        return torch.where(executed[:, None], update, 0.0)  # no product: what a filler gives need not be finite
    value = torch.where(decision.executed, decision.gate.value, decision.gate.value.detach())
    return update * decision.selection.gather(value)[:, None].to(update.dtype)


def _missed(decision: Decision, inputs: PassInputs, part: Callable[..., Tensor], *args: Tensor) -> Tensor | None:
    """What ``part`` would have added to the explored tokens, [N, D], without a gradient of its own.

    Before the executed tokens' pass: under ZeRO 3 a module's last call in the forward pass must be the one that has a
    backward pass, or its weights are not released there.
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
    value = torch.where(gate.executed, 0.0, gate.value)  # 0 for all: fillers may be tokens that were to execute
    return decision.explored.add(x, missed * decision.explored.gather(value)[:, None].to(missed.dtype))
