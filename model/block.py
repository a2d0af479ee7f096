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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, Visibility
from model.cache import KVCache
from model.config import ModelConfig, RouterConfig
from model.norm import RMSNorm
from model.router import ROUTERS, Gate, RoutingInputs
from model.selection import Selection


@dataclass(frozen=True)
class PassInputs:
    """What every layer of one forward pass shares.

    Attributes:
        cos, sin: rotation of the tokens, [B or 1, T, K].
        visibility: which keys each query sees.
        routing: what routers read; None for a dense model.
        cache: the KV cache to append to, if any.
        recompute: activation checkpointing: recompute a layer's inside in the backward pass.
    """

    cos: Tensor
    sin: Tensor
    visibility: Visibility
    routing: RoutingInputs | None
    cache: KVCache | None
    recompute: bool


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)

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

    def forward(self, x: Tensor, inputs: PassInputs) -> tuple[Tensor, list[Gate]]:
        """x: [B, T, D] -> [B, T, D] and the decisions of this layer's routed sites, in site order."""
        if self.routed is None:
            return self._run(inputs, self._dense, x), []
        if self.routed.granularity == "layer":
            return self._layer_routed(x, inputs, self.routed)
        return self._module_routed(x, inputs, self.routed)

    def _dense(self, x: Tensor, inputs: PassInputs) -> Tensor:
        everything = Selection.everything(*x.shape[:2])
        h = self.input_layernorm(x)
        return everything.add(x, self._layer_update(x, h, everything, inputs))

    def _layer_routed(self, x: Tensor, inputs: PassInputs, config: RouterConfig) -> tuple[Tensor, list[Gate]]:
        h = self.input_layernorm(x)
        gate = self.router(h if config.input == "normed" else x, inputs.routing)
        selection = _select(gate, config)
        update = self._run(inputs, self._layer_update, x, h, selection)
        return selection.add(x, _weigh(update, gate, selection, config)), [gate]

    def _module_routed(self, x: Tensor, inputs: PassInputs, config: RouterConfig) -> tuple[Tensor, list[Gate]]:
        h = self.input_layernorm(x)
        attention_gate = self.attention_router(h if config.input == "normed" else x, inputs.routing)
        selection = _select(attention_gate, config)
        update = self._run(inputs, self._attention_update, h, selection)
        x = selection.add(x, _weigh(update, attention_gate, selection, config))

        h = self.post_attention_layernorm(x)
        ffn_gate = self.ffn_router(h if config.input == "normed" else x, inputs.routing)
        selection = _select(ffn_gate, config)
        update = self._run(inputs, self._ffn_update, h, selection)
        return selection.add(x, _weigh(update, ffn_gate, selection, config)), [attention_gate, ffn_gate]

    def _layer_update(self, x: Tensor, h: Tensor, selection: Selection, inputs: PassInputs) -> Tensor:
        """What attention and feed-forward together add to the selected tokens, [N, D]."""
        attended = self._attention_update(h, selection, inputs)
        return attended + self.mlp(self.post_attention_layernorm(selection.gather(x) + attended))

    def _attention_update(self, h: Tensor, selection: Selection, inputs: PassInputs) -> Tensor:
        keys, values = self.self_attn.keys_values(h, inputs.cos, inputs.sin)
        if inputs.cache is not None:
            keys, values = inputs.cache.append(self.layer, keys, values)
        cos, sin = (selection.gather(t.expand(*h.shape[:2], -1)) for t in (inputs.cos, inputs.sin))
        return self.self_attn(selection.gather(h), keys, values, cos, sin, selection, inputs.visibility)

    def _ffn_update(self, h: Tensor, selection: Selection, inputs: PassInputs) -> Tensor:
        return self.mlp(selection.gather(h))

    def _run(self, inputs: PassInputs, part: Callable[..., Tensor], *args: Tensor | Selection) -> Tensor:
        """Call ``part``; with activation checkpointing drop its inside and recompute it for the backward pass.

        Decisions are taken outside, so that the recomputation sees the same executed tokens.
        """
        if inputs.recompute and torch.is_grad_enabled():
            return checkpoint(part, *args, inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*args, inputs)


def _select(gate: Gate, config: RouterConfig) -> Selection:
    if config.execution == "reference":
        return Selection.everything(*gate.executed.shape)
    return Selection.of(gate.executed)


def _weigh(update: Tensor, gate: Gate, selection: Selection, config: RouterConfig) -> Tensor:
    """Multiply an update [N, D] by its tokens' gate values, letting gradients through as ``gate_gradient`` says."""
    value = gate.value
    if config.gate_gradient == "executed":
        value = torch.where(gate.executed, value, value.detach())
    return update * selection.gather(value)[:, None].to(update.dtype)
