"""Continue a text, shown as it is generated, and what each token cost.

    python -m evals.generate runs/books --prompt "It was a dark night" --temperature 0.8 --seed 1
    python -m evals.generate runs/books --prompt-file start.txt --density 0.4 --bars

MODEL is a run, a checkpoint or a folder of weights. A token's share of layers is that of the pass that chose it: the
pass over the token before it. On a terminal the text is coloured by it, the brighter the more layers ran. The text goes
to stdout and the summary to stderr. With ``--bars`` there is one line per token instead, with its share as a bar.

``--density`` sets the compute dial: thresholds for that mean density, from the ``dial.json`` that ``evals.dial`` wrote
for the run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from data.containers import UNREADABLE, whole_text
from data.detokenizer import REPLACEMENT_CHARACTER, Detokenizer
from evals.dial import JSON, folder_of
from evals.placement import NO_TOKEN, add_placement, check_placement, placed
from settings import command_parser, path_argument, user_errors
from trainer import preflight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from evals.scoring import Opened
    from model.decoder import Decoder

_GREYS = (240, 244, 248, 252, 231)
"""Of the 256 terminal colours, from few layers to all."""
_BAR_CELLS = 20


class Token(NamedTuple):
    """A new token."""

    id: int
    share: float
    """Share of all layers that ran in the pass that chose it."""


def stream(
    decoder: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    thresholds: Tensor | None = None,
) -> Iterator[Token]:
    """The tokens that :func:`model.generate.generate` would append to one row, each as soon as it is known.

    Args:
        decoder: in evaluation mode.
        prompt: T ids, at least one.
        max_new_tokens: stop after this many, or after ``eos_id``, which is then the last one.
        temperature: 0 takes the most likely token, else logits are divided by it and sampled.
        top_p: sample only from the most likely tokens that together hold this probability.
        eos_id: ends the text.
        generator: of the sampling.
        thresholds: fp32 [S], the compute dial.

    Raises:
        ValueError: at a token whose logits are not finite.
    """
    import torch

    from evals.scoring import layer_shares
    from model.generate import passes

    start = torch.tensor([list(prompt)], device=decoder.embed_tokens.weight.device)
    for done in passes(decoder, start, max_new_tokens, temperature, top_p, eos_id, generator, thresholds):
        if not bool(done.finite):
            raise ValueError(NO_TOKEN)
        yield Token(int(done.chosen), float(layer_shares(decoder.config, done.output.routing.executed[:, 0, -1])))


def prompt_ids(
    opened: Opened, prompt: str | Sequence[int], max_new_tokens: int, lower: str = "--max-new-tokens"
) -> list[int]:
    """The prompt's ids, after a begin-of-document token if the model was trained with one; never empty.

    Args:
        opened: the model.
        prompt: a text, or ids, which are taken as they are.
        max_new_tokens: to come after it.
        lower: how the user can ask for fewer, for the message.

    Raises:
        ValueError: if prompt and new tokens would exceed the model's positions.
    """
    given = opened.tokenizer.prefix + opened.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    ids = given or opened.start
    positions = opened.decoder.config.max_positions
    if len(ids) + max_new_tokens > positions:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's {positions} positions "
            f"(model.max_positions); shorten the prompt or lower {lower}"
        )
    return ids


def dial_of(model: Path) -> Path:
    """Where ``evals.dial`` writes by default for a run or one of its checkpoints."""
    return (folder_of(model) or model) / JSON


def summary(tokens: Sequence[Token], layers: int, seconds: float) -> str:
    """What the tokens cost, on one line; ``seconds`` include the prompt."""
    if not tokens:
        return "no new tokens"
    shares = [token.share for token in tokens]
    mean = sum(shares) / len(shares)
    return (
        f"{len(tokens)} tokens in {seconds:.2f} s, {len(tokens) / seconds:.1f} tokens/s, prompt included; layers a "
        f"token: mean {mean * layers:.2f} of {layers} ({mean:.0%}), least {min(shares) * layers:g}, most "
        f"{max(shares) * layers:g}"
    )


def bar(token: Token, layers: int, text: str) -> str:
    """A token as a line: share of layers, bar, text."""
    cells = round(token.share * _BAR_CELLS)
    filled = "█" * cells + "·" * (_BAR_CELLS - cells)
    return f"{token.share * layers:>5g} of {layers} {filled} {text!r}"


def show(
    tokens: Iterator[Token],
    detokenizer: Detokenizer,
    layers: int,
    out: TextIO,
    bars: bool = False,
    colour: bool = False,
) -> list[Token]:
    """Write tokens to ``out`` as they are generated; returns them.

    Args:
        tokens: of :func:`stream`.
        detokenizer: turns them into text.
        layers: of the decoder.
        out: text goes here.
        bars: one line per token instead of running text.
        colour: shade the text by the share of layers.
    """
    shown = []
    for token in tokens:
        shown.append(token)
        text = detokenizer.add(token.id)
        if bars:
            out.write(bar(token, layers, text) + "\n")
        elif text:
            out.write(shaded(text, token.share) if colour else text)
        out.flush()
    rest = detokenizer.rest()
    out.write(f"{rest!r}\n" if bars and rest else rest if bars else rest + "\n")
    out.flush()
    return shown


def shaded(text: str, share: float) -> str:
    """``text`` in a grey, the brighter the larger ``share``; line breaks have no colour: some terminals fill them."""
    grey = _GREYS[min(int(share * len(_GREYS)), len(_GREYS) - 1)]
    # A model may generate an escape sequence, which a terminal must not interpret.
    safe = "".join(c if c in "\n\t" or c.isprintable() else REPLACEMENT_CHARACTER for c in text)
    return "\n".join(f"\x1b[38;5;{grey}m{line}\x1b[0m" if line else "" for line in safe.split("\n"))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evals.generate", __doc__)
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="a run, a checkpoint or a folder of weights")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="to continue; empty for the start of a document")
    given.add_argument("--prompt-file", type=path_argument, metavar="FILE", help="the same, from a UTF-8 file")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="tokens (default 100)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="probability to sample from (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling (default 0)")
    parser.add_argument("--density", type=float, metavar="RHO", help="mean density (default: as trained)")
    parser.add_argument(
        "--dial", type=path_argument, metavar="FILE", help="thresholds for --density (default: RUN/dial/dial.json)"
    )
    parser.add_argument("--bars", action="store_true", help="one line per token, with its share of layers as a bar")
    add_placement(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 (greedy) or a positive number, got {options.temperature:g}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {options.top_p:g}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    if options.dial is not None and options.density is None:
        raise ValueError("--dial says where to find thresholds for a density; give one with --density")


def _prompt(options: argparse.Namespace) -> str:
    text, what = str(options.prompt), "--prompt"
    if options.prompt_file is not None:
        what = str(options.prompt_file)
        try:
            text = whole_text(options.prompt_file).decode(errors="surrogateescape")
        except FileNotFoundError:
            raise
        except UNREADABLE as error:
            raise ValueError(f"{what} cannot be read: {error}; restore it") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is not UTF-8 from its character {error.start + 1} on; convert it, for example with iconv"
        ) from None
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Continue, show, sum up."""
    options = _parser().parse_args(arguments)
    with user_errors():
        _check(options)
        check_placement(options)
        prompt = _prompt(options)
        preflight.open_model(options.model)
        import torch

        from evals.dial.file import Dial
        from evals.scoring import open_model
        from tune.config import TuneConfig

        with placed(options) as placement:
            opened = open_model(options.model, placement)
        decoder, thresholds, device = opened.decoder, None, opened.world.device
        if options.density is not None:
            if options.dial is None and isinstance(opened.loaded.config, TuneConfig):
                raise ValueError(
                    f"--density needs a compute dial, which only models of stage one have, and {options.model} was "
                    "tuned; leave it out, or give a dial with --dial"
                )
            path = options.dial or dial_of(options.model)
            thresholds = Dial.load(path, decoder.config, opened.loaded.step).thresholds(options.density)
        ids = prompt_ids(opened, prompt, options.max_new_tokens)
        generator = torch.Generator(device).manual_seed(options.seed)
        tokens = stream(
            decoder, ids, options.max_new_tokens, options.temperature, options.top_p, opened.tokenizer.eos_id,
            generator, thresholds,
        )  # fmt: skip
        layers, detokenizer = decoder.config.layers, Detokenizer(opened.tokenizer, ids)
        if not options.bars:
            sys.stdout.write(prompt)
        before = time.perf_counter()
        shown = show(tokens, detokenizer, layers, sys.stdout, options.bars, sys.stdout.isatty())
        print(summary(shown, layers, time.perf_counter() - before), file=sys.stderr, flush=True)
        if options.density is not None:
            print(f"density {options.density:g} is a mean over validation text; these tokens differ", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
