"""Hopscotch for transformers: a Llama-like decoder in which every token learns which layers to skip.

``convert.to_hf`` copies this file into exports, where ``trust_remote_code=True`` loads it. It needs torch and
transformers (4.51 to 5), nothing else, and its logits are tested against the decoder that trained the weights.

* Routed layers (Zeng et al. 2023, arXiv:2311.15436): a router per layer, or one for its attention and one for its
  feed-forward, decides per token. Keys and values are computed for every token; queries, the output projection and the
  feed-forward only for those that execute: skipped tokens cost no time, nor do they in ``generate``.
* Late-layer ensemble (Luo and Specia 2024, arXiv:2410.13077): the last k layers' normed states are mixed with per-token
  weights before the head, which is linear; so the ensemble's logits cost one head.

Decisions are hard here, in training mode too: routers get no gradient, everything else does.

Dimension letters: B batch, T new tokens, S keys, N executed tokens, C largest number of executed tokens in a row, D
width, H query heads, G key/value heads, K head width, k late layers.
"""

import inspect
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

try:  # transformers 5, which initialises only what a checkpoint does not hold
    from transformers import initialization as init
except ImportError:
    from torch.nn import init  # type: ignore[no-redef]
try:  # newer versions of 5, whose masks for every kind of attention can be made fully explicit
    from transformers.masking_utils import create_causal_mask

    MASKS = "allow_is_causal_skip" in inspect.signature(create_causal_mask).parameters
except ImportError:
    MASKS = False
try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:  # 4.51

    class GradientCheckpointingLayer(nn.Module):  # type: ignore[no-redef]
        """Recomputes its activations in the backward pass if gradient checkpointing is on."""

        gradient_checkpointing = False
        _gradient_checkpointing_func: Callable

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)
            return super().__call__(*args, **kwargs)


class HopscotchConfig(PretrainedConfig):
    """Llama's fields, and those of routers and ensemble."""

    model_type = "hopscotch"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    qk_norm: bool = False
    # Routers: ``learned``, ``random``, ``stride``, or None for a model that is dense.
    router_kind: str | None = None
    router_granularity: str = "layer"  # or "module": attention and feed-forward apart
    router_input: str = "normed"  # or "raw": what a learned router reads
    router_density: float = 1.0  # the share of tokens that it was trained to execute
    router_first_layer: int = 0
    router_end_layer: int = 0  # the first layer after the routed ones
    router_layers: list | None = None  # the routed ones among them; all without a list
    router_seed: int = 0  # for ``random``
    # Thresholds that the margins of ``learned`` routers must reach, by site, None for minus infinity; 0 without a list.
    router_thresholds: list | None = None
    skip_layers: bool = True  # False executes every token everywhere, for comparison
    # ``gather`` computes executed tokens only; ``mask`` computes all and drops the rest: fixed shapes, for compilers.
    execution: str = "gather"
    ensemble_layers: int = 0
    ensemble_temperature: float = 1.0
    ensemble_top: int | None = None


class HopscotchRMSNorm(nn.Module):
    """[..., D] -> [..., D], scaled by the root mean square, computed in fp32."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)


# With one new token per row, batches of up to this many rows are computed whole if any row executes, as the weights
# are read anyway: products of 4, 6, 8, 9 and 16 rows took 11.1, 15.1, 13.2, 13.4 and 14.2 ms (two Zen 4 cores, MKL,
# fp32). In larger batches the rows that execute are gathered.
WHOLE_BATCH = 8


class Rows:
    """The tokens of a [B, T] grid that a site computes.

    Args:
        executed: bool [B, T], or None for all.
        shape: B and T.
        gather: gather the executed tokens; otherwise all are computed, and ``add`` drops the others' results.
    """

    def __init__(self, executed: Tensor | None, shape: tuple[int, int], gather: bool):
        self.batch, self.tokens = shape
        self.kept = None if gather else executed
        self.index: Tensor | None = None
        if executed is not None and gather:
            index = executed.flatten().nonzero().squeeze(-1)
            if self.tokens == 1 and 0 < len(index) < self.batch <= WHOLE_BATCH:
                self.kept = executed
            elif len(index) < executed.numel():
                self.index = index

    @property
    def empty(self) -> bool:
        return self.index is not None and len(self.index) == 0

    def take(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """``x`` [B, T, D] and ``update`` [N, D] -> their sum at the executed tokens, ``x`` elsewhere."""
        if self.index is not None:
            return x.flatten(0, 1).index_add(0, self.index, update.to(x.dtype)).view_as(x)
        added = x + update.view_as(x)
        return added if self.kept is None else torch.where(self.kept[..., None], added, x)

    @cached_property
    def rectangle(self) -> tuple[Tensor, Tensor]:
        """Columns of the executed tokens row by row, int64 [B, C], short rows padded with T - 1; and the flat index of
        every executed token in it, int64 [N]."""
        assert self.index is not None
        if self.tokens == 1:
            return self.index.new_zeros(self.batch, 1), self.index
        row, column = self.index // self.tokens, self.index % self.tokens
        counts = torch.bincount(row, minlength=self.batch)
        width = max(int(counts.max()), 1)
        begins = counts.cumsum(0) - counts
        slots = torch.arange(len(row), device=row.device) - begins[row] + row * width
        columns = column.new_full((self.batch * width,), self.tokens - 1)
        columns[slots] = column
        return columns.view(self.batch, width), slots

    def pad(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [B, C, ...]."""
        if self.index is None:
            return rows.unflatten(0, (self.batch, self.tokens))
        columns, slots = self.rectangle
        return rows.new_zeros(columns.numel(), *rows.shape[1:]).index_copy(0, slots, rows).unflatten(0, columns.shape)

    def unpad(self, grid: Tensor) -> Tensor:
        """[B, C, ...] -> [N, ...]."""
        return grid.flatten(0, 1) if self.index is None else grid.flatten(0, 1).index_select(0, self.rectangle[1])

    def of_mask(self, mask: Any) -> Any:
        """An attention mask [B, 1, T, S] -> that of the rectangle, [B, 1, C, S]."""
        if self.index is None or self.tokens == 1:
            return mask
        columns = self.rectangle[0][:, None, :, None]
        return mask.expand(self.batch, -1, -1, -1).gather(2, columns.expand(-1, mask.shape[1], -1, mask.shape[3]))


class HopscotchRouter(nn.Module):
    """Which tokens a site executes; sites are numbered through the model."""

    def __init__(self, config: HopscotchConfig, site: int):
        super().__init__()
        self.kind, self.site = config.router_kind, site
        self.density, self.seed = config.router_density, config.router_seed
        own = 0.0 if config.router_thresholds is None else config.router_thresholds[site]
        self.threshold = -float("inf") if own is None else own
        if self.kind == "learned":
            self.weight = nn.Parameter(torch.zeros(2, config.hidden_size))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor]:
        """x [B, T, D] and positions int64 [B, T] -> bool [B, T]."""
        if self.kind == "random":
            return (_uniform(self.seed, self.site, positions) < self.density,)
        if self.kind == "stride":
            steps, phase = positions.double(), self.site * 0.6180339887498949
            ends = torch.floor((steps + 1) * self.density + phase)
            return (ends > torch.floor(steps * self.density + phase),)
        # Always in fp32: otherwise decisions near the threshold would differ between prefill and decoding.
        with torch.autocast(x.device.type, enabled=False):
            skip, execute = F.linear(x.float(), self.weight.float()).unbind(-1)
            return (execute - skip >= self.threshold,)


class HopscotchAttention(nn.Module):
    """Grouped-query attention: every token has keys and values, only executed ones have queries."""

    def __init__(self, config: HopscotchConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.attention_dropout, self.is_causal = config.head_dim**-0.5, 0.0, True
        width, inner = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = HopscotchRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = HopscotchRMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, h: Tensor, rotation: tuple, past_key_values: Cache | None, cache_kwargs: Any) -> tuple:
        """Keys and values of all tokens and those in the cache, [B, G, S, K] each."""
        keys = self.k_proj(h).unflatten(-1, (-1, self.head_dim))
        keys = self.k_norm(keys) if self.config.qk_norm else keys
        keys = _rotate(keys, *rotation).transpose(1, 2)
        values = self.v_proj(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if past_key_values is None:
            return keys, values
        return past_key_values.update(keys, values, self.layer_idx, *cache_kwargs)

    def forward(self, h: Tensor, keys_values: tuple, rotation: tuple, rows: Rows, mask: Any, **kwargs: Any):
        """h [B, T, D] -> output of the executed tokens, [N, D]."""
        queries = self.q_proj(rows.take(h)).unflatten(-1, (-1, self.head_dim))
        queries = self.q_norm(queries) if self.config.qk_norm else queries
        queries = rows.pad(_rotate(queries, *(rows.take(part) for part in rotation))).transpose(1, 2)
        attend = _attention_function(self.config._attn_implementation)
        out, _ = attend(self, queries, *keys_values, rows.of_mask(mask), dropout=0.0, scaling=self.scaling, **kwargs)
        grid = out.reshape(*out.shape[:2], -1)
        return self.o_proj(rows.unpad(grid))


class HopscotchMLP(nn.Module):
    """SwiGLU: [..., D] -> [..., D]."""

    def __init__(self, config: HopscotchConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class HopscotchDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, with one router, two, or none."""

    def __init__(self, config: HopscotchConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.input_layernorm = HopscotchRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = HopscotchAttention(config, layer_idx)
        self.post_attention_layernorm = HopscotchRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = HopscotchMLP(config)
        routed = config.router_layers or list(range(config.router_first_layer, config.router_end_layer))
        self.routed = config.router_kind is not None and layer_idx in routed
        place = routed.index(layer_idx) if self.routed else 0
        self.by_module = self.routed and config.router_granularity == "module"
        if self.by_module:
            self.attention_router = HopscotchRouter(config, 2 * place)
            self.ffn_router = HopscotchRouter(config, 2 * place + 1)
        elif self.routed:
            self.router = HopscotchRouter(config, place)

    def forward(
        self,
        x: Tensor,
        rotation: tuple,
        positions: Tensor,
        mask: Any,
        past_key_values: Cache | None,
        executed: list | None,
        cache_kwargs: Any,
        **kwargs: Any,
    ) -> Tensor:
        """x [B, T, D], its rotation (two [B, T, K]) and positions int64 [B, T] -> [B, T, D].

        Its routers' decisions are appended to ``executed`` unless that is None.
        """
        h = self.input_layernorm(x)
        keys_values = self.self_attn.keys_values(h, rotation, past_key_values, cache_kwargs)
        router = (self.attention_router if self.by_module else self.router) if self.routed else None
        rows = self._rows(router, x, h, positions, mask, executed)
        if self._idle(rows):
            if not self.by_module:
                return x
        else:
            attended = self.self_attn(h, keys_values, rotation, rows, mask, **kwargs)
            if not self.by_module:
                return rows.add(x, attended + self.mlp(self.post_attention_layernorm(rows.take(x) + attended)))
            x = rows.add(x, attended)
        h = self.post_attention_layernorm(x)
        rows = self._rows(self.ffn_router, x, h, positions, mask, executed)
        return x if self._idle(rows) else rows.add(x, self.mlp(rows.take(h)))

    def _rows(self, router: Any, x: Tensor, h: Tensor, positions: Tensor, mask: Any, found: list | None) -> Rows:
        executed = None
        if router is not None and self.config.skip_layers:
            (executed,) = router(h if self.config.router_input == "normed" else x, positions)
            if found is not None:
                found.append(executed)
        # Some engines bring attention without a mask; queries could not be gathered there.
        gather = self.config.execution == "gather" and isinstance(mask, Tensor)
        return Rows(executed, (x.shape[0], x.shape[1]), gather)

    def _idle(self, rows: Rows) -> bool:
        """Nothing to compute; with gradients enabled, modules run even on no rows, so that every weight gets one."""
        return rows.empty and not torch.is_grad_enabled()


class HopscotchLayerRouter(nn.Module):
    """[B, T, D] -> the late layers' weights, fp32 [B, T, k]."""

    def __init__(self, config: HopscotchConfig):
        super().__init__()
        self.temperature, self.top = config.ensemble_temperature, config.ensemble_top
        self.weight = nn.Parameter(torch.zeros(config.ensemble_layers, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.ensemble_layers))

    def forward(self, h: Tensor) -> Tensor:
        logits = F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype)).float() / self.temperature
        if self.top is not None and self.top < logits.shape[-1]:
            best = logits.topk(self.top, dim=-1).indices
            logits = torch.full_like(logits, -math.inf).scatter(-1, best, logits.gather(-1, best))
        return logits.softmax(dim=-1)


class HopscotchEnsemble(nn.Module):
    """The last k layers' states, normed and mixed."""

    def __init__(self, config: HopscotchConfig):
        super().__init__()
        norms = [HopscotchRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(config.ensemble_layers - 1)]
        self.norms = nn.ModuleList(norms)
        self.router = HopscotchLayerRouter(config)

    def forward(self, states: list[Tensor], final_norm: nn.Module) -> Tensor:
        """k times [B, T, D], the final layer's last -> [B, T, D]."""
        normed = [norm(x) for norm, x in zip((*self.norms, final_norm), states)]  # noqa: B905
        shares = self.router(normed[-1]).to(normed[-1].dtype)
        mixed = normed[-1] * shares[..., -1:]
        for place, state in enumerate(normed[:-1]):
            mixed = torch.addcmul(mixed, state, shares[..., place : place + 1])
        return mixed


class HopscotchPreTrainedModel(PreTrainedModel):
    config: HopscotchConfig
    config_class = HopscotchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopscotchDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_cache_class = True  # for 4.51
    _supports_static_cache = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        learned = isinstance(module, HopscotchRouter) and module.kind == "learned"
        if learned or isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, HopscotchRMSNorm):
            init.ones_(module.weight)
        if isinstance(module, HopscotchLayerRouter):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class HopscotchModel(HopscotchPreTrainedModel):
    """Everything but the head; with an ensemble the hidden state is the mixed one.

    ``output_executed=True`` gives one bool [B, T] for every routed site.
    """

    def __init__(self, config: HopscotchConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HopscotchDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = HopscotchRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ensemble = HopscotchEnsemble(config) if config.ensemble_layers else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_executed: bool = False,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None  # a recomputed layer would write its keys twice
        keeps_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = (torch.arange(x.shape[1], device=x.device) + past)[None]
        mask, cache_kwargs = self._mask(x, attention_mask, past_key_values, position_ids, cache_position)
        positions = position_ids.expand(x.shape[0], -1)
        rotation = _rotation(self.config, positions, x.dtype)
        executed: list[Tensor] | None = [] if output_executed else None
        states: list[Tensor] = []
        late: list[Tensor] = []
        for layer in self.layers:
            states += [x] if keeps_states else []
            x = layer(x, rotation, positions, mask, past_key_values, executed, cache_kwargs, **kwargs)
            late = [*late, x][-max(self.config.ensemble_layers, 1) :]
        x = self.norm(x) if self.ensemble is None else self.ensemble(late, self.norm)
        found = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if keeps_states else None,
        )
        if executed is not None:
            found["executed"] = tuple(executed)
        return found

    def _mask(self, x: Tensor, padding: Any, cache: Cache | None, positions: Tensor, places: Tensor | None) -> tuple:
        """The attention mask, and the extra arguments that older caches take with new keys."""
        if MASKS:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=padding,
                past_key_values=cache,
                position_ids=positions,
                allow_is_causal_skip=self.config.execution != "gather",  # a gathered query needs its row of the mask
            )
            return mask, ()
        if places is None:
            past = 0 if cache is None else cache.get_seq_length()
            places = torch.arange(x.shape[1], device=x.device) + past
        if self.config._attn_implementation not in ("eager", "sdpa"):
            name = self.config._attn_implementation
            raise ValueError(f"attn_implementation {name} needs a newer transformers here; use sdpa or eager")
        mask = _causal_mask(x, padding, places, cache)
        if self.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        return mask, ({"cache_position": places},)


class HopscotchForCausalLM(HopscotchPreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HopscotchConfig):
        super().__init__(config)
        self.model = HopscotchModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        found = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        if outputs.get("executed") is not None:
            found["executed"] = outputs["executed"]
        return found


def _attention_function(name: str) -> Callable:
    if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager_attention)
    return _eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def _causal_mask(x: Tensor, padding: Tensor | None, places: Tensor, cache: Any) -> Tensor:
    """Which keys the tokens x [B, T, D] see, bool [B, 1, T, S], by their cache positions, int64 [T].

    Args:
        x: only its shape and device are used.
        padding: [B, keys so far], 0 for padding; a padding token sees itself, as every query must see a key.
        places: cache positions of the new tokens.
        cache: of a fixed length, or growing.
    """
    if padding is not None and padding.dim() == 4:
        return padding.bool() if padding.dtype in (torch.bool, torch.int64) else padding >= 0
    longest = None if cache is None else cache.get_max_cache_shape()
    past = 0 if cache is None else cache.get_seq_length()
    keys = torch.arange(longest if longest is not None and longest > 0 else past + x.shape[1], device=x.device)
    seen = (keys <= places[:, None])[None, None].expand(x.shape[0], -1, -1, -1)
    if padding is not None:
        there = F.pad(padding.bool(), (0, len(keys) - padding.shape[1]), value=True)
        seen = seen & there[:, None, None] | (keys == places[:, None])
    return seen


def _rotation(config: HopscotchConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [B, T], [B, T, K] each; the first half of the sines is negative.

    Not kept in a buffer: transformers leaves non-persistent buffers uninitialised when it loads a model.
    """
    rope: dict[str, Any] = config.rope_parameters or {}
    k = config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, k, 2, dtype=torch.float32, device=positions.device) / k)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = (1 - blend) * frequencies / rope["factor"] + blend * frequencies
    angles = positions[..., None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., H, K] with cos and sin [..., K]."""
    return x * cos.unsqueeze(-2) + x.roll(x.shape[-1] // 2, dims=-1) * sin.unsqueeze(-2)


def _eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """[B, H, C, K], [B, G, S, K] -> [B, C, H, K] and the weights."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _uniform(seed: int, site: int, positions: Tensor) -> Tensor:
    """A hash of seed, site and position in (0, 1), fp32 [B, T], by SplitMix64 (Steele, Lea and Flood 2014)."""
    key = _mix(_mix(torch.full_like(positions[:1, :1], seed)) + site)
    bits = _mix(key + positions * (0x9E3779B97F4A7C15 - 2**64))
    return (_shift_right(bits, 41).float() + 0.5) * 2.0**-23


def _mix(z: Tensor) -> Tensor:
    z = z + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


__all__ = ["HopscotchConfig", "HopscotchForCausalLM", "HopscotchModel"]
