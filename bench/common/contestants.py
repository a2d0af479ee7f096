"""Models that the benchmarks train: our decoder, dense or routed, and Hugging Face's Llama of the same sizes.

A step is what a user's loop does: zero_grad, forward with loss, backward, AdamW (fused, for all alike).

A routed decoder runs the whole learned router: its logits, noise, soft gate and their gradients. But an untrained
router would execute about half of the tokens at any density setting, so its decisions are replaced by independent draws
at the requested density. Rows of a batch then differ in length, as they do in training.

Dimension letters: B samples, T tokens a sample, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.memory import peak_bytes, tensor_bytes
from bench.common.options import PEER
from model import noise
from model.chunks import IGNORE_INDEX
from model.config import Capacity, ModelConfig, RouterConfig
from model.decoder import Decoder, RoutingRecord
from model.flops import TRAINING_FACTOR, Routed, dense_flops, training_flops
from model.init import initialise
from model.router import Gate, LearnedRouter, RoutingInputs


def random_tokens(samples: int, tokens: int, vocab: int, device: torch.device) -> Tensor:
    """int64 [B, T], the same on every device."""
    return torch.randint(vocab, (samples, tokens), generator=torch.Generator().manual_seed(0)).to(device)


class _Place:
    """Position of a decoding pass's single token, read from its tensor once for all routers."""

    def __init__(self) -> None:
        self._inputs: RoutingInputs | None = None
        self._place = 0

    def of(self, inputs: RoutingInputs) -> int:
        if inputs is not self._inputs:
            self._inputs, self._place = inputs, int(inputs.positions)
        return self._place


class HeldRouter(LearnedRouter):
    """A learned router at full cost with decisions replaced by draws at the requested density, per position and site.

    Args:
        config, width, site: as for a learned router.
        place: shared by all routers of a decoder.

    Attributes:
        draws: bool [B, T], for the largest B and T (or context length) that it will see; see :func:`draw`.
        hold: always true, but only known at run time, so that a compiler cannot drop the logits in training.
    """

    draws: Tensor
    hold: Tensor

    def __init__(self, config: RouterConfig, width: int, site: int, place: _Place):
        super().__init__(config, width, site)
        self.register_buffer("draws", torch.ones(0, 0, dtype=torch.bool), persistent=False)
        self.register_buffer("hold", torch.tensor(True), persistent=False)
        self._place = place
        self._cut: tuple[Tensor, ...] = ()
        self._cut_from: Tensor | None = None

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D] -> decisions [B, T]."""
        gate = super().forward(x, inputs)
        if x.shape[1] == 1 and x.is_cpu and not self.training:  # decoding: adds almost nothing to the router's cost
            return gate._replace(logits=self._column(x.shape[0], self._place.of(inputs)))
        drawn = self.draws[: x.shape[0]].index_select(1, inputs.positions)
        if not self.training:
            return gate._replace(decided=drawn)
        executed = torch.where(self.hold, drawn, gate.executed)
        explored = None if gate.explored is None else self._explored(executed, inputs)[0]
        soft = executed.float() + (gate.value - gate.value.detach())
        return gate._replace(decided=executed, soft=soft, explored=explored)

    def _column(self, rows: int, place: int) -> Tensor:
        """Logits for ``draws`` of the first ``rows`` at a position, fp32 [rows, 1, 2]."""
        if self._cut_from is not self.draws or len(self._cut[0]) != rows:
            logits = torch.stack((~self.draws, self.draws), dim=-1)[:rows].float()
            self._cut, self._cut_from = logits.split(1, dim=1), self.draws
        return self._cut[place]


def held_decoder(config: ModelConfig, device: torch.device, dtype: torch.dtype, recompute: bool = False) -> Decoder:
    """Our decoder with random weights and, if routed, held routers; call :func:`draw` before running it."""
    decoder = Decoder(config, recompute=recompute)
    if config.router is not None:
        place = _Place()
        for site, layer in enumerate(decoder.layers):
            layer.router = HeldRouter(config.router, config.width, site, place)
    initialise(decoder, config, seed=0)
    return decoder.to(device, dtype)


def draw(decoder: Decoder, samples: int, tokens: int, exact_from: int | None = None) -> None:
    """Draw the held routers' decisions for up to ``samples`` x ``tokens``, the same for each position every time.

    From position ``exact_from`` on, if given, every row executes exactly its share of tokens at every site, at random
    positions: over a few dozen tokens, independent draws would be off by several hundredths.
    """
    device = decoder.embed_tokens.weight.device
    rows, places = torch.arange(samples, device=device), torch.arange(tokens, device=device)
    for site, router in enumerate(module for module in decoder.modules() if isinstance(module, HeldRouter)):
        if router.draws.shape == (samples, tokens):
            continue
        u = noise.uniform(0, rows, site, places)
        draws = u < router.config.density
        if exact_from is not None:
            rank = u[:, exact_from:].argsort(dim=1).argsort(dim=1)
            draws[:, exact_from:] = rank < round(router.config.density * rank.shape[1])
        router.draws = draws


def held_llama(
    config: ModelConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Hugging Face's Llama with our dense decoder's sizes and ``weights``; the model and its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    llama_config = LlamaConfig(**sizes)
    llama: Any = LlamaForCausalLM(llama_config)
    llama.load_state_dict({llama_name(name): weight for name, weight in weights.items()})
    return llama.to(device, dtype), llama_config


def llama_name(name: str) -> str:
    """What Hugging Face's Llama calls a weight of our dense decoder."""
    return name if name.startswith("lm_head") else f"model.{name}"


class Contestant:
    """A model in training on one batch.

    Attributes:
        model: what is trained.
        config: its sizes and router.
        tokens: the batch, int64 [B, T]; see :meth:`feed`.
        peak_bytes: peak memory of a step of this model alone; None until it is measured.
    """

    def __init__(self, model: nn.Module, config: ModelConfig):
        self.model, self.config = model, config
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.tokens = torch.empty(0, 0, dtype=torch.int64)
        self.peak_bytes: int | None = None

    def feed(self, tokens: Tensor, targets: Tensor | None = None) -> None:
        """Train on ``tokens`` [B, T] from now on; ``targets`` [B, T] default to the next tokens."""
        self.tokens = tokens

    def loss(self) -> Tensor:
        """Mean loss over the batch, a scalar tensor."""
        raise NotImplementedError

    def counts(self) -> Routed:
        """What the last step executed."""
        keys = self.tokens.numel() * (self.tokens.shape[1] + 1) / 2
        return Routed(self.tokens.numel(), keys, [], [])

    def step(self) -> float:
        """One training step; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def forget(self) -> None:
        """Drop the last step's gradients."""
        self.optimizer.zero_grad()

    def measure_peak(self) -> None:
        """Take one step and record its peak memory; needs an earlier step, which creates the optimiser state."""
        self.forget()
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        device = self.tokens.device
        held = [*self.model.parameters(), *self.model.buffers(), *states]
        own = tensor_bytes(t for t in held if t.device == device)
        self.peak_bytes = own + peak_bytes(self.step, device)

    def density(self) -> float:
        """Share of tokens that the routed sites executed in the last step; 1 for a dense model."""
        counts, sites = self.counts(), len(self.config.sites)
        return sum(counts.executed_tokens) / (counts.tokens * sites) if sites else 1.0

    def flops(self) -> tuple[float, float]:
        """Forward FLOPs of the last step: executed, and what they would be without routers.

        Exploration has no backward pass, so a third of its FLOPs is counted.
        """
        counts = self.counts()
        executed = training_flops(self.config, counts) / TRAINING_FACTOR
        return executed, dense_flops(self.config, counts.tokens, counts.visible_keys)


class Ours(Contestant):
    """Our decoder.

    Args:
        decoder: on its device; from :func:`held_decoder`.
        compiled: have torch.compile fuse its layers.
    """

    def __init__(self, decoder: Decoder, compiled: bool = False):
        super().__init__(decoder, decoder.config)
        self.decoder = decoder
        self._counts: tuple[Tensor, ...] | None = None
        self._capacity: Capacity | None = None
        if compiled:
            decoder.compile_layers()

    def feed(self, tokens: Tensor, targets: Tensor | None = None) -> None:
        """Train on ``tokens`` [B, T] from now on; ``targets`` [B, T] default to the next tokens."""
        super().feed(tokens)
        draw(self.decoder, *tokens.shape)
        if targets is None:
            targets = torch.full_like(tokens, IGNORE_INDEX)
            targets[:, :-1] = tokens[:, 1:]
        self._targets = targets
        self._valid = (targets != IGNORE_INDEX).sum()
        self._sample_ids = torch.arange(len(tokens), device=tokens.device)
        router = self.config.router
        if router is not None:
            self._capacity = router.capacity(tokens.shape[1], router.density)

    def loss(self) -> Tensor:
        """Mean loss over the batch, a scalar tensor."""
        out = self.decoder(self.tokens, self._targets, sample_ids=self._sample_ids, capacity=self._capacity)
        self._counts = _detached(out.routing)
        return out.loss.loss / self._valid

    def forget(self) -> None:
        """Drop the last step's gradients and counts."""
        super().forget()
        self._counts = None

    def counts(self) -> Routed:
        """What the last step executed, from the decoder's own record."""
        assert self._counts is not None
        executed, attended, explored, explored_keys = (count.tolist() for count in self._counts[1:])
        visible = float(self._counts[0])
        return Routed(self.tokens.numel(), visible, executed, attended, None, explored, explored_keys)


class Peer(Contestant):
    """Hugging Face's Llama as a user trains it: ``labels=``, SDPA.

    Args:
        llama: on its device; from :func:`held_llama`.
        config: our dense model's, of the same sizes.
    """

    def __init__(self, llama: Any, config: ModelConfig):
        super().__init__(llama.train(), config)
        self.call: Callable[..., Any] = llama
        self.note: str | None = None

    def compile_if_it_works(self) -> None:
        """Compile the whole model with ``torch.compile``; if that fails, keep it uncompiled and note why."""
        plain, self.call = self.call, torch.compile(self.model)
        try:
            self.step()
        except Exception as error:  # whatever a compiler may raise; the peer must not end our run
            self.call = plain
            self.note = f"{PEER} is not compiled: torch.compile failed with {type(error).__name__}"
        else:
            self.note = f"{PEER} is compiled with torch.compile"

    def loss(self) -> Tensor:
        """Mean loss over the batch, a scalar tensor."""
        return self.call(input_ids=self.tokens, labels=self.tokens).loss


class Tuned(Contestant):
    """A model with some weights trained, on its own loss.

    Args:
        model: on its device, frozen weights marked by ``requires_grad``.
        config: its sizes.
        loss: returns the mean loss over its batch.
    """

    def __init__(self, model: nn.Module, config: ModelConfig, loss: Callable[[], Tensor]):
        super().__init__(model, config)
        self._loss = loss

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def loss(self) -> Tensor:
        """Mean loss over the batch, a scalar tensor."""
        return self._loss()


def assert_same(ours: float, peers: float, dtype: torch.dtype) -> None:
    """Both dense models must compute the same thing before anything is timed."""
    assert math.isclose(ours, peers, rel_tol=1e-5 if dtype == torch.float32 else 1e-2), (ours, peers)


def _detached(record: RoutingRecord) -> tuple[Tensor, ...]:
    """The counts without the densities, whose graph would keep a step's memory alive."""
    executed, explored = (record.executed_tokens, record.attended_keys), (record.explored_tokens, record.explored_keys)
    return (record.visible_keys, *executed, *explored)
