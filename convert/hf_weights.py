"""The safetensors files of a Hugging Face checkpoint, by the decoder's names.

Names vary. Parts that wrappers (torch.compile, FSDP, DistributedDataParallel, trainers) insert into weight names are
removed; tied weights may be stored under either name, or under both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from data.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch.compile, FSDP and activation checkpointing insert anywhere into a weight's name."""
_PREFIXES = ("module", "model")
"""Prefixes that DistributedDataParallel, trainers and transformers' own classes add."""
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def weight_files(folder: Path) -> list[Path]:
    """The weight files, all of which exist."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if (folder / _INDEX).is_file():
        names = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{folder / _INDEX} has no weight_map from tensors to files; download it again")
        files = [_inside(folder, name) for name in sorted(set(names.values()))]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file}, which {_INDEX} names, is not there; download the checkpoint again")
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} has only pytorch_model.bin, and reading that file runs code; convert it to safetensors first: "
            "transformers' from_pretrained and save_pretrained do"
        )
    raise ValueError(f"{folder} has neither {_WHOLE} nor {_INDEX}; download the checkpoint's safetensors files")


def _inside(folder: Path, name: str) -> Path:
    """The file that the index calls ``name``, which must be inside ``folder`` after following links."""
    file = folder / name
    steps_out = Path(name).is_absolute() or ".." in Path(name).parts
    if steps_out or not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder / _INDEX} names {name}, which is outside {folder}, and only files in it are read; copy the file "
            "itself there (cp -rL follows the links of a download cache), or download the checkpoint again"
        )
    return file


def read_tensors(files: list[Path], share: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    """All tensors in ``files`` by the decoder's names, memory-mapped; values that are not finite are refused.

    Args:
        files: as :func:`weight_files` finds them.
        share: (i, n): check the values of only every n-th tensor, from number i on, as rank i of n.
    """
    tensors: dict[str, Tensor] = {}
    spelt: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    # Files of old versions also hold a buffer that is computed from config.json.
                    if name.endswith("rotary_emb.inv_freq"):
                        continue
                    ours = our_name(name)
                    if ours in tensors:
                        raise ValueError(
                            f"{path} holds {name} and {spelt[ours]}, which are two names of one weight; keep one of "
                            "them"
                        )
                    spelt[ours], tensors[ours] = name, _tensor(file, name, path)
                    if (len(tensors) - 1) % share[1] == share[0]:
                        _require_finite(tensors[ours], name, path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it again") from None
    return tensors


def our_name(name: str) -> str:
    """A weight's name in the decoder: without the parts added by compilation, parallelism and other wrappers."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] in _PREFIXES:
        parts.pop(0)
    return ".".join(parts)


def _tensor(file: Any, name: str, path: Path) -> Tensor:
    """The tensor ``name``, whose dtype must be one that a decoder can have."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
        raise ValueError(
            f"{name} in {path} is {dtype}, but weights must be {', '.join(_DTYPES.values())}; take a checkpoint that "
            "is not quantised"
        )
    tensor: Tensor = file.get_tensor(name)
    return tensor


def _require_finite(tensor: Tensor, name: str, path: Path) -> None:
    import torch

    if tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):  # a NaN makes both ends NaN
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{name} in {path} has {bad:,} of {tensor.numel():,} values that are NaN or infinite; take an earlier "
            "checkpoint, or download it again"
        )


def tie_head(tensors: dict[str, Tensor], folder: Path) -> None:
    """Keep only the embedding of a tied head: files may hold both, or either of them."""
    import torch

    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("embed_tokens.weight")
    if head is not None and embedding is None:
        tensors["embed_tokens.weight"] = head
    elif head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"{folder} has a separate head, but its config.json sets tie_word_embeddings; set that to false if the "
            "head was trained"
        )


def names_in(files: list[Path]) -> list[str]:
    found: list[str] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            found += file.keys()
    return found


def usual_name(name: str) -> str:
    """transformers' name of the decoder's weight ``name``."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def is_usual(name: str) -> bool:
    """Whether transformers knows the name, with its prefix or, as in a model without a head, without."""
    return name in (usual_name(our_name(name)), our_name(name))
