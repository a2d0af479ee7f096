"""Time attention alone, forward and backward, without projections: gathered queries over all keys.

    python -m bench.attention                              # CPU: 6 heads of 64, batch 4; CUDA: 16 heads of 128, batch 8
    python -m bench.attention --lengths 2048 --densities 0.5 --repeats 30 --json attention.json
    python -m bench.attention --check                      # exit 1 if a limit of bench/common/limits.py is missed

Contestants at every length, on the same keys and values:

    dense          ``model/attend.py`` for all queries: what our dense model runs
    gathered_0.5   the same for queries picked by independent draws at this density; rows differ in length. What
                   attention derives from the selection is part of the time, the selection itself is not
    hf_llama       the call that Hugging Face's Llama makes: ``scaled_dot_product_attention`` with its causal flag
    reference      one such call for all queries with a mask over all pairs: compute everything and mask
    flex           on CUDA: FlexAttention compiled, with a causal block mask made beforehand

``reference`` is what a gathered contestant replaces, so ratios to it are printed below the table. ``FLOP bound`` and
``MFU`` count the two products over the keys that the queries see (3 x forward). All but FlexAttention are compared with
the reference's output before anything is timed.

Dimension letters: B samples, T tokens, N gathered queries, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.common.options import DENSE, PEER, add_densities, add_numbers, add_run, parser, refuse, resolve
from bench.common.report import Result, Row, spread, tell
from bench.common.timing import Spread, ratios, take_turns
from model.flops import TRAINING_FACTOR
from settings import user_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CPU_SIZES = {"heads": 6, "kv_heads": 2, "head_width": 64, "samples": 4}
CUDA_SIZES = {"heads": 16, "kv_heads": 4, "head_width": 128, "samples": 8}
SIZES = {
    "heads": "query heads",
    "kv_heads": "key/value heads",
    "head_width": "width of one head",
    "samples": "samples of the batch",
}
REFERENCE, FLEX, PEAK = "reference", "flex", "matmul"
SECONDS = "step_s"


@dataclass(frozen=True)
class Inputs:
    """Inputs that all contestants of one length share, and the gradient of the output.

    Attributes:
        queries: [B, T, H, K].
        keys, values: [B, T, G, K].
        grad: of the output, [B, T, H, K].
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    grad: Tensor

    @staticmethod
    def random(options: argparse.Namespace, length: int) -> Inputs:
        """Normally distributed inputs, the same on every device."""
        import torch

        from trainer.monitor.peak_flops import DTYPES

        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> Tensor:
            x = torch.randn(options.samples, length, heads, options.head_width, generator=generator)
            return x.to(options.device, DTYPES[options.dtype])

        queries, keys, values = (normal(h).requires_grad_() for h in (options.heads, *[options.kv_heads] * 2))
        return Inputs(queries, keys, values, normal(options.heads))

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K], keys and values [B, G, T, K]."""
        queries, keys, values = (x.transpose(1, 2) for x in (self.queries, self.keys, self.values))
        return queries, keys, values


@dataclass(frozen=True)
class AttentionCase:
    """One way to attend.

    Attributes:
        forward: the output, [N, H, K].
        leaves: tensors that get gradients: queries, keys and values.
        grad: of the output, [N, H, K].
        density: share of the tokens that have a query.
        flops: forward FLOPs of the two products over the visible keys.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    density: float
    flops: float

    def step(self) -> None:
        """Forward and backward."""
        import torch

        torch.autograd.grad(self.forward(), self.leaves, self.grad)

    def peak_bytes(self) -> int:
        """Peak memory of a step, inputs included."""
        from bench.common.memory import peak_bytes, tensor_bytes

        return tensor_bytes([*self.leaves, self.grad]) + peak_bytes(self.step, self.grad.device)


def gathered(inputs: Inputs, executed: Tensor | None) -> AttentionCase:
    """``model/attend.py`` for the queries ``executed``, bool [B, T], or for all."""
    import torch

    from model.attend import attend
    from model.selection import Selection
    from model.visibility import Visibility

    batch, tokens, heads, width = inputs.queries.shape
    device = inputs.queries.device
    visibility = Visibility(torch.arange(tokens, device=device), tokens, None)
    selection = Selection.everything(batch, tokens) if executed is None else Selection.of(executed)
    queries = selection.gather(inputs.queries.detach()).clone().requires_grad_()
    asks = torch.ones(batch, tokens, dtype=torch.bool, device=device) if executed is None else executed

    def forward() -> Tensor:
        # A copy has no cached rectangle yet: every layer has its own selection and computes it once.
        return attend(queries, inputs.keys, inputs.values, replace(selection), visibility)

    return AttentionCase(
        forward,
        leaves=(queries, inputs.keys, inputs.values),
        grad=selection.gather(inputs.grad),
        density=float(asks.float().mean()),
        flops=4.0 * heads * width * float((visibility.counts() * asks).sum()),
    )


def all_queries(inputs: Inputs, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AttentionCase:
    """``attention`` of all queries [B, H, T, K] over keys and values [B, G, T, K] -> [B, H, T, K]."""
    batch, tokens, heads, width = inputs.queries.shape
    return AttentionCase(
        forward=lambda: attention(*inputs.heads_first()).transpose(1, 2).flatten(0, 1),
        leaves=(inputs.queries, inputs.keys, inputs.values),
        grad=inputs.grad.flatten(0, 1),
        density=1.0,
        flops=4.0 * heads * width * batch * tokens * (tokens + 1) / 2,
    )


def causal_sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The call that Hugging Face's Llama makes."""
    import torch.nn.functional as F

    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)


def masked_sdpa(tokens: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call with a mask over all pairs of ``tokens``."""
    import torch
    import torch.nn.functional as F

    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()

    def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = queries.shape[1] != keys.shape[1]
        if grouped and device.type == "cuda":
            # No fused CUDA kernel takes a mask with grouped heads; the unfused one would materialise [B, H, T, T].
            keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (keys, values))
            grouped = False
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)

    return attention


def flex(tokens: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention with a causal block mask; compiled, as it must be."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kernel = torch.compile(flex_attention)
    causal = create_block_mask(lambda b, h, query, key: key <= query, None, None, tokens, tokens, device=str(device))

    def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = queries.shape[1] != keys.shape[1]
        return kernel(queries, keys, values, block_mask=causal, enable_gqa=grouped)

    return attention


def build(options: argparse.Namespace, length: int) -> dict[str, AttentionCase]:
    """All contestants at one length; asserts that dense, gathered and peer reproduce the reference's output."""
    import torch

    from model.selection import Selection

    device = torch.device(options.device)
    inputs = Inputs.random(options, length)
    contestants = {
        DENSE: gathered(inputs, None),
        PEER: all_queries(inputs, causal_sdpa),
        REFERENCE: all_queries(inputs, masked_sdpa(length, device)),
    }
    draws = torch.rand(options.samples, length, generator=torch.Generator().manual_seed(1)).to(device)
    for density in options.densities:
        contestants[gathered_name(density)] = gathered(inputs, draws < density)
    if device.type == "cuda":
        contestants[FLEX] = all_queries(inputs, flex(length, device))
    expected = contestants[REFERENCE].forward().detach()
    tolerance = 1e-4 if options.dtype == "fp32" else 3e-2
    for name in (DENSE, PEER):
        torch.testing.assert_close(contestants[name].forward(), expected, atol=tolerance, rtol=tolerance)
    for density in options.densities:
        selection = Selection.of(draws < density)
        found = contestants[gathered_name(density)].forward()
        expected_rows = selection.gather(expected.unflatten(0, (options.samples, length)))
        torch.testing.assert_close(found, expected_rows, atol=tolerance, rtol=tolerance)
    return contestants


def gathered_name(density: float) -> str:
    """Name of the gathered contestant at ``density``."""
    return f"gathered_{density:g}"


def measure(options: argparse.Namespace) -> Result:
    """Build the contestants and time them in turns at every length, then compute FLOPs, memory and ratios."""
    import torch

    from trainer.monitor.peak_flops import DTYPES, PeakFlops

    device = torch.device(options.device)
    fastest = PeakFlops(device, DTYPES[options.dtype])
    taken: dict[int, tuple[dict[str, AttentionCase], dict[str, list[float]]]] = {}
    for length in options.lengths:
        contestants = build(options, length)
        calls: dict[str, Callable[[], object]] = {name: c.step for name, c in contestants.items()}
        seconds = take_turns({**calls, PEAK: fastest}, options.repeats, device)
        taken[length] = contestants, seconds
    rows, measured, findings = [], {}, []
    peak = fastest.flops_per_s
    for length, (contestants, seconds) in taken.items():
        for name, contestant in contestants.items():
            rows.append(_row(f"{length}/{name}", contestant, contestants[DENSE], seconds, options, peak))
            to_reference = ratios(seconds[name], seconds[REFERENCE])
            measured[f"attention/{length}/{name}"] = to_reference.median
            if name != REFERENCE:
                findings.append(f"{length}/{name} / {REFERENCE}: {spread(to_reference)}")
    return Result(rows, peak, measured, findings=findings)


def _row(
    name: str,
    contestant: AttentionCase,
    dense: AttentionCase,
    seconds: Mapping[str, list[float]],
    options: argparse.Namespace,
    peak: float,
) -> Row:
    own = seconds[name.partition("/")[2]]
    return Row(
        name=name,
        density=contestant.density,
        device=options.device,
        dtype=options.dtype,
        tokens=dense.grad.shape[0],
        seconds=Spread.of(own).median,
        to_dense=ratios(own, seconds[DENSE]),
        flop_bound_ratio=contestant.flops / dense.flops,
        mfu_executed=TRAINING_FACTOR * contestant.flops / Spread.of(own).median / peak,
        peak_memory_bytes=contestant.peak_bytes(),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options, with the device's defaults filled in."""
    options_parser = parser("bench.attention", __doc__)
    add_numbers(options_parser, SIZES)
    add_densities(options_parser)
    options_parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 2048], help="tokens a sample (default: %(default)s)"
    )
    add_run(options_parser, repeats=10)
    options = options_parser.parse_args(arguments)
    resolve(options, CPU_SIZES, CUDA_SIZES)
    refuse(options, {"lengths": 2, **dict.fromkeys(SIZES, 1)})
    if options.heads % options.kv_heads:
        raise ValueError(f"--heads ({options.heads}) must be divisible by --kv-heads ({options.kv_heads})")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write, and judge if asked to."""
    with user_errors():
        options = parse(arguments)
        tell(options, measure(options), [*SIZES, "lengths"], SECONDS)


if __name__ == "__main__":
    main()
