"""Export a model to a Hugging Face folder: ``python -m convert.to_hf RUN_OR_CHECKPOINT OUT``.

    python -m convert.to_hf runs/demo runs/demo-hf
    python -m convert.to_hf runs/demo-tuned/checkpoints/step-00000100 /tmp/tuned-hf --dtype bf16
    python -m convert.to_hf runs/demo-tuned runs/demo-tuned-hf --adapters separate

RUN_OR_CHECKPOINT is a run of either stage (its newest whole checkpoint is taken), one of its checkpoints, or a folder
of weights. OUT is a new folder or an empty one. Adapters are merged, or saved to OUT/adapter in PEFT's format. A dense
model becomes a native LlamaForCausalLM (Qwen3ForCausalLM with query and key norms). A model with routers or an ensemble
comes with ``modeling_hopscotch.py``, which transformers loads with ``trust_remote_code=True``.

Everything is written to OUT.tmp, loaded from there by transformers in fp32 on the CPU, and compared: logits of random
tokens and a greedy continuation. Only then is it renamed; if something differs, OUT.tmp is left for inspection. Until
then our fp32 weights are in an unnamed file on OUT's disk: one shard is in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.hf_weights import usual_name
from convert.model_card import Exported, model_card
from data.files import nearest_folder, require_new_folder, temporary_name, write_atomically, write_json
from data.urls import copy_folder, require_empty
from model.config import ModelConfig
from settings import command_parser, counted, path_argument, positive_number, user_errors
from trainer import git_state, preflight

if TYPE_CHECKING:
    import torch

    from model.decoder import Decoder

SHARD_BYTES = 5_000_000_000
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MODELING = "modeling_hopscotch.py"
ADAPTERS = ("merged", "separate")
NOT_COMPARED = "with nothing, as requested: the export's logits were not checked"


def export(
    path: Path,
    out: Path,
    dtype: str = "fp32",
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapters: str = "merged",
    compared: bool = True,
) -> list[str]:
    """Export the model at ``path`` to ``out``; returns a report, one line per item.

    Args:
        path: as for :func:`tune.load.load_model`.
        out: does not exist, or is empty.
        dtype: of the weights, a key of ``DTYPES``.
        tokenizer: folder of the tokenizer; the run's unless given.
        shard_bytes: largest safetensors file, except where a single weight is larger.
        adapters: of a tuned run, one of ``ADAPTERS``: merged into the weights, or separate.
        compared: load the export with transformers, and compare logits and greedy tokens.

    Raises:
        ValueError: with one sentence on the problem.
    """
    from convert.facts import facts_of
    from convert.hf_compare import ADAPTER_FOLDER, compare, refer
    from convert.hf_tokenizer import require_transformers_ids, write_tokenizer
    from data.tokenization import SentencePiece, load_text_tokenizer
    from tune.adapter_files import export_adapter
    from tune.adapters import take_out
    from tune.load import load_model

    require_new_folder(out)
    separate = adapters == "separate"
    loaded = load_model(path, merged=not separate, disk=nearest_folder(out))
    decoder = loaded.decoder
    _require_exportable(decoder, path, separate)
    _round(decoder, dtype)
    partial = temporary_name(out)
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that failed
    partial.mkdir(parents=True)
    source = tokenizer or loaded.tokenizer_folder
    ids, tokenizer_done = write_tokenizer(source, partial, decoder.config.vocab_size, decoder.config.max_positions)
    reference = refer(decoder) if compared else None
    if separate:
        export_adapter(decoder, partial / ADAPTER_FOLDER)
        take_out(decoder)
    config = hf_config(decoder, ids, dtype)
    files = _write_model(decoder, config, ids, partial, shard_bytes)
    if compared and not isinstance(given := load_text_tokenizer(source), SentencePiece):
        tokenizer_done += f"; {require_transformers_ids(given, partial)}"
    model = _exported(decoder, separate)
    facts = {**facts_of(loaded), "export_commit": git_state.commit()}
    if facts.get("adapter") in ("lora", "dora"):
        facts["adapter"] += f", {adapters}"
    del loaded, decoder  # transformers' model takes its place
    outcome = NOT_COMPARED if reference is None else compare(reference, partial)
    write_atomically(partial / "README.md", model_card(model, facts, [outcome, tokenizer_done]).encode())
    os.replace(partial, out)
    written = f"{config['architectures'][0]} in {dtype}, {counted(files, 'safetensors file')}"
    return [
        f"read      {facts['source']}: {facts['kind']}, {model.parameters:,} parameters",
        f"compared  {outcome}",
        f"tokenizer {tokenizer_done}",
        f"wrote     {out}: {written}{_remarks(model, facts, out)}",
    ]


def _round(decoder: Decoder, dtype: str) -> None:
    """Round every parameter, still in fp32, to its value in the export, so that the exported model is compared."""
    import torch

    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(parameter.to(getattr(torch, DTYPES[dtype])))


def _remarks(model: Exported, facts: dict[str, Any], out: Path) -> str:
    """How to load the export, as the end of a line."""
    code = f", loaded with trust_remote_code=True, which runs its {MODELING}" if model.remote_code else ""
    if model.adapter is None:
        return code
    return f"{code}; {facts['adapter'].split(',')[0]} adapter in {out / model.adapter}, for PEFT"


def _write_model(decoder: Decoder, config: dict[str, Any], ids: dict[str, Any], folder: Path, shard_bytes: int) -> int:
    """Write configs, weights and, if needed, the modelling file; returns the number of weight files."""
    import torch

    from data.tokenization import GENERATION_NAME

    write_json(folder / "config.json", config)
    if not (folder / GENERATION_NAME).is_file():
        write_json(folder / GENERATION_NAME, ids)
    if not is_native(decoder):
        shutil.copyfile(Path(__file__).with_name(MODELING), folder / MODELING)
    return _write_weights(decoder, folder, getattr(torch, config["dtype"]), shard_bytes)


def _exported(decoder: Decoder, separate: bool) -> Exported:
    """What the model card describes."""
    from convert.hf_compare import ADAPTER_FOLDER

    return Exported(
        decoder.config,
        sum(parameter.numel() for parameter in decoder.parameters()),
        0 if decoder.ensemble is None else decoder.ensemble.config.layers,
        not is_native(decoder),
        ADAPTER_FOLDER if separate else None,
    )


def is_native(decoder: Decoder) -> bool:
    """True for a model that one of transformers' own classes can compute."""
    config = decoder.config
    # LlamaConfig refuses a width that is not divisible by the heads, even if head_dim is given.
    return config.router is None and decoder.ensemble is None and config.width % config.heads == 0


def hf_config(decoder: Decoder, ids: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The contents of ``config.json``, for transformers 5 and, where the model is native, 4.

    Args:
        decoder: what is exported.
        ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
        dtype: of the weights, a key of ``DTYPES``.
    """
    config, native = decoder.config, is_native(decoder)
    kind, name = ("qwen3", "Qwen3") if config.qk_norm else ("llama", "Llama")
    kind, name = (kind, name) if native else ("hopscotch", "Hopscotch")
    rope = _rope(config)
    found: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": float(config.norm_epsilon),
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
        **ids,
        "rope_parameters": rope,
        # transformers 4 reads these and would silently take 10000 and no scaling without them.
        "rope_theta": float(config.rope_theta),
        "rope_scaling": None if config.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
    }
    if native:
        return found
    for name_of_other in ("attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "torch_dtype"):
        del found[name_of_other]
    module = Path(MODELING).stem
    auto_map = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    found["auto_map"] = {auto: f"{module}.{name}{ours}" for auto, ours in auto_map.items()}
    return found | {"qk_norm": config.qk_norm} | _routing(decoder)


def _routing(decoder: Decoder) -> dict[str, Any]:
    """Fields that only the modelling file has."""
    from model.router import numbers_of

    found: dict[str, Any] = {}
    config, router, ensemble = decoder.config, decoder.config.router, decoder.ensemble
    if router is not None:
        found = {
            "router_kind": router.kind,
            "router_granularity": router.granularity,
            "router_input": router.input,
            "router_density": router.density,
            "router_first_layer": router.always_on_first,
            "router_end_layer": config.layers - router.always_on_last,
            "router_layers": None if router.layers == "all" else list(config.routed_layers),
            "router_seed": decoder.seed,
            "router_thresholds": None if decoder.thresholds is None else numbers_of(decoder.thresholds),
        }
    if ensemble is not None:
        found |= {
            "ensemble_layers": ensemble.config.layers,
            "ensemble_temperature": ensemble.config.temperature,
            "ensemble_top": ensemble.config.top,
        }
    return found


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Rotary parameters as transformers 5 names them."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    scaling = config.rope_scaling
    if scaling is not None:
        found |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        found |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    return found


def _write_weights(decoder: Decoder, folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    """Write safetensors files, one in memory at a time besides the decoder, and their index; returns their number."""
    import torch

    from trainer.checkpoints.weights_folder import save_tensors

    state = decoder.state_dict()
    if decoder.config.tied_head:
        del state["lm_head.weight"]
    named = {usual_name(name): tensor for name, tensor in state.items()}
    width = torch.empty(0, dtype=dtype).element_size()
    shards: list[list[str]] = [[]]
    taken = 0
    for name, tensor in named.items():
        if shards[-1] and taken + tensor.numel() * width > shard_bytes:
            shards.append([])
            taken = 0
        shards[-1].append(name)
        taken += tensor.numel() * width
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: named[name].to(dtype).contiguous() for name in names}
        save_tensors(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in named.values()) * width
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return len(shards)


def _require_exportable(decoder: Decoder, path: Path, separate: bool) -> None:
    from tune.adapters import has_adapters

    decoder.config.require_causal(f"{path} cannot generate and is not exported")
    if separate and not has_adapters(decoder):
        raise ValueError(
            f"--adapters separate is for runs tuned with adapter.kind lora or dora, but {path} has no adapters; leave "
            "it out"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, write, compare, rename, report."""
    parser = command_parser("convert.to_hf", __doc__)
    parser.add_argument(
        "path",
        type=path_argument,
        metavar="RUN_OR_CHECKPOINT",
        help="a run of either stage, a checkpoint, a folder of weights",
    )
    parser.add_argument(
        "out", type=path_argument, metavar="OUT", help="the folder to write; must not exist, or be empty"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights (default: fp32)")
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="FOLDER",
        help="folder with tokenizer.model or tokenizer.json (default: the run's)",
    )
    parser.add_argument(
        "--shard-gb",
        type=positive_number(),
        default=SHARD_BYTES / 1e9,
        help="largest file of weights, in GB (default: %(default)g)",
    )
    parser.add_argument(
        "--adapters",
        choices=ADAPTERS,
        default="merged",
        help="adapters of a tuned run: merged into the weights, or in OUT/adapter for PEFT (default: merged)",
    )
    parser.add_argument(
        "--no-compare",
        action="store_true",
        help="do not run the export in transformers: a forward pass and 64 greedy tokens of both models on the CPU",
    )
    parser.add_argument("--copy-to", metavar="URL", help="also copy OUT to an empty place such as s3://bucket/folder")
    options = parser.parse_args(arguments)
    with user_errors():
        if options.copy_to is not None:
            require_empty(options.copy_to, "--copy-to")
        require_new_folder(options.out)
        preflight.open_model(options.path)
        lines = export(
            options.path,
            options.out,
            options.dtype,
            options.tokenizer,
            int(options.shard_gb * 1e9),
            options.adapters,
            not options.no_compare,
        )
        print("\n".join(lines), flush=True)
        if options.copy_to is not None:
            copy_folder(options.out, options.copy_to, last="config.json")
            print(f"copied to {options.copy_to}, config.json last", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
