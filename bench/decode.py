"""Time token-by-token decoding from a KV cache: our dense decoder, routed ones, and Hugging Face's Llama.

    python -m bench.decode                                 # CPU: 22M parameters; CUDA: 1B; batches of 1 to 64
    python -m bench.decode --batches 1 --densities 0.5 --repeats 30 --json decode.json
    python -m bench.decode --check                         # exit 1 if a limit of bench/common/limits.py is missed

Every contestant reads the prompt once. A round then truncates its cache to the prompt's length and takes ``--steps``
greedy steps of one token for every row of the batch, the most likely one each time, as ``model/generate.py`` does.
``token_s`` is the time of one such step, prompt not included. Ours and the peer, which has our weights copied in, must
produce the same tokens (fp32) before anything is timed.

The peer decodes with its own default ``DynamicCache``; on CUDA also with its ``StaticCache`` and ``torch.compile``,
where that works. Routers compute their logits, but their decisions are drawn, one for every row, position and site, so
that each row executes exactly the requested share: see ``bench/common/contestants.py``.

``FLOP bound`` and ``MFU`` count the forward pass of the steps, from what the routers really did. At batch 1 decoding
is bound by reading the weights, not by products, so MFU is low. ``GiB`` is weights, cache and what a step needs on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bench.common.limits import DECODE_BATCHES
from bench.common.options import (
    CPU_SIZES,
    CUDA_SIZES,
    DENSE,
    MODEL,
    PEER,
    add_densities,
    add_numbers,
    add_run,
    model_config,
    parser,
    refuse,
    resolve,
    routed_name,
)
from bench.common.report import Result, Row, spread, tell
from bench.common.timing import Spread, ratios, take_turns
from model.flops import Routed, dense_flops, executed_flops
from settings import user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from model.decoder import Decoder

PEAK = "matmul"
SECONDS = "token_s"
STATIC_PEER = f"{PEER}_static"


class Decoding(Protocol):
    """A model that has read a prompt and decodes from there, the same every time."""

    peak_bytes: int

    def run(self) -> Tensor:
        """Go back to the prompt's end and decode; int64 [B, steps]."""


class OurDecoding:
    """Our decoder after a prompt.

    Args:
        decoder: in evaluation mode.
        prompt: int64 [B, T].
        steps: tokens to decode for every row.
    """

    def __init__(self, decoder: Decoder, prompt: Tensor, steps: int):
        from bench.common.memory import peak_bytes, tensor_bytes
        from model.cache import KVCache

        self.decoder, self.prompt, self.steps = decoder, prompt, steps
        weight = decoder.embed_tokens.weight
        batch, length = prompt.shape
        self.cache = KVCache(decoder.config, batch, length + steps, weight.device, weight.dtype)
        self.first = _likeliest(decoder(prompt, cache=self.cache).logits)
        held = [*decoder.parameters(), *decoder.buffers(), self.cache.keys, self.cache.values]
        self.peak_bytes = tensor_bytes(held) + peak_bytes(self.run, prompt.device)

    def run(self) -> Tensor:
        """Go back to the prompt's end and decode; int64 [B, steps]."""
        self.cache.truncate(self.prompt.shape[1])
        return _greedy(self.first, self.steps, lambda token: self.decoder(token, cache=self.cache).logits)

    def counts(self) -> Routed:
        """What all steps together execute."""
        import torch

        sites = torch.zeros(2, len(self.decoder.config.sites), dtype=torch.int64, device=self.prompt.device)
        visible = 0.0
        self.cache.truncate(self.prompt.shape[1])
        token = self.first
        for _ in range(self.steps):
            out = self.decoder(token, cache=self.cache)
            token = _likeliest(out.logits)
            sites += torch.stack((out.routing.executed_tokens, out.routing.attended_keys))
            visible += float(out.routing.visible_keys)
        executed, attended = sites.tolist()
        return Routed(len(self.prompt) * self.steps, visible, executed, attended)


class PeerDecoding:
    """Hugging Face's Llama after a prompt, with its own growing cache.

    Args:
        llama: in evaluation mode.
        prompt: int64 [B, T].
        steps: tokens to decode for every row.
    """

    def __init__(self, llama: Any, prompt: Tensor, steps: int):
        from transformers import DynamicCache

        from bench.common.memory import peak_bytes, tensor_bytes

        self.llama, self.steps = llama, steps
        self.cache: Any = DynamicCache(config=llama.config)
        self.first = _likeliest(self._forward(prompt))
        # Growing the cache creates new tensors and leaves these unchanged.
        self.after_prompt = [(layer.keys, layer.values) for layer in _layers(self.cache)]
        held = [*llama.parameters(), *llama.buffers(), *(t for pair in self.after_prompt for t in pair)]
        self.peak_bytes = tensor_bytes(held) + peak_bytes(self.run, prompt.device)

    def run(self) -> Tensor:
        """Go back to the prompt's end and decode; int64 [B, steps]."""
        for layer, (keys, values) in zip(_layers(self.cache), self.after_prompt, strict=True):
            layer.keys, layer.values = keys, values
        return _greedy(self.first, self.steps, self._forward)

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.llama(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits


class StaticPeerDecoding:
    """Hugging Face's Llama after a prompt, with its fixed-size cache and, if requested, a compiled step.

    Args:
        llama: in evaluation mode.
        prompt: int64 [B, T].
        steps: tokens to decode for every row.
        compiled: by ``torch.compile`` with CUDA graphs.
    """

    def __init__(self, llama: Any, prompt: Tensor, steps: int, compiled: bool):
        import torch
        from transformers import StaticCache

        from bench.common.memory import peak_bytes, tensor_bytes

        self.prompt_tokens, self.steps = prompt.shape[1], steps
        self.cache: Any = StaticCache(config=llama.config, max_cache_len=self.prompt_tokens + steps)
        self.call: Callable[..., Any] = llama
        self.first = _likeliest(self._forward(prompt))
        if compiled:
            self.call = torch.compile(llama, mode="reduce-overhead", dynamic=False)
        for _ in range(3):  # the first runs compile and record
            self.run()
        held = [*llama.parameters(), *llama.buffers()]
        held += [t for layer in _layers(self.cache) for t in (layer.keys, layer.values)]
        self.peak_bytes = tensor_bytes(held) + peak_bytes(self.run, prompt.device)

    def run(self) -> Tensor:
        """Go back to the prompt's end and decode; int64 [B, steps]."""
        import torch

        for layer in _layers(self.cache):
            layer.cumulative_length.fill_(self.prompt_tokens)
        token, tokens = self.first, []
        for _ in range(self.steps):
            torch.compiler.cudagraph_mark_step_begin()
            token = _likeliest(self._forward(token))
            tokens.append(token)
        return torch.cat(tokens, dim=1)

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.call(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits


def _greedy(token: Tensor, steps: int, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """The ``steps`` most likely tokens after ``token`` [B, 1], one by one: int64 [B, steps]."""
    import torch

    tokens = []
    for _ in range(steps):
        token = _likeliest(forward(token))
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def _layers(cache: Any) -> list[Any]:
    """The layers of a Hugging Face cache."""
    return cache.layers


def _likeliest(logits: Tensor) -> Tensor:
    """Logits [B, T, V] -> the most likely id after the last token, int64 [B, 1]."""
    return logits[:, -1].argmax(-1, keepdim=True)


def models(options: argparse.Namespace) -> tuple[dict[str, Decoder], Any]:
    """Our decoders, dense first, and the peer; in evaluation mode, all on the same weights in memory."""
    import torch

    from bench.common.contestants import draw, held_decoder, held_llama, llama_name
    from trainer.monitor.peak_flops import DTYPES

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    context = options.prompt + options.steps
    decoders = {}
    for density in (None, *options.densities):
        config = model_config(options, density, context)
        name = DENSE if density is None else routed_name(density)
        decoders[name] = held_decoder(config, device, dtype).eval()
        draw(decoders[name], max(options.batches), context, exact_from=options.prompt)
    dense = decoders[DENSE]
    weights = dense.state_dict()
    llama, _ = held_llama(dense.config, weights, device, dtype)
    # All share the same memory: how fast 75 MB are read depends on their address, by up to a fifth.
    for decoder in decoders.values():
        decoder.load_state_dict(weights, strict=False, assign=True)
    llama.load_state_dict({llama_name(name): weight for name, weight in weights.items()}, assign=True)
    return decoders, llama.eval()


def behind_prompt(
    options: argparse.Namespace, decoders: Mapping[str, Decoder], llama: Any, batch: int
) -> tuple[dict[str, Decoding], list[str]]:
    """All contestants at one batch size, and notes for the report."""
    import torch

    from bench.common.contestants import random_tokens

    device = torch.device(options.device)
    prompt = random_tokens(batch, options.prompt, options.vocab, device)
    decodings: dict[str, Decoding] = {n: OurDecoding(decoder, prompt, options.steps) for n, decoder in decoders.items()}
    decodings[PEER] = PeerDecoding(llama, prompt, options.steps)
    if options.dtype == "fp32":  # in bf16 the highest logits often tie after rounding
        assert torch.equal(decodings[DENSE].run(), decodings[PEER].run())
    notes = []
    if device.type == "cuda":
        try:
            decodings[STATIC_PEER] = StaticPeerDecoding(llama, prompt, options.steps, compiled=True)
        except Exception as error:  # whatever a compiler may raise; the peer must not end our run
            notes.append(f"batch {batch}: no {STATIC_PEER}, torch.compile failed with {type(error).__name__}")
    return decodings, notes


def measure(options: argparse.Namespace) -> Result:
    """Build the contestants and time them in turns at every batch size, then compute FLOPs and ratios."""
    import torch

    with torch.inference_mode():
        return _measure(options)


def _measure(options: argparse.Namespace) -> Result:
    import torch

    from trainer.monitor.peak_flops import DTYPES, PeakFlops

    device = torch.device(options.device)
    decoders, llama = models(options)
    fastest = PeakFlops(device, DTYPES[options.dtype])
    taken: dict[int, tuple[dict[str, Decoding], dict[str, list[float]]]] = {}
    notes: list[str] = []
    for batch in options.batches:
        decodings, said = behind_prompt(options, decoders, llama, batch)
        notes += said
        calls: dict[str, Callable[[], object]] = {name: decoding.run for name, decoding in decodings.items()}
        seconds = take_turns({**calls, PEAK: fastest}, options.repeats, device)
        taken[batch] = decodings, seconds
    rows: list[Row] = []
    measured, findings = {}, []
    peak = fastest.flops_per_s
    for batch, (decodings, seconds) in taken.items():
        found = {name: _row(name, batch, decodings, seconds, options, peak) for name in decodings}
        rows += found.values()
        for name, row in found.items():
            assert row.to_dense is not None
            measured[f"decode/batch_{batch}/{name}"] = row.to_dense.median
        findings.append(f"batch {batch}, {DENSE} / {PEER}: {spread(ratios(seconds[DENSE], seconds[PEER]))}")
    return Result(rows, peak, measured, notes, findings)


def _row(
    name: str,
    batch: int,
    decodings: Mapping[str, Decoding],
    seconds: Mapping[str, list[float]],
    options: argparse.Namespace,
    peak: float,
) -> Row:
    decoding = decodings[name] if isinstance(decodings[name], OurDecoding) else decodings[DENSE]
    assert isinstance(decoding, OurDecoding)
    counts, config = decoding.counts(), decoding.decoder.config
    executed, dense = executed_flops(config, counts), dense_flops(config, counts.tokens, counts.visible_keys)
    run_s = Spread.of(seconds[name]).median
    return Row(
        name=f"batch_{batch}/{name}",
        density=sum(counts.executed_tokens) / (counts.tokens * len(config.sites)) if config.sites else 1.0,
        device=options.device,
        dtype=options.dtype,
        tokens=batch * options.steps,
        seconds=run_s / options.steps,
        to_dense=ratios(seconds[name], seconds[DENSE]),
        flop_bound_ratio=executed / dense,
        mfu_executed=executed / run_s / peak,
        peak_memory_bytes=decodings[name].peak_bytes,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options, with the device's defaults filled in."""
    options_parser = parser("bench.decode", __doc__)
    add_numbers(options_parser, MODEL)
    add_densities(options_parser)
    options_parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    options_parser.add_argument("--steps", type=int, default=32, help="tokens decoded a round (default: %(default)s)")
    options_parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=list(DECODE_BATCHES),
        help="rows decoded together (default: %(default)s)",
    )
    add_run(options_parser, repeats=10)
    options = options_parser.parse_args(arguments)
    resolve(options, CPU_SIZES, CUDA_SIZES)
    refuse(options, {"prompt": 1, "steps": 1, "batches": 1})
    model_config(options, None, options.prompt + options.steps)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write, and judge if asked to."""
    with user_errors():
        options = parse(arguments)
        tell(options, measure(options), [*MODEL, "prompt", "steps", "batches"], SECONDS)


if __name__ == "__main__":
    main()
