"""How long the demo takes on this machine, from a second's measurement: ``python -m launch.demo.estimate CONFIG``.

Prints the number of GPUs, and two speeds. A start of Python with torch is timed, because seven commands, four of them
with ranks, spend much of the demo in that; and the decoder's forward and backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.demo.stages import Demo
from settings import user_errors
from trainer.config import RunConfig, load_run

_STARTS = 26.0
"""All that is no training, as a multiple of torch's import: as measured on two cores (LOG.md)."""
_WHOLE_STEP = 1.25
"""Time of a training step with its optimiser, communication, evaluations and saves, over forward and backward."""


@dataclass(frozen=True)
class Speed:
    """What was measured here.

    Attributes:
        gpus: how many there are.
        import_s: seconds to import torch.
        tokens_per_s: of one rank's forward and backward pass.
    """

    gpus: int
    import_s: float
    tokens_per_s: float

    def demo_s(self, demo: Demo, ranks: int) -> float:
        """Seconds that the whole demo will take, about."""
        return _STARTS * self.import_s + _WHOLE_STEP * demo.trained_tokens / (self.tokens_per_s * ranks)


def measure(config: RunConfig, ranks: int) -> Speed:
    """Measure ``config``'s model on this machine, on as many threads as one of ``ranks`` has."""
    start = time.perf_counter()
    import torch

    import_s = time.perf_counter() - start
    from model.decoder import Decoder

    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // ranks, 1))
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    decoder = Decoder(config.model, seed=0).to(device, dtype)
    shape = (config.train.micro_batch_samples, config.data.sequence_tokens)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)
    best_s = min(_pass_s(decoder, tokens) for _ in range(3))
    return Speed(gpus, import_s, tokens.numel() / best_s)


def _pass_s(decoder: Any, tokens: Any) -> float:
    """Seconds of a forward and backward pass over ``tokens``, int64 [B, T]."""
    start = time.perf_counter()
    decoder(tokens, tokens).loss.loss.backward()
    float(decoder.embed_tokens.weight.grad.sum())  # waits for a GPU
    return time.perf_counter() - start


def main() -> int:
    """Measure, print as JSON."""
    parser = argparse.ArgumentParser(prog="launch.demo.estimate", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML of stage one")
    parser.add_argument("--ranks", type=int, default=2, help="processes that will train")
    arguments = parser.parse_args()
    with user_errors():
        print(json.dumps(asdict(measure(load_run(arguments.config), arguments.ranks))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
