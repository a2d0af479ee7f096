"""What the ensemble's distillation term costs: memory beyond the gradients, and time relative to the loss alone.

    python -m bench.distillation                                    # 8,192 tokens of vocabulary, width 192
    python -m bench.distillation --vocab 32768 --tokens 1024 4096 --layers 2 3 8 --markdown distillation.md

Forward and backward pass of the head: the loss alone, with the distillation term in chunks (``model/distillation.py``),
and with the same term over full logits of all late layers, as the formula is written. They take turns; memory is
measured separately and exactly (``bench/common/memory.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bench.common.options import parser, refuse
from bench.common.timing import ratios, take_turns
from settings import path_argument, user_errors

if TYPE_CHECKING:
    from torch import Tensor


class Case:
    """Hidden states of ``tokens`` tokens after ``layers`` late layers, and a head over ``vocab`` ids."""

    def __init__(self, layers: int, tokens: int, vocab: int, width: int):
        import torch

        from model.head import LMHead

        generator = torch.Generator().manual_seed(0)
        self.head = LMHead(width, vocab)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.1, generator=generator)
        self.states = [torch.randn(tokens, width, generator=generator).requires_grad_() for _ in range(layers)]
        self.targets = torch.randint(vocab, (tokens,), generator=generator)

    def alone(self) -> None:
        """The loss of the final layer, no distillation."""
        self._backward(self.head(self.states[-1], self.targets).loss)

    def chunked(self) -> None:
        """Loss and distillation, a chunk of tokens at a time."""
        from model.head import Distillation

        sums = self.head(self.states[-1], self.targets, 0.0, Distillation(self.states[:-1], self.states[-1], 1.0))
        self._backward(sums.loss + sums.distillation)

    def full(self) -> None:
        """Loss in chunks, distillation over the logits of all tokens and layers at once."""
        import torch
        import torch.nn.functional as F

        logits = [self.head(state) for state in self.states]
        teacher = logits[-1].detach().log_softmax(-1)
        students = [F.kl_div(one.log_softmax(-1), teacher, reduction="sum", log_target=True) for one in logits[:-1]]
        self._backward(self.head(self.states[-1], self.targets).loss + torch.stack(students).sum())

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        self.head.weight.grad = None
        for state in self.states:
            state.grad = None


def measure(case: Case, repeats: int) -> list[str]:
    """Table cells: peak memory of the three in MB, and the time of the other two relative to the loss alone."""
    import torch

    from bench.common.memory import held_to_free_memory, peak_bytes

    calls: dict[str, Callable[[], object]] = {"alone": case.alone, "chunked": case.chunked, "full": case.full}
    cpu = torch.device("cpu")
    with held_to_free_memory(cpu):
        peaks = [peak_bytes(call, cpu) for call in calls.values()]
        seconds = take_turns(calls, repeats, cpu)
    times = [ratios(seconds[name], seconds["alone"]).median for name in ("chunked", "full")]
    return [*(f"{peak / 1e6:,.0f}" for peak in peaks), *(f"{ratio:.2f}" for ratio in times)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    made: argparse.ArgumentParser = parser("bench.distillation", str(__doc__))
    made.add_argument("--layers", type=int, nargs="+", default=[2, 3, 8], help="late layers, k (default: %(default)s)")
    made.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="scored tokens (default: %(default)s)")
    made.add_argument("--vocab", type=int, default=8192, help="token ids (default: %(default)s)")
    made.add_argument("--width", type=int, default=192, help="of the residual stream (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=5, help="measured rounds (default: %(default)s)")
    made.add_argument("--markdown", type=path_argument, help="write the table there, too")
    options = made.parse_args(arguments)
    with user_errors():
        refuse(options, {"layers": 2, "tokens": 1, "vocab": 2, "width": 1})
        names = [
            "k",
            "tokens",
            "loss alone, MB",
            "in chunks, MB",
            "full logits, MB",
            "in chunks / alone",
            "full / alone",
        ]
        rows = [names, ["---:"] * len(names)]
        for layers in options.layers:
            for tokens in options.tokens:
                cells = measure(Case(layers, tokens, options.vocab, options.width), options.repeats)
                rows.append([str(layers), f"{tokens:,}", *cells])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
