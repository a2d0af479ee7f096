"""The decoder: embedding, layers, final norm, LM head, and the record of what was routed.

Module names follow Hugging Face's Llama without the ``model.`` prefix, so that an export is a rename.

Dimension letters: B batch, T tokens, N scored tokens, V vocabulary, S routed sites, D width, k late layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from model.block import Block, Decision, PassInputs
from model.cache import KVCache
from model.chunks import IGNORE_INDEX
from model.compilation import raise_recompile_limit
from model.config import Capacity, EnsembleConfig, ModelConfig
from model.ensemble import LateLayers, Vote, VoteSums, vote_sums
from model.head import Distillation, LMHead, LossSums, Scores
from model.norm import RMSNorm
from model.record import RoutingRecord
from model.rotary import rotation
from model.router import Centres, RoutingInputs
from model.sequence import SequenceGroup
from model.visibility import Visibility


@dataclass(frozen=True)
class DecoderOutput:
    """Logits [B, T, V] or, where targets were given, loss sums over them or scores; and the routing decisions."""

    logits: Tensor | None
    loss: LossSums | None
    routing: RoutingRecord
    scores: Scores | None = None
    """With ``score``: each late layer alone, the final one last, then the ensemble; C = k + 1, or 1 without it."""
    vote: Vote | None = None
    """The late layers' vote; only on the scored tokens if ``scored_targets`` or ``places`` was given."""
    vote_sums: VoteSums | None = None
    """The same, summed over tokens with a target."""


class FrozenStates(Protocol):
    """Caches what the first layers compute for a batch, where none of their weights are trained.

    Attributes:
        layers: how many first layers.
    """

    layers: int

    def __call__(
        self, read: list[Tensor | None], states: int, dtype: torch.dtype, compute: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """Residual streams [B, T, D] after the last ``states`` of them.

        Args:
            read: tokens, documents and positions, int64 [B, T] each.
            states: how many streams.
            dtype: of the streams.
            compute: computes those of the whole batch, where they are not cached.
        """
        ...


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
        routed = list(config.routed_layers)
        self.layers = nn.ModuleList(
            Block(config, layer, routed.index(layer) * sites_per_layer if layer in routed else 0)
            for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.ensemble: LateLayers | None = None
        self._compiled = False
        self.lockstep = False
        """Every rank must call the same modules in generation, too: ZeRO 3."""
        self.thresholds: Tensor | None = None
        """fp32 [S], what the margins of learned routers are compared with; 0 unless set. See ``model/budget.py``."""
        self.centres: Centres | None = None
        """In training: what soft gates are centred on; the thresholds unless set."""
        self.frozen: FrozenStates | None = None
        """Called instead of the first layers, which must be dense; not in generation."""
        self.lm_head = LMHead(config.width, config.vocab_size)
        if config.tied_head:
            self.lm_head.weight = self.embed_tokens.weight

    def add_ensemble(self, config: EnsembleConfig) -> None:
        """Let the last layers vote from now on; the norms begin as copies of the final one.

        Raises:
            ValueError: if the decoder has fewer layers.
        """
        if config.layers > len(self.layers):
            raise ValueError(
                f"ensemble.layers ({config.layers}) must not exceed the decoder's {len(self.layers)} layers; lower it"
            )
        self.ensemble = LateLayers(config, self.norm)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        sample_ids: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        padding: Tensor | None = None,
        noise_scale: Tensor | float = 1.0,
        temperature: Tensor | float = 1.0,
        z_coefficient: float = 0.0,
        cache: KVCache | None = None,
        capacity: Capacity | None = None,
        thresholds: Tensor | None = None,
        scored_targets: int | None = None,
        places: Tensor | None = None,
        score: bool = False,
        sequence: SequenceGroup | None = None,
    ) -> DecoderOutput:
        """Run the model.

        Args:
            tokens: int64 [B, T].
            targets: int64 [B, T], -100 where no loss is taken; without them logits are returned.
            sample_ids: int64 [B], the samples' global numbers for the routing noise; zeros unless given.
            documents: int64 [B, T]; attention stays within a run of equal numbers. One document unless given. With
                ``sequence``, of the whole window.
            positions: int64 [B, T], rotary positions; counted from the cache's length unless given.
            padding: int64 [B], how many tokens at the beginning of each row of the cache are padding; routers count
                positions after them, so that a row is routed as it would be alone.
            noise_scale: scale of the routers' Gumbel noise; used in training mode only.
            temperature: of the soft gate; used in training mode only.
            z_coefficient: weight of the z-loss.
            cache: KV cache to read and extend.
            capacity: how many tokens of a row a routed site computes; as many as routers decide unless given. Used in
                training mode only.
            thresholds: fp32 [S]; a learned router executes a token whose margin (execute logit minus skip logit)
                reaches its site's; the decoder's own unless given.
            scored_targets: N, how many targets are not -100; where given, norm and head run on their tokens alone.
            places: int64 [N], indices of tokens in the flattened batch; where given, ``targets`` is int64 [N], what
                follows each of them, and norm and head run on those tokens alone. An index may occur more than once.
            score: score every late layer and the ensemble on each token, instead of a loss; needs ``scored_targets`` or
                ``places``.
            sequence: the ranks that share these windows; ``tokens`` are this rank's part. Not with a cache.

        Raises:
            ValueError: for a cache with a router that is not causal, a full cache, or thresholds of the wrong shape.
        """
        late, record = self.late_states(
            tokens,
            sample_ids=sample_ids,
            documents=documents,
            positions=positions,
            padding=padding,
            noise_scale=noise_scale,
            temperature=temperature,
            cache=cache,
            capacity=capacity,
            thresholds=thresholds,
            sequence=sequence,
        )
        if targets is None:
            hidden, vote = self._read_out(late)
            return DecoderOutput(self.lm_head(hidden), None, record, vote=vote)
        if scored_targets is not None:
            places = torch.nonzero_static(targets.flatten() != IGNORE_INDEX, size=scored_targets).squeeze(1)
            targets = targets.flatten().index_select(0, places)
        if places is not None:
            late = [state.flatten(0, 1).index_select(0, places) for state in late]
        hidden, vote = self._read_out(late)
        if score:
            candidates = (hidden,) if vote is None else (*vote.normed, hidden)
            return DecoderOutput(None, None, record, self.lm_head(hidden, targets, candidates=candidates), vote)
        if vote is None:
            return DecoderOutput(None, self.lm_head(hidden, targets, z_coefficient), record)
        return self._ensemble_loss(vote, targets, z_coefficient, record)

    def late_states(
        self,
        tokens: Tensor,
        *,
        sample_ids: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        padding: Tensor | None = None,
        noise_scale: Tensor | float = 1.0,
        temperature: Tensor | float = 1.0,
        cache: KVCache | None = None,
        capacity: Capacity | None = None,
        thresholds: Tensor | None = None,
        sequence: SequenceGroup | None = None,
    ) -> tuple[list[Tensor], RoutingRecord]:
        """Run embedding and layers; the arguments are those of :meth:`forward`.

        Returns:
            The residual streams [B, T, D] that norm and head would read: after the last layer, and where there is an
            ensemble after each late layer, in order; and what was routed.
        """
        past = 0 if cache is None else cache.length
        length = tokens.shape[1]
        if sequence is None:
            steps = torch.arange(past, past + length, device=tokens.device)
        else:
            steps = sequence.positions(length, tokens.device)
        if sample_ids is None:
            sample_ids = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        noise, soft = _scalar(noise_scale, tokens), _scalar(temperature, tokens)
        room = capacity if self.training else None
        explored = None if room is None else room.explored
        held = self._held(thresholds, tokens.device)
        routed = steps if padding is None else (steps - padding[:, None]).clamp(min=0)
        routing = RoutingInputs(
            sample_ids, routed, noise, soft, self.seed, held, self.centres, explored, self.recompute, sequence
        )
        inputs = self._pass_inputs(tokens, steps, documents, positions, cache, routing, room)
        return self._run_layers(tokens, documents, positions, inputs)

    def _pass_inputs(
        self,
        tokens: Tensor,
        steps: Tensor,
        documents: Tensor | None,
        positions: Tensor | None,
        cache: KVCache | None,
        routing: RoutingInputs,
        capacity: Capacity | None,
    ) -> PassInputs:
        """What every layer of this pass shares; the tokens are at the positions ``steps``, int64 [T]."""
        batch, length = tokens.shape
        if cache is not None:
            documents = self._open_cache(cache, length, documents)
        if positions is None and cache is not None:
            cos, sin = cache.rotation(length)
        else:
            places = (steps if positions is None else positions).expand(batch, -1)
            cos, sin = rotation(self.config, places, self.embed_tokens.weight.dtype)
        shared = 1 if routing.sequence is None else routing.sequence.size
        keys = length * shared if cache is None else cache.length + length
        visibility = Visibility(steps, keys, documents)
        on_host = length == 1 and tokens.is_cpu and not torch.compiler.is_compiling()
        return PassInputs(cos, sin, visibility, routing, cache, self.recompute, capacity, on_host, self.lockstep)

    def _run_layers(
        self, tokens: Tensor, documents: Tensor | None, positions: Tensor | None, inputs: PassInputs
    ) -> tuple[list[Tensor], RoutingRecord]:
        """Residual stream after each of the last layers that are needed, [B, T, D], and the record of routing."""
        decisions: list[Decision] = []
        asked = 1 if self.ensemble is None else self.ensemble.config.layers
        late: deque[Tensor] = deque(maxlen=asked)
        plain = self._compiled and inputs.cache is not None  # a cache's layer number would need a graph for each

        def run(x: Tensor, first: int, end: int) -> None:
            for layer in self.layers[first:end]:
                x, decided = layer.forward(x, inputs) if plain else layer(x, inputs)
                decisions.extend(decided)
                late.append(x)

        layers = len(self.layers)
        if self.frozen is None or inputs.cache is not None:
            run(self.embed_tokens(tokens), 0, layers)
        else:
            frozen = self.frozen.layers
            needed = max(asked - (layers - frozen), 1)

            def compute() -> list[Tensor]:
                run(self.embed_tokens(tokens), 0, frozen)
                return list(late)[-needed:]

            states = self.frozen([tokens, documents, positions], needed, self.embed_tokens.weight.dtype, compute)
            late.clear()
            late.extend(states)
            run(states[-1], frozen, layers)
        if inputs.cache is not None:
            inputs.cache.advance(tokens.shape[1])
        return list(late), RoutingRecord(decisions, inputs.visibility, len(tokens))

    def _read_out(self, late: list[Tensor]) -> tuple[Tensor, Vote | None]:
        """What the head reads, [..., D], from the last layers' residual streams; and the vote, if there is one."""
        if self.ensemble is None:
            return self.norm(late[-1]), None
        vote = self.ensemble(late, self.norm)
        return vote.mixed, vote

    def _ensemble_loss(self, vote: Vote, targets: Tensor, z_coefficient: float, record: RoutingRecord) -> DecoderOutput:
        """Loss of the ensemble, distillation included."""
        assert self.ensemble is not None
        config: EnsembleConfig = self.ensemble.config
        teaching = None
        if config.distillation:
            teaching = Distillation(vote.normed[:-1], vote.normed[-1], config.distillation_temperature)
        sums = self.lm_head(vote.mixed, targets, z_coefficient, teaching)
        sums = sums._replace(loss=sums.loss + config.distillation * sums.distillation)
        return DecoderOutput(None, sums, record, vote=vote, vote_sums=vote_sums(vote.weights, targets))

    def compile_layers(self) -> None:
        """Have torch.compile fuse each layer from the next call on; state dict and results stay the same.

        All layers share one graph, in which the number of executed tokens is a symbol: nothing is recompiled as
        densities drift.
        """
        self._compiled = True
        raise_recompile_limit()
        for layer in self.layers:
            layer.compile(dynamic=None)

    def _held(self, thresholds: Tensor | None, device: torch.device) -> Tensor | None:
        """The ``thresholds`` given, or else the decoder's own, checked and moved to ``device``."""
        thresholds = self.thresholds if thresholds is None else thresholds
        if thresholds is None:
            return None
        if thresholds.shape != (len(self.config.sites),):
            raise ValueError(
                f"thresholds must hold one number for each of the {len(self.config.sites)} routed sites, got a tensor "
                f"of shape {list(thresholds.shape)}"
            )
        return thresholds.to(device)

    def _open_cache(self, cache: KVCache, length: int, documents: Tensor | None) -> Tensor | None:
        self.config.require_causal("it cannot generate token by token")
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
