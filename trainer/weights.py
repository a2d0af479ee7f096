"""A trained decoder out of a checkpoint, in one process: no ranks, no engine, and no code from pickles is run.

What DeepSpeed's files hold depends on the ZeRO stage and the precision (0.19; W ranks, groups of parameters):

    stage 0, 1, 2   fp32         whole weights, which are the fp32 master weights
    stage 0         bf16         whole bf16 weights; fp32 masters, one tensor a parameter, without names
    stage 1, 2      bf16, fp16   whole weights; each group's masters joined end to end and cut into W partitions
    stage 3         any          no weights; each parameter's master cut into W equal partitions, the last one padded

Masters are read wherever there are any. A bf16 weight is its master rounded, so at stages 0 to 2 every weight says
whether its master was found in the right place. DeepSpeed's own converter does not know stage 0 and asks for
unrestricted unpickling; the table of fragments beside the partitions is wrong under ``round_robin_gradients``. So the
order of the parameters in ``param_shapes`` is what counts here.

Files are mapped, not read: in memory is the fp32 model, and of the files what the system likes to keep.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.decoder import Decoder
from settings import load
from trainer import checkpoint, manifest
from trainer.config import RunConfig
from trainer.distributed import World, import_deepspeed

_ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class _Stored(NamedTuple):
    """A parameter in the files.

    Attributes:
        name: as in the model.
        shape: of the whole parameter.
        pieces: flat tensors; one after the other they are its values.
        rounded: the weight in the precision of the forward pass, where the files hold it too.
    """

    name: str
    shape: torch.Size
    pieces: list[Tensor]
    rounded: Tensor | None = None


def load_decoder(run_or_checkpoint: Path) -> tuple[Decoder, RunConfig, int]:
    """The decoder in evaluation mode, fp32 on the CPU; the config of its run; and the optimiser steps it has had.

    Args:
        run_or_checkpoint: a run folder, of which the newest whole checkpoint is taken (torn ones are told on stderr and
            passed over), or one checkpoint's folder.

    Raises:
        ValueError: if there is no whole checkpoint, or it holds another model than its config says, or anything but
            tensors and numbers.
    """
    folder = _checkpoint_of(run_or_checkpoint)
    written = manifest.read(folder, _ALONE)
    config = load(folder / "config.yaml", [], RunConfig)
    decoder = Decoder(config.model, seed=config.train.seed).eval()
    import_deepspeed()  # quietly: the allowed types are its own
    with checkpoint.only_tensors(folder), torch.no_grad():
        _fill(decoder, _stored(folder / "deepspeed", config.deepspeed.zero_stage, written["world_size"]), folder)
    return decoder, config, written["step"]


def _checkpoint_of(path: Path) -> Path:
    """The checkpoint that ``path`` names, every file of it as its manifest says."""
    what = "give a run folder (train.run_dir) or one of the step-N folders in its checkpoints/"
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; {what}")
    folder = path / "checkpoints"
    if not folder.is_dir():
        problem = manifest.problem_of(path, _ALONE)
        if problem is not None:
            raise ValueError(f"{path} is neither a run folder nor a whole checkpoint: {problem}; {what}")
        return path
    found, torn = checkpoint.find(folder, _ALONE)
    for sentence in torn:
        print(f"passed over: {sentence}", file=sys.stderr, flush=True)
    if found is None:
        raise ValueError(f"{folder} holds no whole checkpoint; train until one is saved, or give another run folder")
    return found


def _fill(decoder: Decoder, stored: Iterable[_Stored], folder: Path) -> None:
    """Copy what the files hold into the decoder; every parameter once, in its shape."""
    wanted = dict(decoder.named_parameters())  # a tied head is not among them
    problems = []
    for entry in stored:
        parameter = wanted.pop(entry.name, None)
        if parameter is None:
            if not (decoder.config.tied_head and entry.name == "lm_head.weight"):
                problems.append(f"{entry.name} is there, but not in the config's model")
        elif parameter.shape != entry.shape:
            problems.append(f"{entry.name} is {list(entry.shape)} there and {list(parameter.shape)} by the config")
        else:
            _copy(parameter, entry, folder)
    problems += [f"{name} is missing" for name in wanted]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the weights in {folder} do not match its config.yaml ({'; '.join(problems[:3])}{more}); one of them was "
            "changed since, so take another checkpoint"
        )


def _copy(parameter: Tensor, entry: _Stored, folder: Path) -> None:
    flat, done = parameter.view(-1), 0
    for piece in entry.pieces:
        flat[done : done + piece.numel()] = piece
        done += piece.numel()
    if done != flat.numel() or not (
        entry.rounded is None or torch.equal(parameter.to(entry.rounded.dtype), entry.rounded)
    ):
        raise ValueError(
            f"{entry.name} in {folder} is not where DeepSpeed 0.19 would have put it; read the checkpoint with the "
            "version of this project that wrote it"
        )


def _stored(folder: Path, stage: int, ranks: int) -> Iterator[_Stored]:
    """All parameters in DeepSpeed's ``folder``, in fp32."""
    if stage == 3:
        shapes = _load(folder, "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
        flat = [_Joined(state["fp32_flat_groups"]) for state in _optimizer_states(folder, ranks)]
        yield from _whole_from_equal_parts(shapes, flat)
        return
    states = _load(folder, "mp_rank_00_model_states.pt")
    weights: dict[str, Tensor] = states["module"]
    if all(weight.dtype == torch.float32 for weight in weights.values()):
        for name, weight in weights.items():
            yield _Stored(name, weight.shape, [weight.reshape(-1)])
    elif stage == 0:
        yield from _by_value(weights, [master for group in states["optimizer"]["fp32_groups"] for master in group])
    else:
        optimizers = _optimizer_states(folder, ranks)
        yield from _in_order(weights, states["param_shapes"], optimizers)


def _by_value(weights: dict[str, Tensor], masters: list[Tensor]) -> Iterator[_Stored]:
    """Masters without names: a weight's is the first of its shape that rounds to it (equal shapes keep their order)."""
    for name, weight in weights.items():
        for place, master in enumerate(masters):
            if master.shape == weight.shape and torch.equal(master.to(weight.dtype), weight):
                yield _Stored(name, weight.shape, [masters.pop(place).reshape(-1)])
                break


def _in_order(
    weights: dict[str, Tensor], shapes: list[dict[str, torch.Size]], optimizers: list[dict[str, Any]]
) -> Iterator[_Stored]:
    """Stages 1 and 2: a group is its parameters end to end (with gaps, if DeepSpeed aligned them) over all ranks."""
    for number, group in enumerate(shapes):
        joined = _Joined([state["single_partition_of_fp32_groups"][number] for state in optimizers])
        gaps = optimizers[0].get("param_alignment_paddings", [[0] * len(group)] * len(shapes))[number]
        start = 0
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            yield _Stored(name, shape, joined.pieces(start, shape.numel()), weights[name])
            start += shape.numel() + gap


def _whole_from_equal_parts(shapes: list[dict[str, torch.Size]], ranks: list[_Joined]) -> Iterator[_Stored]:
    """Stage 3: every rank holds an equal part of every parameter, in the same order; the last parts are padded."""
    start = 0
    for name, shape in (entry for group in shapes for entry in group.items()):
        part = math.ceil(shape.numel() / len(ranks))
        pieces: list[Tensor] = []
        for rank, joined in enumerate(ranks):
            pieces += joined.pieces(start, max(min(part, shape.numel() - rank * part), 0))
        yield _Stored(name, shape, pieces)
        start += part


class _Joined:
    """Flat tensors as if they were one, without a copy."""

    def __init__(self, parts: list[Tensor]):
        self.parts = parts

    def pieces(self, start: int, count: int) -> list[Tensor]:
        """``count`` entries from ``start`` on, as views; fewer where the parts end."""
        found = []
        for part in self.parts:
            piece = part[max(start, 0) : max(start + count, 0)]
            if piece.numel():
                found.append(piece)
            start -= part.numel()
        return found


def _optimizer_states(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank's optimiser wrote, in rank order; the names begin with ``bf16_`` or do not."""
    names = []
    for rank in range(ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        names.append(name if (folder / name).exists() else f"bf16_{name}")
    return [_load(folder, name)["optimizer_state_dict"] for name in names]


def _load(folder: Path, name: str) -> Any:
    return torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
