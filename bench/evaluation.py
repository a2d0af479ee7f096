"""Scoring speed: ours against lm-evaluation-harness's own Hugging Face loader, with the same dense weights.

    python -m bench.evaluation                                      # 22 M parameters on a CPU, 1 B on a GPU
    python -m bench.evaluation --check --questions 40 --repeats 5

Two kinds of requests, as in real tasks: four choices of several tokens after a question, and yes or no after a long
text. Contestants take turns and must agree on every likelihood. The loader is run at several batch sizes, and ours is
judged against its fastest.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from bench.common.options import CPU_SIZES, CUDA_SIZES, MODEL, add_numbers, add_run, parser, refuse, resolve
from bench.common.report import check, spread
from bench.common.timing import ratios, take_turns
from model.config import ModelConfig
from settings import user_errors, whole_number
from trainer.preflight import require_harness

WINDOW = 512
KINDS = {"choices": (4, (16, 120), (2, 12)), "yes or no": (2, (60, 300), (1, 1))}
"""Choices per question, and minimum and maximum tokens of its text and of a choice."""
_APART = {"fp32": 1e-3, "bf16": 0.5}  # largest allowed difference for a choice, nats
Request = tuple[None, list[int], list[int]]


def questions(kind: str, count: int, vocab: int) -> list[Request]:
    """Requests as the harness makes them: no text, ids of the context, ids of the choice."""
    drawn = random.Random(kind)
    choices, context, choice = KINDS[kind]
    requests: list[Request] = []
    for _ in range(count):
        asked = drawn.choices(range(vocab), k=drawn.randint(*context))
        requests += [(None, asked, drawn.choices(range(vocab), k=drawn.randint(*choice))) for _ in range(choices)]
    return requests


def build(options: argparse.Namespace) -> tuple[Callable[[Any], list[Any]], dict[int, Callable[[Any], list[Any]]]]:
    """Scoring functions: ours, and the harness's loader by batch size."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from bench.common.contestants import held_decoder, held_llama
    from trainer.distributed import World
    from trainer.tasks.harness import OurModel
    from trainer.tasks.scorer import Scorer

    sizes = {name: getattr(options, name) for name in MODEL if name != "vocab"}
    config = ModelConfig.model_validate({**sizes, "vocab_size": options.vocab, "max_positions": WINDOW})
    device, dtype = torch.device(options.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    decoder = held_decoder(config, device, dtype).eval()
    llama, _ = held_llama(config, decoder.state_dict(), device, dtype)
    scorer = Scorer(decoder, options.batch_tokens, World(0, 1, 0, 1, device))
    tokenizer = _tokenizer(options.vocab)
    ours = OurModel(scorer, tokenizer, WINDOW)
    peers = {
        batch: HFLM(pretrained=llama.eval(), tokenizer=tokenizer, batch_size=batch, max_length=WINDOW)
        for batch in options.peer_batches
    }
    peer_calls = {batch: _silent(peer._loglikelihood_tokens) for batch, peer in peers.items()}
    return _silent(ours._loglikelihood_tokens), peer_calls


def _silent(score: Callable[..., list[Any]]) -> Callable[[Any], list[Any]]:
    return lambda requests: score(requests, disable_tqdm=True)


def _tokenizer(vocab: int) -> Any:
    """A tokenizer that the loader accepts; nothing is encoded with it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({str(token): token for token in range(vocab)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="1", pad_token="2")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Print one line per kind; returns the ratios by metric.

    Raises:
        AssertionError: if ours and the loader do not agree.
    """
    import torch

    ours, peers = build(options)
    found = {}
    for kind in KINDS:
        requests = questions(kind, options.questions, options.vocab)
        expected = [value for value, _ in next(iter(peers.values()))(requests)]
        apart = max(abs(a - value) for a, (value, _) in zip(expected, ours(requests), strict=True))
        assert apart < _APART[options.dtype], f"a likelihood is {apart} nats off"
        calls: dict[str, Callable[[], object]] = {"ours": lambda requests=requests: ours(requests)}  # type: ignore[misc]
        for batch, score in peers.items():
            calls[str(batch)] = lambda score=score, requests=requests: score(requests)  # type: ignore[misc]
        seconds = take_turns(calls, options.repeats, torch.device(options.device))
        best = min(peers, key=lambda batch: sorted(seconds[str(batch)])[options.repeats // 2])
        ratio = ratios(seconds[str(best)], seconds["ours"])
        found[f"evaluation/{kind.replace(' ', '_')}"] = ratio.median
        tokens = sum(len(context) + len(choice) for _, context, choice in requests)
        own_s = sorted(seconds["ours"])[options.repeats // 2]
        print(
            f"{kind:10} {len(requests)} requests, {tokens:,} tokens, {tokens / own_s:,.0f} a second; speed of the "
            f"loader's best batch ({best}) {spread(ratio)} times; likelihoods within {apart:.1e} nats"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge if asked to."""
    made = parser("bench.evaluation", str(__doc__))
    add_numbers(made, MODEL)
    made.add_argument("--questions", type=int, default=24, help="of each kind (default: %(default)s)")
    made.add_argument("--batch-tokens", type=whole_number(), help="of ours (default: by device)")
    made.add_argument(
        "--peer-batches", type=int, nargs="+", default=[4, 16, 64], help="of the loader (default: %(default)s)"
    )
    add_run(made, repeats=3)
    options = made.parse_args(arguments)
    with user_errors():
        refuse(options, {"questions": 1, "peer_batches": 1})
        require_harness()
        resolve(options, {**CPU_SIZES, "batch_tokens": 1024}, {**CUDA_SIZES, "batch_tokens": 32_768})
        found = measure(options)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if options.check:
            check(options, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
