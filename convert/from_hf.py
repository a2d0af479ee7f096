"""Import a Hugging Face checkpoint of the Llama family: ``python -m convert.from_hf HF_DIR OUT``.

    python -m convert.from_hf ~/models/SmolLM2-135M runs/smollm2

HF_DIR is a local folder with ``config.json``, safetensors weights and a tokenizer. OUT becomes a folder that stage two
starts from (``base.path``). Before it is written, its logits are compared with those that transformers computes from
HF_DIR, in fp32 on the CPU, and a difference above a ten-thousandth of their range is an error.

Dimension letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from convert.hf_config import model_config
from data.files import read_json
from model.config import ModelConfig
from model.decoder import Decoder
from settings import user_errors
from trainer.weights_folder import mismatch, require_absent, tokenizer_files, write_weights

TOLERANCE = 1e-4
"""Largest difference between logits, as a share of their range. Two fp32 implementations stay below 1e-5."""
_COMPARED_TOKENS = 256
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Difference(NamedTuple):
    """Of logits on the same tokens."""

    largest: float
    """Largest difference of two logits."""
    range: float
    """From the least to the largest logit of transformers."""
    tokens: int
    """How many tokens, over two sequences."""
    position: int
    """The last position that one of them has."""


def read_checkpoint(folder: Path) -> tuple[Decoder, str]:
    """The decoder of a Hugging Face checkpoint, its weights mapped from the files in their dtypes; and its family.

    Raises:
        ValueError: if it is not whole, or something that this decoder cannot represent.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a local folder with config.json and safetensors files")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    raw = read_json(path)
    config = model_config(raw, path)
    with torch.device("meta"):
        decoder = Decoder(config).eval()
    tensors = _tensors(_weight_files(folder))
    if config.tied_head:
        _drop_tied_head(tensors, folder)
    difference = mismatch(dict(decoder.named_parameters()), {name: t.shape for name, t in tensors.items()})
    if difference is not None:
        raise ValueError(
            f"the weights in {folder} are not those that its config.json describes: {difference}; download both again"
        )
    decoder.load_state_dict(tensors, strict=False, assign=True)
    if config.tied_head:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    return decoder, raw["model_type"]


@torch.no_grad()
def compare(decoder: Decoder, folder: Path) -> Difference:
    """How far ``decoder``'s logits are from those that transformers computes from ``folder``, both in fp32.

    One sequence of random tokens stands at the first positions, another is spread up to the longest context, which
    shows rotary frequencies that differ.

    Raises:
        ValueError: if transformers cannot load the checkpoint, or they differ by more than ``TOLERANCE``.
    """
    tokens, positions = _probe(decoder.config)
    theirs = _reference_logits(folder, tokens, positions)
    ours = copy.deepcopy(decoder).float()(tokens, positions=positions).logits
    largest, span = float((ours - theirs).abs().max()), float(theirs.max() - theirs.min())
    if not largest <= TOLERANCE * span:  # NaN as well
        raise ValueError(
            f"logits of {folder} differ from transformers' by {largest:.2g}, above {TOLERANCE:g} of their range "
            f"({span:.3g}), so nothing was written; the checkpoint has something that this import does not know"
        )
    return Difference(largest, span, tokens.numel(), int(positions.max()))


def import_checkpoint(folder: Path, out: Path, with_comparison: bool = True) -> list[str]:
    """Import ``folder`` into the new folder ``out``; returns what was done, a line each.

    Raises:
        ValueError: with one sentence for what stands in the way.
    """
    require_absent(out)
    decoder, family = read_checkpoint(folder)
    tokenizer = tokenizer_files(folder)
    difference = compare(decoder, folder) if with_comparison else None
    config = decoder.config
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in decoder.parameters()}))
    write_weights(decoder, out, folder, {"source": f"Hugging Face {family} checkpoint {folder} ({dtypes})"})
    compared = "not compared with transformers"
    if difference is not None:
        compared = (
            f"logits are transformers': largest difference {difference.largest:.2g} of a range of "
            f"{difference.range:.3g}, on {difference.tokens:,} tokens, positions up to {difference.position:,}"
        )
    return [
        f"read      {folder}: {family}, {sum(p.numel() for p in decoder.parameters()):,} parameters in {dtypes}",
        f"model     {config.layers} layers, width {config.width}, {config.heads} heads ({config.kv_heads} key/value) "
        f"of {config.head_dim}, feed-forward {config.ffn_width}, vocabulary {config.vocab_size:,}, "
        f"{config.max_positions:,} positions",
        f"compared  {compared}",
        f"wrote     {out}, with {', '.join(file.name for file in tokenizer)}",
    ]


def _weight_files(folder: Path) -> list[Path]:
    """The files with the weights, all there."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if (folder / _INDEX).is_file():
        names = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{folder / _INDEX} has no weight_map from tensors to files; download it again")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file}, which {_INDEX} names, is not there; download the checkpoint again")
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} has only pytorch_model.bin, and reading that runs code; convert it to safetensors first: "
            "transformers' from_pretrained and save_pretrained do"
        )
    raise ValueError(f"{folder} has neither {_WHOLE} nor {_INDEX}; download the checkpoint's safetensors files")


def _tensors(files: list[Path]) -> dict[str, Tensor]:
    """Everything in ``files`` by the decoder's names, mapped, not read."""
    tensors = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    dtype = file.get_slice(name).get_dtype()
                    if dtype not in _DTYPES:
                        raise ValueError(
                            f"{name} in {path} is {dtype}, and weights must be {', '.join(_DTYPES.values())}; take a "
                            "checkpoint that is not quantised"
                        )
                    # Files of old versions also hold a buffer that follows from config.json.
                    if not name.endswith("rotary_emb.inv_freq"):
                        tensors[name.removeprefix("model.")] = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it again") from None
    return tensors


def _drop_tied_head(tensors: dict[str, Tensor], folder: Path) -> None:
    """Leave the head to the embedding, where the files hold both."""
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"{folder} holds a head of its own, but its config.json says tie_word_embeddings; set that to false if the "
            "head was trained"
        )


def _probe(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Random tokens and their positions, int64 [2, T] each."""
    length = min(_COMPARED_TOKENS, config.max_positions)
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    near = torch.arange(length)
    return tokens, torch.stack([near, near * ((config.max_positions - 1) // max(length - 1, 1))])


def _reference_logits(folder: Path, tokens: Tensor, positions: Tensor) -> Tensor:
    """What transformers computes, [2, T, V]."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except Exception as error:  # whatever it dislikes, in its own words
        raise ValueError(
            f"transformers cannot load {folder} to compare with ({str(error).strip().splitlines()[-1].strip()}); mend "
            "the checkpoint, or import it with --no-compare"
        ) from error
    # With a mask, positions that jump are not taken for packed documents.
    return model(input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, compare, write, say so."""
    parser = argparse.ArgumentParser(
        prog="convert.from_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="HF_DIR", help="a local Hugging Face checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; must not exist")
    parser.add_argument(
        "--no-compare",
        action="store_true",
        help="do not compare logits, which takes memory for the model in fp32 (4 bytes a parameter) besides its files",
    )
    options = parser.parse_args(arguments)
    with user_errors():
        print("\n".join(import_checkpoint(options.folder, options.out, not options.no_compare)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
