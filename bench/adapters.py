"""Time a tuning step of every parameter-efficient method against PEFT on Hugging Face's Llama.

    python -m bench.adapters                                        # CPU: 22M parameters; CUDA: 1B
    python -m bench.adapters --layers 30 --width 576 --heads 9 --kv-heads 3 --ffn-width 1536 --vocab 49152 \\
        --tokens 256 --samples 2 --repeats 5                        # SmolLM2-135M's sizes

A step is forward, backward and AdamW on one batch of random tokens; the loss covers the last ``--response`` share of
each sample, the rest is its prompt. Ours and the peer have the same weights, rank and projections, and must compute the
same loss before anything is timed; the peer computes the logits of all tokens, as transformers does, ours only those in
the loss. ``kept`` is with ``base.cache_states``, its files written beforehand. All take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.common.limits import judge, require
from bench.common.options import (
    BATCH,
    CPU_BATCH,
    CPU_SIZES,
    CUDA_BATCH,
    CUDA_SIZES,
    MODEL,
    add_numbers,
    add_run,
    model_config,
    parser,
    refuse,
    resolve,
)
from bench.common.report import spread
from bench.common.timing import ratios, take_turns
from settings import user_errors
from settings.tables import aligned_markdown

if TYPE_CHECKING:
    from torch import Tensor

    from bench.common.contestants import Tuned
    from model.config import ModelConfig
    from model.decoder import Decoder
    from tune.config import AdapterConfig


class Method(NamedTuple):
    """A row: the adapter, whether the last layers vote, and whether frozen layers' states are cached."""

    adapter: dict[str, Any]
    ensemble: bool = False
    kept: bool = False


METHODS = {
    "lora": Method({"kind": "lora"}),
    "dora": Method({"kind": "dora"}),
    "lora + ensemble": Method({"kind": "lora"}, ensemble=True),
    "early lora + ensemble": Method({"kind": "lora", "layers": "early"}, ensemble=True),
    "late lora + ensemble": Method({"kind": "lora", "layers": "late"}, ensemble=True),
    "late lora + ensemble, kept": Method({"kind": "lora", "layers": "late"}, ensemble=True, kept=True),
    "ensemble only": Method({"kind": "none"}, ensemble=True),
    "ensemble only, kept": Method({"kind": "none"}, ensemble=True, kept=True),
}
PEERS = {"PEFT lora": "lora", "PEFT dora": "dora"}
"""Contestants in plain transformers, with our contestant of the same method."""


def build(options: argparse.Namespace, folder: Path) -> dict[str, Tuned]:
    """All contestants after one step, the peers' losses checked against ours."""
    import torch

    from bench.common.contestants import assert_same, held_llama, random_tokens
    from model.chunks import IGNORE_INDEX
    from model.decoder import Decoder
    from model.init import initialise
    from trainer.monitor.peak_flops import DTYPES
    from tune.config import AdapterConfig

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    config = model_config(options, None, options.tokens)
    base = Decoder(config)
    initialise(base, config, seed=0)
    weights = base.state_dict()
    tokens = random_tokens(options.samples, options.tokens, options.vocab, device)
    labels = tokens.clone()
    labels[:, : options.tokens - max(round(options.tokens * options.response), 1)] = IGNORE_INDEX
    contestants = {}
    for name, method in METHODS.items():
        decoder = Decoder(config)
        decoder.load_state_dict(weights)
        contestants[name] = _ours(decoder.to(device, dtype), method, tokens, labels, folder)
    for name, like in PEERS.items():
        llama, _ = held_llama(config, weights, device, dtype)
        contestants[name] = _theirs(llama, config, AdapterConfig.model_validate(METHODS[like].adapter), tokens, labels)
    losses = {name: contestant.step() for name, contestant in contestants.items()}
    for name, like in PEERS.items():
        assert_same(losses[like], losses[name], dtype)
    return contestants


def _ours(decoder: Decoder, method: Method, tokens: Tensor, labels: Tensor, folder: Path) -> Tuned:
    import torch

    from bench.common.contestants import Tuned
    from model.chunks import IGNORE_INDEX
    from model.config import EnsembleConfig
    from tune.adapters import prepare
    from tune.config import AdapterConfig, layers_adapted
    from tune.state_cache import StateCache

    adapter = AdapterConfig.model_validate(method.adapter)
    ensemble = EnsembleConfig(layers=3, distillation=0.1) if method.ensemble else None
    if ensemble is not None:
        decoder.add_ensemble(ensemble)
    prepare(decoder.train(), adapter, "frozen", 0)
    if method.kept:
        decoder.frozen = StateCache(folder, "bench", layers_adapted(adapter, len(decoder.layers), ensemble).start)
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    learned = int((targets != IGNORE_INDEX).sum())

    def loss() -> Tensor:
        sums = decoder(tokens, targets, scored_targets=learned).loss
        assert sums is not None
        return sums.loss / learned

    return Tuned(decoder, decoder.config, loss)


def _theirs(llama: Any, config: ModelConfig, adapter: AdapterConfig, tokens: Tensor, labels: Tensor) -> Tuned:
    from peft import LoraConfig, get_peft_model

    from bench.common.contestants import Tuned

    lora = LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha),
        use_dora=adapter.kind == "dora",
        target_modules=list(adapter.targets),
    )
    # Adapters in the model's dtype, as ours: PEFT's default is fp32 beside a model in bf16.
    model = get_peft_model(llama.train(), lora, autocast_adapter_dtype=False)
    return Tuned(model, config, lambda: model(input_ids=tokens, labels=labels).loss)


def table(contestants: Mapping[str, Tuned], seconds: Mapping[str, list[float]]) -> str:
    """Markdown table: one row per contestant, its step time relative to each peer's."""
    rows = [["", "trained parameters", *(f"step / {peer}" for peer in PEERS)]]
    for name, contestant in contestants.items():
        cells = [spread(ratios(seconds[name], seconds[peer])) for peer in PEERS]
        rows.append([name, f"{contestant.trained:,}", *cells])
    return aligned_markdown(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, take turns, print the table."""
    made = parser("bench.adapters", str(__doc__))
    add_numbers(made, MODEL | BATCH)
    made.add_argument("--response", type=float, default=0.25, help="share of a sample learned (default: %(default)s)")
    add_run(made, repeats=10)
    options = made.parse_args(arguments)
    with user_errors():
        resolve(options, CPU_SIZES | CPU_BATCH, CUDA_SIZES | CUDA_BATCH)
        refuse(options, {"tokens": 2, "samples": 1, "layers": 4})
        if not 0 < options.response < 1:
            raise ValueError(f"--response must lie between 0 and 1, got {options.response:g}")
        import torch

        with tempfile.TemporaryDirectory() as folder:
            contestants = build(options, Path(folder))
            calls = {name: contestant.step for name, contestant in contestants.items()}
            seconds = take_turns(calls, options.repeats, torch.device(options.device))
        print(table(contestants, seconds))
        if options.check:
            measured = {f"tuning/{like}": ratios(seconds[like], seconds[peer]).median for peer, like in PEERS.items()}
            verdicts = judge(measured, options.device)
            print(*verdicts, sep="\n")
            require(verdicts)
        if options.json is not None:
            import json

            options.json.write_text(json.dumps(seconds), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
