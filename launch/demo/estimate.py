"""How fast this machine is, so that the demo can say how long it takes: ``python -m launch.demo.estimate CONFIG``.

Prints, after about a second, the number of GPUs and two speeds: of Python, since starting seven commands, two of them
with ranks, takes a third of the demo, and of the decoder's forward and backward pass.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.demo.stages import DemoStage
from settings import command_parser, path_argument, user_errors, whole_number
from trainer.config import PretrainConfig, load_run

_STARTS = 65.0 / 0.013
"""Seconds of the demo outside training, relative to ``_python_s``; measured on two cores (LOG.md)."""
_WHOLE_STEP = 2.0
"""Time of a training step with optimiser, communication, evaluations and saves, relative to forward and backward."""


@dataclass(frozen=True)
class Speed:
    """What was measured here.

    Attributes:
        gpus: how many there are.
        python_s: seconds of a short Python loop.
        tokens_per_s: of one rank's forward and backward pass.
    """

    gpus: int
    python_s: float
    tokens_per_s: float

    def demo_s(self, stages: Sequence[DemoStage], ranks: int) -> float:
        """Estimated seconds that ``stages`` will take."""
        starts = _STARTS * self.python_s * sum(stage.start for stage in stages)
        return starts + _WHOLE_STEP * sum(stage.tokens for stage in stages) / (self.tokens_per_s * ranks)


def measure(config: PretrainConfig, ranks: int) -> Speed:
    """Measure ``config``'s model on this machine, on as many threads as one of ``ranks`` has."""
    import torch

    from model.decoder import Decoder
    from trainer.precision import fast_bf16

    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // ranks, 1))
    precision = config.train.precision
    bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(device, config.model.width)[0])
    dtype = torch.bfloat16 if bf16 else torch.float32
    decoder = Decoder(config.model, seed=0).to(device, dtype)
    shape = (config.train.micro_batch_samples, config.data.sequence_tokens)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)
    best_s = min(_pass_s(decoder, tokens) for _ in range(3))
    return Speed(gpus, min(_python_s() for _ in range(5)), tokens.numel() / best_s)


def _pass_s(decoder: Any, tokens: Any) -> float:
    """Seconds of a forward and backward pass over ``tokens``, int64 [B, T]."""
    start = time.perf_counter()
    decoder(tokens, tokens).loss.loss.backward()
    float(decoder.embed_tokens.weight.grad.sum())  # waits for a GPU
    return time.perf_counter() - start


def _python_s() -> float:
    start = time.perf_counter()
    sum(number * number for number in range(300_000))
    return time.perf_counter() - start


def main() -> int:
    """Measure, print as JSON."""
    parser = command_parser("launch.demo.estimate", __doc__.splitlines()[0])
    parser.add_argument("config", type=path_argument, help="YAML of stage one")
    parser.add_argument("--ranks", type=whole_number(), default=2, help="processes that will train")
    arguments = parser.parse_args()
    with user_errors():
        print(json.dumps(asdict(measure(load_run(arguments.config), arguments.ranks))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
