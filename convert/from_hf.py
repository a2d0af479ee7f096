"""Import a Hugging Face checkpoint of the Llama family, or an export: ``python -m convert.from_hf HF_DIR OUT``.

    python -m convert.from_hf ~/models/SmolLM2-135M runs/smollm2
    python -m convert.from_hf ~/models/SmolLM2-135M runs/smollm2-skip --routers 0.5
    python -m convert.from_hf runs/demo-hf runs/demo-again

HF_DIR is a local folder with ``config.json``, safetensors weights and a tokenizer. OUT becomes a folder that stage two
starts from (``base.path``). Before it is written, its logits are compared with those that transformers computes from
HF_DIR, in fp32 on the CPU, and a difference above a ten-thousandth of their range is an error. An export of
``convert.to_hf`` with a modelling file is compared only with ``--trust-remote-code``, because that runs the file.

``--routers`` adds learned skip routers with all-zero weights. A tie executes, so the model computes the same as before
until ``tune.train`` teaches it to skip.

Dimension letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from convert.hf_config import HOPSCOTCH, ensemble_config, model_config, routing_seed, routing_thresholds
from convert.hf_weights import is_usual, names_in, read_tensors, tie_head, usual_name, weight_files
from data.files import read_json, require_new_folder
from model.config import BudgetConfig, ModelConfig, RouterConfig
from settings import command_parser, path_argument, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from model.decoder import Decoder

TOLERANCE = 1e-4
"""Largest difference between logits, as a share of their range. Two fp32 implementations stay below 1e-5."""
HF_CONFIG = "config.json"
_COMPARED_TOKENS = 256
_RESIZE = (
    "take it out of the tokenizer's files, or give the embedding a row for it: transformers' resize_token_embeddings "
    "and save_pretrained do"
)


class Difference(NamedTuple):
    """Difference of logits on the same tokens."""

    largest: float
    """Largest difference of two logits."""
    range: float
    """Largest minus smallest logit of transformers."""
    tokens: int
    """Number of tokens, over two sequences."""
    position: int
    """The highest position of any of them."""


def new_routers(density: float, granularity: Literal["layer", "module"] = "layer") -> RouterConfig:
    """Learned routers for a dense model, with the recipe of docs/method.md.

    Raises:
        ValueError: if ``density`` is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise ValueError(
            f"--routers must be above 0 and at most 1, got {density:g}; it is the share of tokens that a routed site "
            "is to execute, such as 0.5"
        )
    budget = BudgetConfig(controller="adaptive")
    return RouterConfig(density=density, granularity=granularity, explore=0.1, budget=budget)


def read_checkpoint(folder: Path, routers: RouterConfig | None = None) -> tuple[Decoder, str]:
    """The decoder of a Hugging Face checkpoint, its weights memory-mapped in the files' dtypes; and its family.

    Args:
        folder: with ``config.json`` and safetensors files; no code in it is run.
        routers: to add, with all-zero weights; none unless given.

    Raises:
        ValueError: if it is incomplete, cannot be represented by this decoder, or has routers already.
    """
    import torch

    from model.router import Router
    from trainer.checkpoints.weights_folder import mismatch

    raw = _raw_config(folder)
    decoder = _empty_decoder(raw, folder / HF_CONFIG, routers)
    config = decoder.config
    tensors = read_tensors(weight_files(folder))
    if config.tied_head:
        tie_head(tensors, folder)
    wanted = dict(decoder.named_parameters())
    added = (
        []
        if routers is None
        else [f"{name}.weight" for name, module in decoder.named_modules() if isinstance(module, Router)]
    )
    shapes = {name: wanted.pop(name).shape for name in added}
    difference = mismatch(wanted, {name: t.shape for name, t in tensors.items()})
    if difference is not None:
        raise ValueError(
            f"the weights in {folder} are not those that its config.json describes: {difference}; download both again"
        )
    dtype = tensors["embed_tokens.weight"].dtype
    tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    decoder.load_state_dict(tensors, strict=False, assign=True)
    if config.tied_head:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    return decoder, raw["model_type"]


def compare(decoder: Decoder, folder: Path) -> Difference:
    """How far ``decoder``'s logits are from those that transformers computes from ``folder``, both in fp32.

    One sequence of random tokens is at the first positions, another is spread over the longest context, which reveals
    rotary frequencies that differ.

    Raises:
        ValueError: if transformers cannot load the checkpoint, or they differ by more than ``TOLERANCE``.
    """
    import torch

    tokens, positions = _probe(decoder.config)
    with torch.no_grad():
        theirs = _reference_logits(folder, tokens, positions, decoder)
        ours = copy.deepcopy(decoder).float()(tokens, positions=positions).logits
    largest, span = float((ours - theirs).abs().max()), float(theirs.max() - theirs.min())
    if not largest <= TOLERANCE * span:  # NaN as well
        raise ValueError(
            f"logits of {folder} differ from transformers' by {largest:.2g}, above {TOLERANCE:g} of their range "
            f"({span:.3g}), so nothing was written; the checkpoint uses something that this import does not support"
        )
    return Difference(largest, span, tokens.numel(), int(positions.max()))


def import_checkpoint(
    folder: Path, out: Path, with_comparison: bool = True, trusted: bool = False, routers: RouterConfig | None = None
) -> list[str]:
    """Import ``folder`` into the new folder ``out``; returns a report, one line per item.

    Args:
        folder: the checkpoint.
        out: new or empty.
        with_comparison: compare logits with those of transformers.
        trusted: allow the comparison to run the folder's own Python file, if it has one.
        routers: to add, with all-zero weights; none unless given.

    Raises:
        ValueError: with one sentence on the problem.
    """
    require_new_folder(out)
    model_config(_raw_config(folder), folder / HF_CONFIG)
    from convert import hf_compare
    from data.tokenizer_files import left_behind, tokenizer_files
    from trainer.checkpoints.weights_folder import write_weights

    if (folder / hf_compare.ADAPTER_FOLDER / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} has separate adapters in {hf_compare.ADAPTER_FOLDER}/, which cannot be imported; export the run "
            f"with --adapters merged, or give a copy of {folder} without them to import the model alone"
        )
    decoder, family = read_checkpoint(folder, routers)
    ids = _checked_tokenizer(folder, decoder.config.vocab_size, family, with_comparison)
    if not with_comparison:
        compared = "not compared with transformers"
    elif family != HOPSCOTCH:
        compared = _described(compare(decoder, folder))
    elif trusted:
        plain = decoder if routers is None else read_checkpoint(folder)[0]  # the file's model has no new routers
        compared = hf_compare.compare(hf_compare.refer(copy.deepcopy(plain).float()), folder)
    else:
        compared = "not compared: that runs the Python file in HF_DIR, which --trust-remote-code allows"
    config = decoder.config
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in decoder.parameters()}))
    source = f"Hugging Face {family} checkpoint {folder} ({dtypes})"
    if routers is not None:
        source += f", with new {routers.granularity} routers for density {routers.density:g}"
    write_weights(decoder, out, folder, {"source": source})
    return [
        f"read      {folder}: {family}, {sum(p.numel() for p in decoder.parameters()):,} parameters in {dtypes}",
        f"model     {config.layers} layers, width {config.width}, {config.heads} heads ({config.kv_heads} key/value) "
        f"of {config.head_dim}, feed-forward {config.ffn_width}, vocabulary {config.vocab_size:,}, "
        f"{config.max_positions:,} positions",
        *_routing_lines(decoder, routers is not None),
        f"compared  {compared}",
        f"tokenizer {ids}",
        f"wrote     {out}, with {', '.join(str(file.relative_to(folder)) for file in tokenizer_files(folder))}",
        *([f"left      {others}"] if (others := left_behind(folder)) else []),
    ]


def _raw_config(folder: Path) -> dict[str, Any]:
    """Content of ``config.json``."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a local folder with {HF_CONFIG} and safetensors files")
    if not (folder / HF_CONFIG).is_file():
        raise ValueError(f"{folder} has no {HF_CONFIG}; give the folder of a Hugging Face checkpoint")
    return read_json(folder / HF_CONFIG)


def _checked_tokenizer(folder: Path, vocab_size: int, family: str, with_comparison: bool) -> str:
    """Check the tokenizer in ``folder``, every id of which must have an embedding; returns a report."""
    from convert.hf_tokenizer import compared_with_transformers
    from data.tokenization import SentencePiece, load_text_tokenizer, require_vocabulary
    from data.tokenizer_json import require_same_ids

    tokenizer = load_text_tokenizer(folder)
    require_vocabulary(tokenizer, vocab_size, _RESIZE)
    said = [f"as a tokenizer.json {require_same_ids(tokenizer)[1]}"] if isinstance(tokenizer, SentencePiece) else []
    if with_comparison:
        return "; ".join([*said, compared_with_transformers(tokenizer, folder, auto=family != HOPSCOTCH)])
    return "; ".join([*said, "not compared with transformers"])


def _described(difference: Difference) -> str:
    return (
        f"logits are transformers': largest difference {difference.largest:.2g} of a range of {difference.range:.3g}, "
        f"on {difference.tokens:,} tokens, positions up to {difference.position:,}"
    )


def _routing_lines(decoder: Decoder, new: bool) -> list[str]:
    """Report lines on routers and ensemble."""
    lines = []
    router, ensemble = decoder.config.router, decoder.ensemble
    if router is not None:
        still = ", new: all weights 0, so every token executes until they are tuned (base.routers: tuned)"
        lines.append(
            f"routers   {router.kind}, {len(decoder.config.sites)} by {router.granularity}, density {router.density:g}"
            f"{still if new else ''}"
        )
    if ensemble is not None:
        lines.append(f"ensemble  of the last {ensemble.config.layers} layers")
    return lines


def _empty_decoder(raw: dict[str, Any], path: Path, routers: RouterConfig | None) -> Decoder:
    """The decoder that ``config.json`` at ``path`` describes, with ``routers`` added, without storage for weights."""
    from model.router import thresholds_of
    from trainer.checkpoints.empty_decoder import without_memory

    config = model_config(raw, path)
    if routers is not None:
        if config.router is not None:
            raise ValueError(
                f"{path.parent} already has {config.router.kind} routers of density {config.router.density:g}, but "
                "--routers adds them to a model without; leave it out"
            )
        config = config.model_copy(update={"router": routers})
    decoder = without_memory(config, routing_seed(raw, path), ensemble_config(raw, path))
    given = routing_thresholds(raw, path, len(config.sites))
    decoder.thresholds = None if given is None else thresholds_of(given)
    return decoder


def _probe(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Random tokens and their positions, int64 [2, T] each."""
    import torch

    length = min(_COMPARED_TOKENS, config.max_positions)
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    near = torch.arange(length)
    return tokens, torch.stack([near, near * ((config.max_positions - 1) // max(length - 1, 1))])


def _reference_logits(folder: Path, tokens: Tensor, positions: Tensor, decoder: Decoder) -> Tensor:
    """transformers' logits, [2, T, V]; from ``decoder``'s weights if transformers does not know the files' names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    try:
        if all(is_usual(name) for name in names_in(weight_files(folder))):
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **how)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_config(config, **how).eval()
            model.load_state_dict(
                {usual_name(name): weight for name, weight in decoder.state_dict().items()}, strict=False
            )
    except Exception as error:  # any failure, with transformers' own message
        raise ValueError(
            f"transformers cannot load {folder} to compare with ({str(error).strip().splitlines()[-1].strip()}); fix "
            "the checkpoint, or import it with --no-compare"
        ) from error
    # Without a mask, positions that jump would be taken for packed documents.
    return model(input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, compare, write, report."""
    parser = command_parser("convert.from_hf", __doc__)
    parser.add_argument("folder", type=path_argument, metavar="HF_DIR", help="a local Hugging Face checkpoint")
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the folder to write; new or empty")
    comparison = parser.add_mutually_exclusive_group()
    comparison.add_argument(
        "--no-compare",
        action="store_true",
        help="do not compare logits, which takes memory for the model in fp32 (4 bytes a parameter), besides its files",
    )
    comparison.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="if convert.to_hf wrote HF_DIR with a modelling file, compare logits by running that Python file",
    )
    parser.add_argument(
        "--routers",
        type=float,
        metavar="DENSITY",
        help="add learned skip routers for this share of tokens (above 0, at most 1); all execute until they are tuned",
    )
    parser.add_argument(
        "--granularity",
        choices=("layer", "module"),
        help="one new router per layer, or one for its attention and one for its feed-forward (default: layer)",
    )
    options = parser.parse_args(arguments)
    with user_errors():
        if options.granularity is not None and options.routers is None:
            raise ValueError(
                f"--granularity {options.granularity} applies to routers that are added; also give --routers DENSITY, "
                "or leave it out"
            )
        routers = None if options.routers is None else new_routers(options.routers, options.granularity or "layer")
        lines = import_checkpoint(
            options.folder, options.out, not options.no_compare, options.trust_remote_code, routers
        )
        print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
