"""Time a training step: our dense decoder, Hugging Face's Llama of the same sizes, and routed decoders.

    python -m bench.step                                   # CPU: 22M parameters; CUDA: 1B
    python -m bench.step --densities 0.5 --repeats 30 --json step.json
    python -m bench.step --check                           # exit 1 if dense takes longer than Hugging Face

A step is what a user's loop does: zero_grad, forward with loss, backward, AdamW (fused, for all alike). The peer is
``LlamaForCausalLM`` as it comes (SDPA, ``labels=``), with our weights copied in; both must find the same loss before
anything is timed. All take turns in one process, see ``bench/timing.py``.

A routed decoder pays for a whole learned router: its logits, noise, soft gate and their gradients. But an untrained
router would execute about half of the tokens whatever was asked, so its decisions are replaced by independent draws
at the density asked for. Rows of a batch then differ in length, as they do in training.

Columns: ``FLOP bound`` is executed FLOPs over dense FLOPs, counted from what the routers really did: the ratio that
a step would have if it cost nothing but matrix products at dense speed. ``MFU`` is executed FLOPs (3 x forward) a
second over the fastest large matrix product seen in the same rounds. Peak memory is measured on CUDA only, and is
what the process would need with this model alone in it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bench.timing import Matmul, Spread, ratios, take_turns
from model.config import ModelConfig, RouterConfig
from model.decoder import Decoder, RoutingRecord
from model.flops import TRAINING_FACTOR, Routed, dense_flops, executed_flops
from model.head import IGNORED
from model.init import initialise
from model.router import Gate, LearnedRouter, RandomRouter, RoutingInputs
from settings import user_errors

CPU_SIZES = {"layers": 12, "width": 384, "heads": 6, "kv_heads": 2, "ffn_width": 1024, "vocab": 4096}
CUDA_SIZES = {"layers": 16, "width": 2048, "heads": 16, "kv_heads": 4, "ffn_width": 7168, "vocab": 32768}
CPU_BATCH = {"tokens": 512, "samples": 4}
CUDA_BATCH = {"tokens": 2048, "samples": 8}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEER, DENSE, PEAK = "hf_llama", "dense", "matmul"


@dataclass
class Contestant:
    """A model in training.

    Attributes:
        model: what is trained.
        forward: the mean loss of one batch, a scalar tensor.
        optimizer: of all parameters.
        record: what the routed sites did in the last step; None for a dense model.
        peak_bytes: most memory that a step took, this model alone; None where it is not measured.
    """

    model: nn.Module
    forward: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    record: RoutingRecord | None = None
    peak_bytes: int | None = None

    def step(self) -> float:
        """One training step; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def measure_peak(self, device: torch.device) -> None:
        """Take one step and note its peak memory; needs a step before it, which creates the optimiser's state."""
        self.optimizer.zero_grad()
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        own_bytes = sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers(), *states])
        before_bytes = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.step()
        self.peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes + own_bytes


class HeldRouter(LearnedRouter):
    """A learned router at its full cost, whose decisions are random draws at the density asked for."""

    def __init__(self, config: RouterConfig, width: int, site: int):
        super().__init__(config, width, site)
        self.draw = RandomRouter(config, width, site)

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        """x: [B, T, D] -> decisions [B, T]."""
        soft = super().forward(x, inputs).value
        executed = self.draw(x, inputs).executed
        return Gate(executed, executed.float() + (soft - soft.detach()))


def our_contestant(config: ModelConfig, tokens: Tensor, dtype: torch.dtype) -> Contestant:
    """Our decoder of ``config``, training on ``tokens`` [B, T]."""
    decoder = Decoder(config)
    if config.router is not None:
        for site, layer in enumerate(decoder.layers):
            layer.router = HeldRouter(config.router, config.width, site)
    initialise(decoder, config, seed=0)
    decoder.to(tokens.device, dtype)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:]
    valid = targets.numel() - len(targets)
    sample_ids = torch.arange(len(tokens), device=tokens.device)

    def forward() -> Tensor:
        out = decoder(tokens, targets, sample_ids=sample_ids)
        contestant.record = out.routing if config.router is not None else None
        assert out.loss is not None
        return out.loss.loss / valid

    contestant = Contestant(decoder, forward, _optimizer(decoder))
    return contestant


def peer_contestant(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Contestant:
    """Hugging Face's Llama with our dense decoder's sizes and ``weights``."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ValueError(
            "the peer needs the transformers package; install it with: pip install -r requirements-dev.txt"
        ) from None
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
    llama: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    llama.load_state_dict({k if k.startswith("lm_head") else f"model.{k}": v for k, v in weights.items()})
    llama.to(tokens.device, dtype).train()
    return Contestant(llama, lambda: llama(input_ids=tokens, labels=tokens).loss, _optimizer(llama))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def model_config(options: argparse.Namespace, density: float | None) -> ModelConfig:
    """The benchmark's model; dense where ``density`` is None."""
    try:
        return ModelConfig(
            vocab_size=options.vocab,
            layers=options.layers,
            width=options.width,
            heads=options.heads,
            kv_heads=options.kv_heads,
            ffn_width=options.ffn_width,
            max_positions=options.tokens,
            router=None if density is None else RouterConfig(kind="learned", density=density),
        )
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise ValueError("; ".join(problem.removeprefix("Value error, ") for problem in problems)) from None


def build(options: argparse.Namespace) -> dict[str, Contestant]:
    """All contestants, dense first, with the peer's loss compared to ours."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(options.vocab, (options.samples, options.tokens), generator=generator).to(device)
    dense_config = model_config(options, None)
    dense = our_contestant(dense_config, tokens, dtype)
    peer = peer_contestant(dense_config, dense.model.state_dict(), tokens, dtype)
    contestants = {DENSE: dense, PEER: peer}
    for density in options.densities:
        contestants[f"routed_{density:g}"] = our_contestant(model_config(options, density), tokens, dtype)
    losses = {name: contestant.step() for name, contestant in contestants.items()}
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert math.isclose(losses[DENSE], losses[PEER], rel_tol=tolerance), losses
    if device.type == "cuda":
        for contestant in contestants.values():
            contestant.measure_peak(device)
    return contestants


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Spread], float]:
    """Rows of the result, each contestant's time relative to dense, and the matrix product's peak in FLOP/s."""
    device = torch.device(options.device)
    contestants = build(options)
    matmul = Matmul(device, DTYPES[options.dtype])
    calls: dict[str, Callable[[], object]] = {name: c.step for name, c in contestants.items()}
    seconds = take_turns({**calls, PEAK: matmul}, options.repeats, device)
    peak = matmul.flops / min(seconds.pop(PEAK))
    to_dense = {name: ratios(times, seconds[DENSE]) for name, times in seconds.items()}
    to_dense[f"{DENSE}/{PEER}"] = ratios(seconds[DENSE], seconds[PEER])

    rows = []
    for name, contestant in contestants.items():
        density, executed, dense = _counted(contestant.record, options, name)
        step_s = Spread.of(seconds[name]).median
        rows.append(
            {
                "name": name,
                "density": density,
                "device": options.device,
                "dtype": options.dtype,
                "tokens": options.samples * options.tokens,
                "step_s": step_s,
                "ratio_to_dense": to_dense[name].median,
                "flop_bound_ratio": executed / dense,
                "mfu_executed": TRAINING_FACTOR * executed / step_s / peak,
                "peak_memory_bytes": contestant.peak_bytes,
            }
        )
    return rows, to_dense, peak


def _counted(record: RoutingRecord | None, options: argparse.Namespace, name: str) -> tuple[float, float, float]:
    """Measured density, executed forward FLOPs, dense forward FLOPs."""
    tokens = options.samples * options.tokens
    if record is None:
        keys = tokens * (options.tokens + 1) / 2
        dense = dense_flops(model_config(options, None), tokens, keys)
        return 1.0, dense, dense
    keys = float(record.visible_keys)
    counts = Routed(tokens, keys, record.executed_tokens.tolist(), record.attended_keys.tolist())
    config = model_config(options, float(name.removeprefix("routed_")))
    density = sum(counts.executed_tokens) / (tokens * len(config.sites))
    return density, executed_flops(config, counts), dense_flops(config, tokens, keys)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options, with the device's defaults filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, meaning in {
        "layers": "decoder layers",
        "width": "width of the residual stream",
        "heads": "query heads",
        "kv-heads": "key/value heads",
        "ffn-width": "inner width of the feed-forward",
        "vocab": "token ids",
        "tokens": "tokens a sample",
        "samples": "samples a step",
    }.items():
        parser.add_argument(f"--{name}", type=int, help=f"{meaning} (default: by device)")
    parser.add_argument("--densities", type=float, nargs="*", default=[1.0, 0.5, 0.25], help="shares of tokens (0, 1]")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: fp32 on cpu, else bf16)")
    parser.add_argument("--repeats", type=int, default=10, help="measured rounds")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--check",
        type=float,
        nargs="?",
        const=1.0,
        metavar="RATIO",
        help="exit 1 if dense takes more than this times Hugging Face's step, by the median (default 1.0)",
    )
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bf16" if on_cuda else "fp32")
    for name, value in ((CUDA_SIZES | CUDA_BATCH) if on_cuda else (CPU_SIZES | CPU_BATCH)).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    _refuse(options, on_cuda)
    return options


def _refuse(options: argparse.Namespace, on_cuda: bool) -> None:
    for name in ("tokens", "samples", "repeats"):
        least = 2 if name == "tokens" else 1
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    for density in options.densities:
        if not 0 < density <= 1:
            raise ValueError(f"--densities must lie above 0 and not above 1, got {density:g}")
    if len(set(options.densities)) < len(options.densities):
        raise ValueError(f"--densities must differ from each other, got {options.densities}")
    if not on_cuda and options.device != "cpu":
        raise ValueError(f"--device must be cpu or cuda (or cuda:N), got {options.device}")
    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"--json {options.json}: the folder {options.json.parent} does not exist; create it first")
    if on_cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device} asks for a CUDA device and there is none; use --device cpu")


def header(options: argparse.Namespace, peak: float) -> str:
    """What the numbers depend on."""
    device = torch.device(options.device)
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    sizes = " ".join(f"{name}={getattr(options, name)}" for name in CPU_SIZES | CPU_BATCH)
    return (
        f"{place}, torch {torch.__version__}, {options.dtype}, matmul peak {peak / 1e9:,.0f} GFLOP/s\n"
        f"{sizes}, {options.repeats} rounds"
    )


def table(rows: list[dict[str, Any]], to_dense: dict[str, Spread]) -> str:
    """The rows for reading; ratios with their quartiles."""
    lines = [
        f"{'':12} {'density':>7} {'step s':>8} {'to dense (quartiles)':>23} {'FLOP bound':>10} {'MFU':>6} {'GiB':>6}"
    ]
    for row in rows:
        spread = to_dense[row["name"]]
        memory = row["peak_memory_bytes"]
        lines.append(
            f"{row['name']:12} {row['density']:7.3f} {row['step_s']:8.4f} "
            f"{spread.median:7.3f} ({spread.low:.3f} - {spread.high:.3f}) {row['flop_bound_ratio']:10.3f} "
            f"{row['mfu_executed']:6.1%} {'-' if memory is None else f'{memory / 2**30:.2f}':>6}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write, and judge if asked to."""
    with user_errors():
        options = parse(arguments)
        rows, to_dense, peak = measure(options)
        print(header(options, peak))
        print(table(rows, to_dense))
        against_peer = to_dense[f"{DENSE}/{PEER}"]
        print(f"dense / {PEER}: {against_peer.median:.3f} ({against_peer.low:.3f} - {against_peer.high:.3f})")
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if options.check is not None and against_peer.median > options.check:
            raise ValueError(
                f"a dense step takes {against_peer.median:.3f} times Hugging Face's (median of {options.repeats} "
                f"rounds), more than the {options.check:g} allowed; profile model/ before merging"
            )


if __name__ == "__main__":
    main()
