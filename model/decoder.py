"""The decoder: embedding, layers, final norm, LM head, and the record of what was routed.

Module names follow Hugging Face's Llama without the ``model.`` prefix, so that an export is a rename.

Dimension letters: B batch, T tokens, V vocabulary, S routed sites.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.block import Block, Decision, PassInputs
from model.cache import KVCache
from model.config import ModelConfig
from model.head import LMHead, LossSums
from model.norm import RMSNorm
from model.record import RoutingRecord
from model.rotary import rotation
from model.router import RoutingInputs
from model.visibility import Visibility


@dataclass(frozen=True)
class DecoderOutput:
    """Logits [B, T, V] or, where targets were given, loss sums over them; and the routing record."""

    logits: Tensor | None
    loss: LossSums | None
    routing: RoutingRecord


class Decoder(nn.Module):
    """A decoder-only language model in which tokens may skip layers.

    Args:
        config: sizes and router.
        seed: of the routing noise; weights are drawn by ``model.init.initialise``.
        recompute: activation checkpointing per layer.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, recompute: bool = False):
        super().__init__()
        self.config, self.seed, self.recompute = config, seed, recompute
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        sites_per_layer = len(config.sites) // max(len(config.routed_layers), 1)
        first = config.routed_layers.start
        self.layers = nn.ModuleList(
            Block(config, layer, (layer - first) * sites_per_layer) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.lm_head = LMHead(config.width, config.vocab_size)
        if config.tied_head:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        sample_ids: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        noise_scale: Tensor | float = 1.0,
        temperature: Tensor | float = 1.0,
        z_coefficient: float = 0.0,
        cache: KVCache | None = None,
        capacity_tokens: int | None = None,
        thresholds: Tensor | None = None,
    ) -> DecoderOutput:
        """Run the model.

        Args:
            tokens: int64 [B, T].
            targets: int64 [B, T], -100 where no loss is taken; without them logits are returned.
            sample_ids: int64 [B], the samples' global numbers for the routing noise; zeros unless given.
            documents: int64 [B, T]; attention stays within a run of equal numbers. One document unless given.
            positions: int64 [B, T], rotary positions; counted from the cache's length unless given.
            noise_scale: scale of the routers' Gumbel noise; used in training mode only.
            temperature: of the soft gate; used in training mode only.
            z_coefficient: weight of the z-loss.
            cache: KV cache to read and extend.
            capacity_tokens: most tokens of a row that a routed site executes, first come first served along the row;
                no limit unless given. Used in training mode only.
            thresholds: fp32 [S]; a learned router executes a token whose margin (execute logit minus skip logit)
                reaches its site's; 0 unless given. Used in evaluation mode only.

        Raises:
            ValueError: for a cache with a router that is not causal, a full cache, or thresholds of another model.
        """
        batch, length = tokens.shape
        past = 0 if cache is None else cache.length
        steps = torch.arange(past, past + length, device=tokens.device)
        x = self.embed_tokens(tokens)
        if cache is not None:
            documents = self._open_cache(cache, length, documents)
        if positions is None and cache is not None:
            cos, sin = cache.rotation(length)
        else:
            cos, sin = rotation(self.config, (steps if positions is None else positions).expand(batch, -1), x.dtype)
        if sample_ids is None:
            sample_ids = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        noise, soft = _scalar(noise_scale, tokens), _scalar(temperature, tokens)
        routing = RoutingInputs(sample_ids, steps, noise, soft, self.seed, self._checked(thresholds))
        visibility = Visibility(length, past, documents, tokens.device)
        room = capacity_tokens if self.training else None
        inputs = PassInputs(cos, sin, visibility, routing, cache, self.recompute, room)
        decisions: list[Decision] = []
        for layer in self.layers:
            x, decided = layer(x, inputs)
            decisions += decided
        if cache is not None:
            cache.advance(length)
        out = self.lm_head(self.norm(x), targets, z_coefficient)
        record = RoutingRecord(decisions, visibility, batch)
        return DecoderOutput(out, None, record) if targets is None else DecoderOutput(None, out, record)

    def compile_layers(self) -> None:
        """Have torch.compile fuse each layer from the next call on; state dict and results stay the same.

        All layers share one graph, and a count of executed tokens that changes is one symbol in it: nothing is
        compiled again as densities drift.
        """
        for layer in self.layers:
            layer.compile(dynamic=None)

    def _checked(self, thresholds: Tensor | None) -> Tensor | None:
        if thresholds is not None and thresholds.shape != (len(self.config.sites),):
            raise ValueError(
                f"thresholds must hold one number for each of the {len(self.config.sites)} routed sites, got a tensor "
                f"of shape {list(thresholds.shape)}"
            )
        return thresholds

    def _open_cache(self, cache: KVCache, length: int, documents: Tensor | None) -> Tensor | None:
        router = self.config.router
        if router is not None and router.kind == "expert_choice":
            raise ValueError(
                "router.kind expert_choice picks tokens by looking at later ones, so it cannot generate token by "
                "token; use a causal kind: learned, random or stride"
            )
        cache.reserve(length)
        if documents is None:
            if not cache.has_documents:
                return None
            raise ValueError("the cache was started with documents; give the new tokens' documents too")
        return cache.append_documents(documents)


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like.device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=like.device)
