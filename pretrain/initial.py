"""Find what the ``init`` block names, check it against the config and describe it, before anything is built.

    a run, a checkpoint     of stage one; the fp32 masters, written with any number of ranks and ZeRO stage
    a folder of weights     written by ``convert.from_hf``, ``convert.average`` or ``tune.merge``
    a Hugging Face folder   of the Llama family, or one of our exports

Every rank memory-maps the files and reads its part of one parameter at a time. The ranks verify the files together,
each a share of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from safetensors import safe_open

from convert.hf_config import ensemble_config, model_config, routing_thresholds
from convert.hf_weights import read_tensors, tie_head, weight_files
from data.files import read_json
from data.tokenization import SentencePiece, load_text_tokenizer, tokenizer_sha256
from model.config import ModelConfig, RouterConfig
from model.router import thresholds_of
from settings import load
from trainer.checkpoints import manifest
from trainer.checkpoints.compatibility import differences
from trainer.checkpoints.empty_decoder import without_memory
from trainer.checkpoints.layout import CONFIG
from trainer.checkpoints.read_weights import checkpoint_of, thresholds_in, weights_of
from trainer.checkpoints.run_tokenizer import kept_tokenizer
from trainer.checkpoints.weights_folder import WEIGHTS, is_weights_folder, read_config
from trainer.checkpoints.zero_files import whole_weights
from trainer.config import InitConfig, PretrainConfig, is_stage_two
from trainer.distributed import World
from trainer.initial import Fork, GivenWeights, Initial
from trainer.preflight import WHAT_INIT_TAKES


def open_initial(init: InitConfig, model: ModelConfig, tokenizer: Path, world: World) -> Initial:
    """Open what ``init`` names, for a run of ``model`` on tokens of the one in the folder ``tokenizer``; collective.

    Raises:
        ValueError: if it is missing, torn, from stage two, or of another model or tokenizer; for a fork, if it has no
            optimiser state. On every rank.
    """
    folder = Path(init.path)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; {WHAT_INIT_TAKES}")
    if init.kind == "fork":
        return _fork(folder, world)
    if is_weights_folder(folder):
        given = _weights_folder(folder, world)
    elif (folder / "config.json").is_file():
        given = _hugging_face(folder, world)
    else:
        given = _checkpoint(folder, world)
    _refuse_another_model(given, model)
    if problem := world.broadcast_object(_another_tokenizer(given.tokenizer, tokenizer) if world.is_main else None):
        raise ValueError(problem)
    return given


def _fork(folder: Path, world: World) -> Fork:
    if is_weights_folder(folder) or (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has weights but no optimiser state, from which init.kind fork continues; set init.kind: "
            "weights, or give a run or one of its checkpoints"
        )
    checkpoint = _of_stage_one(folder, world)
    step = manifest.read(checkpoint, world)["step"]
    return Fork(checkpoint, f"fork of {checkpoint}, step {step:,}")


def _of_stage_one(folder: Path, world: World) -> Path:
    """The whole checkpoint that ``folder`` names."""
    found = checkpoint_of(folder, world, WHAT_INIT_TAKES)
    if is_stage_two(found / CONFIG):
        raise ValueError(
            f"{found} is a stage-two checkpoint, whose weights apply on top of a base; merge them first with: python "
            f"-m tune.merge {folder} OUT, and give init.path that folder"
        )
    return found


def _checkpoint(folder: Path, world: World) -> GivenWeights:
    found = _of_stage_one(folder, world)
    step = manifest.read(found, world)["step"]
    config = load(found / CONFIG, [], PretrainConfig)
    read = partial(weights_of, without_memory(config.model), found, config.deepspeed.zero_stage)
    tokenizer = kept_tokenizer(found) or config.tokenizer_folder
    description = f"weights of {found}, step {step:,}"
    return GivenWeights(config.model, found, tokenizer, read, description, thresholds_in(found))


def _weights_folder(folder: Path, world: World) -> GivenWeights:
    config = read_config(folder, world)
    _refuse_ensemble(folder, config.ensemble is not None)
    source = manifest.read(folder, world).get("source", "unknown origin")
    given = None if config.thresholds is None else thresholds_of(config.thresholds)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = f"weights of {folder} ({source})"
    return GivenWeights(config.model, folder, folder, partial(whole_weights, tensors), description, given)


def _hugging_face(folder: Path, world: World) -> GivenWeights:
    raw, path = read_json(folder / "config.json"), folder / "config.json"
    model = model_config(raw, path)
    _refuse_ensemble(folder, ensemble_config(raw, path) is not None)
    tensors, problem = {}, None
    try:
        tensors = read_tensors(weight_files(folder), (world.rank, world.size))
        if model.tied_head:
            tie_head(tensors, folder)
    except ValueError as error:
        problem = str(error)
    if problem := next((found for found in world.all_gather_objects(problem) if found), None):
        raise ValueError(problem)
    given = routing_thresholds(raw, path, len(model.sites))
    description = f"weights of the Hugging Face {raw['model_type']} checkpoint {folder}"
    thresholds = None if given is None else thresholds_of(given)
    return GivenWeights(model, folder, folder, partial(whole_weights, tensors), description, thresholds)


def _refuse_ensemble(folder: Path, has_one: bool) -> None:
    if has_one:
        raise ValueError(
            f"{folder} has a late-layer ensemble, which stage one does not train; give init.path what it was tuned from"
        )


def _refuse_another_model(given: GivenWeights, model: ModelConfig) -> None:
    """Refuse other sizes, routers that would be lost, and noise that would make new routers skip from the start."""
    added = given.model.router is None and model.router is not None
    there = _weights_alone(given.model)
    here = _weights_alone(model.model_copy(update={"router": None}) if added else model)
    if differ := differences(there.model_dump(mode="json"), here):
        raise ValueError(
            f"{given.folder} has a model that differs from the model block ({'; '.join(differ)}); set the model block "
            "to its values, or give init.path another folder"
        )
    if added:
        _refuse_noise(given.folder, model.router)


def _another_tokenizer(theirs: Path, ours: Path) -> str | None:
    """Why tokens of ``ours`` do not fit weights trained with ``theirs``; None if they do, or if that is unknown.

    A checkpoint that was copied out of its run has none beside it, and a Hugging Face folder may have none.
    """
    try:
        shas = [tokenizer_sha256(folder) for folder in (theirs, ours)]
    except ValueError:
        return None
    if shas[0] == shas[1]:
        return None  # without loading either
    there, here = load_text_tokenizer(theirs), load_text_tokenizer(ours)
    common = range(min(there.vocab_size, here.vocab_size))
    differs = next((i for i in common if there.piece(i) != here.piece(i)), None)
    if differs is None and there.vocab_size == here.vocab_size:
        return None  # the same tokenizer, stored in two ways
    what = (
        f"{there.vocab_size} pieces there, {here.vocab_size} here"
        if differs is None
        else f"id {differs} is {there.piece(differs)!r} there, {here.piece(differs)!r} here"
    )
    kind = "sentencepiece" if isinstance(there, SentencePiece) else "huggingface"
    return (
        f"the weights in init.path were trained with the tokenizer in {theirs}, but data.dir {ours} has another one "
        f"({what}); prepare the data with theirs in another data.dir: data.tokenizer: "
        f"{{kind: {kind}, path: {theirs}, vocab_size: {there.vocab_size}}}"
    )


def _weights_alone(model: ModelConfig) -> ModelConfig:
    """The config without what weights do not depend on, and with optional fields filled in."""
    return model.model_copy(update={"max_positions": 1, "init_std": 1.0, "head_width": model.head_dim})


def _refuse_noise(folder: Path, router: RouterConfig | None) -> None:
    if router is not None and router.learned and router.noise.start > 0 and router.budget.controller != "quantile":
        raise ValueError(
            f"{folder} has no routers, and new ones must execute every token at first, which noise of scale "
            f"{router.noise.start:g} prevents; set model.router.budget.controller: quantile, or router.noise.start: 0"
        )
