"""Imported checkpoints have transformers' logits, and what cannot be imported is refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from convert import from_hf
from convert.from_hf import compare, import_checkpoint, main, read_checkpoint
from convert.to_hf import export
from model.config import RopeScaling
from tests.convert.exports import make_tuned, write_run
from tests.threads import one_thread as one_thread
from tune.load import load_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "llama-tied-wide-head": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "head_dim": 12}),
    "llama-linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}, "num_key_value_heads": 4},
    ),
    "llama-3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window-without-effect": (MistralConfig, MistralForCausalLM, {"sliding_window": 96}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
}
Edit = Callable[..., Path]


def write_tokenizer(folder: Path, size: int = 97) -> None:
    """A ``tokenizer.json`` that puts BOS before a text, of ``size`` tokens."""
    alphabet = {chr(33 + place): place + 3 for place in range(size - 3)}
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, **alphabet}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each case, as transformers writes it, norms off their ones."""
    root = tmp_path_factory.mktemp("hf")

    def make(name: str) -> Path:
        config, model_class, fields = CASES[name]
        if not (root / name).exists():
            torch.manual_seed(3)
            model = model_class(config(**{**SIZES, **fields}))
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "norm" in key:
                        parameter.uniform_(0.5, 1.5)
            model.save_pretrained(root / name)
            write_tokenizer(root / name)
        return root / name

    return make


@pytest.fixture
def edited(checkpoints: Callable[[str], Path], tmp_path: Path) -> Edit:
    """A copy of the plain checkpoint (or another) with fields of its config.json set, or removed where ``...``."""

    def edit(name: str = "llama", **fields: Any) -> Path:
        folder = Path(shutil.copytree(checkpoints(name), tmp_path / "hf", dirs_exist_ok=True))
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return folder

    return edit


def theirs(folder: Path, tokens: Tensor) -> Tensor:
    """transformers' logits."""
    model_class = next(c for _, c, _ in CASES.values() if c.config_class.model_type in _config(folder)["model_type"])
    with torch.no_grad():
        return model_class.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def _spoil(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = checkpoints(name)
    assert main([str(folder), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    decoder = load_model(tmp_path / "out").decoder
    tokens = torch.randint(97, (2, 96), generator=torch.Generator().manual_seed(1))
    expected = theirs(folder, tokens)
    with torch.no_grad():
        logits = decoder(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())
    assert decoder.config.tied_head == _config(folder)["tie_word_embeddings"]
    assert decoder.config.qk_norm == (name == "qwen3")
    parameters = sum(p.numel() for p in decoder.parameters())
    assert f"{name.split('-')[0]}, {parameters:,} parameters in float32" in printed
    assert "on 192 tokens, positions up to 95" in printed and "out, with tokenizer.json" in printed
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["source"] == f"Hugging Face {name.split('-')[0]} checkpoint {folder} (float32)"


def test_rope_as_transformers_4_wrote_it(edited: Edit, tmp_path: Path) -> None:
    """Also without ``head_dim`` and, as the first Llama had it, without ``num_key_value_heads``."""
    old = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    folder = edited("llama-3", rope_parameters=..., rope_theta=500_000.0, rope_scaling={**old, "type": "llama3"})
    config = read_checkpoint(folder)[0].config
    assert config.rope_theta == 500_000.0
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_positions=32)
    assert import_checkpoint(folder, tmp_path / "out")

    folder = edited("llama-linear", rope_parameters=..., rope_scaling=None, rope_theta=777.0, head_dim=...,
                    num_key_value_heads=..., tie_word_embeddings=...)  # fmt: skip
    config = read_checkpoint(folder)[0].config
    assert (config.rope_theta, config.rope_scaling, config.kv_heads, config.head_dim) == (777.0, None, 4, 8)
    assert import_checkpoint(folder, tmp_path / "out2")


def test_llama3_scaling_without_the_original_length_takes_the_longest_context(edited: Edit) -> None:
    folder = edited(rope_parameters={k: v for k, v in LLAMA3.items() if not k.startswith("original")})
    scaling = read_checkpoint(folder)[0].config.rope_scaling
    assert scaling is not None and scaling.original_positions == 96


def test_shards_and_bf16(edited: Edit, tmp_path: Path) -> None:
    """The dtype is kept; the comparison is in fp32."""
    folder = edited("llama")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    lines = import_checkpoint(folder, tmp_path / "out")
    assert "parameters in bfloat16" in lines[0]
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored.keys() == {name.removeprefix("model.") for name in model.state_dict()}
    assert all(torch.equal(stored[name.removeprefix("model.")], t) for name, t in model.state_dict().items())

    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model-00002-of-\d+.safetensors is damaged \(.*\); download it again"):
        read_checkpoint(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"model-00002.*, which model.safetensors.index.json names, is not there"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match=r"index.json has no weight_map from tensors to files; download it again"):
        read_checkpoint(folder)


def test_an_index_that_leads_out_of_the_folder(edited: Edit, tmp_path: Path) -> None:
    """Up, absolute (even to the folder itself), by a link to a file, by a link to a folder; links inside are fine."""
    folder = edited()
    whole = (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(whole)
    (folder / "up").symlink_to(tmp_path)
    inside = Path(shutil.copy(whole, folder / "inside.safetensors"))
    names = ("../outside.safetensors", "up/../hf/inside.safetensors", str(whole), str(inside), "link.safetensors",
             "up/outside.safetensors")  # fmt: skip
    for name in names:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(
            ValueError, match=rf"index.json names {re.escape(name)}, which leads out of .*hf, and only files in it"
        ):
            read_checkpoint(folder)
    (folder / "other.safetensors").symlink_to("inside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert read_checkpoint(folder)[1] == "llama"


def test_a_tied_head_that_is_stored_as_well(edited: Edit) -> None:
    folder = edited("llama-tied-wide-head")
    _spoil(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert read_checkpoint(folder)[0].config.tied_head
    _spoil(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"holds a head of its own, but its config.json says tie_word_embeddings; set"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["llama-tied-wide-head", "qwen3"])
def test_tied_weights_that_are_stored_as_the_head_alone(edited: Edit, tmp_path: Path, name: str) -> None:
    """As safetensors' ``save_model`` keeps one of two names."""
    folder = edited(name)
    before = read_checkpoint(folder)[0].embed_tokens.weight.clone()
    _spoil(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    lines = import_checkpoint(folder, tmp_path / "out")
    decoder = load_model(tmp_path / "out").decoder
    assert torch.equal(decoder.embed_tokens.weight, before) and decoder.lm_head.weight is decoder.embed_tokens.weight
    assert any("logits are transformers'" in line for line in lines)
    # Of a model whose head is not tied nothing can stand in for the embedding.
    folder = edited("llama")
    _spoil(folder, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"describes: embed_tokens.weight is missing"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
        lambda name: name.replace(".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."),
    ],
    ids=["compiled", "distributed", "both", "trainer", "bare", "a layer compiled", "wrapped"],
)
def test_names_with_what_wrappers_put_into_them(edited: Edit, tmp_path: Path, spell: Callable[[str], str]) -> None:
    folder = edited()
    before = read_checkpoint(folder)[0].state_dict()
    _spoil(folder, lambda t: [t.update({spell(name): t.pop(name)}) for name in list(t)])
    lines = import_checkpoint(folder, tmp_path / "out")
    after = load_model(tmp_path / "out").decoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any("logits are transformers'" in line for line in lines)


def test_two_names_of_one_activation(edited: Edit, tmp_path: Path) -> None:
    lines = import_checkpoint(edited(hidden_act="swish"), tmp_path / "out")
    assert any("logits are transformers'" in line for line in lines)


def test_two_names_of_one_weight(edited: Edit) -> None:
    folder = edited()
    _spoil(folder, lambda t: t.update({"_orig_mod.model.norm.weight": torch.ones(32)}))
    with pytest.raises(ValueError, match=r"holds .*norm.weight and .*norm.weight, which are names of one weight; keep"):
        read_checkpoint(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(edited: Edit, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """Refused by name, with the comparison and without."""
    folder, name = edited(), "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 5] = value

    _spoil(folder, spoil)
    for with_comparison in (True, False):
        with pytest.raises(ValueError, match=rf"{name} in .* has 1 of 1,536 values that are NaN or infinite"):
            import_checkpoint(folder, tmp_path / "out", with_comparison)
    assert not (tmp_path / "out").exists()


def test_a_token_without_an_embedding(edited: Edit, tmp_path: Path) -> None:
    """In ``tokenizer.json``, or added by a file beside it."""
    folder = edited()
    write_tokenizer(folder, 98)
    with pytest.raises(ValueError, match=r"vocabulary is 97: there is no embedding for .*, whose id is 97; take it"):
        import_checkpoint(folder, tmp_path / "out", with_comparison=False)
    write_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
    with pytest.raises(
        ValueError, match=r"there is no embedding for '<pad>', whose id is 97; take it out of the token"
    ):
        import_checkpoint(folder, tmp_path / "out", with_comparison=False)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_compared_with_transformers(edited: Edit, tmp_path: Path) -> None:
    """Where transformers builds other rules than the file has, that is told."""
    folder = edited()
    lines = import_checkpoint(folder, tmp_path / "out")
    assert any(re.fullmatch(r"tokenizer ids are transformers' on [\d,]+ texts", line) for line in lines)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    lines = import_checkpoint(folder, tmp_path / "out2")
    told = next(line for line in lines if line.startswith("tokenizer "))
    assert re.search(
        r"those of tokenizer.json are taken; LlamaTokenizer in transformers gives other ids for [\d,]+ of", told
    )


def test_files_beside_the_tokenizer_reach_the_export(edited: Edit, tmp_path: Path) -> None:
    """Through the import and back; what does not is told by name."""
    folder = edited("llama")
    template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("tools")
    (folder / "README.md").touch()
    (folder / "preprocessor_config.json").write_text("{}")
    lines = import_checkpoint(folder, tmp_path / "out")
    assert any("additional_chat_templates/tools.jinja" in line for line in lines if line.startswith("wrote"))
    assert "left      README.md, preprocessor_config.json" in lines
    tuned, adapter = make_tuned(load_model(tmp_path / "out").decoder, "lora")
    run = write_run(tmp_path / "run", tuned, {"dir": str(tmp_path / "out")}, adapter=adapter)
    for source in (tmp_path / "out", run):
        lines = export(source, tmp_path / f"{source.name}-again")
        assert any("chat_template.jinja" in line for line in lines)
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"{source.name}-again")
        assert theirs.get_chat_template("default") == template and theirs.get_chat_template("tools") == "tools"
        assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi"


def test_buffers_of_old_versions_are_passed_over(edited: Edit) -> None:
    folder = edited()
    _spoil(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert read_checkpoint(folder)[1] == "llama"


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("llama", {"model_type": "qwen2"}, "model_type qwen2 cannot be imported, it has biases in its attention and"),
        ("llama", {"model_type": "mixtral"}, "model_type mixtral cannot be imported; take a checkpoint of llama, mist"),
        ("llama", {"model_type": ...}, "model_type None cannot be imported"),
        (
            "llama",
            {"hidden_size": ..., "vocab_size": "9"},
            "must give a number for vocab_size, hidden_size; restore it",
        ),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True},
            "not have: attention_bias True (.* no biases); mlp_bias True (",
        ),
        ("llama", {"hidden_act": "gelu"}, "asks for what this decoder does not have: hidden_act gelu (the feed-forw"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config (weights must be float32, float16 or"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 (whole heads are turned)"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type yarn (default, linear and llama3 are"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rotary parameters that differ by layer",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}},
            "describes no possible model: rope_scaling factor Field required",
        ),
        (
            "llama",
            {"num_key_value_heads": 3},
            "model: model.heads (4) must be divisible by model.kv_heads (3); restore",
        ),
        ("mistral", {"sliding_window": 32}, "sliding_window 32 below max_position_embeddings 96 (.* lowered to 32 the"),
        (
            "mistral",
            {"sliding_window": ..., "max_position_embeddings": 8192},
            "sliding_window 4096 below max_pos.* 8192",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8},
            "sliding_window 8 below max_position_embeddings 96",
        ),
    ],
)
def test_a_config_that_cannot_be_represented(edited: Edit, name: str, fields: dict[str, Any], sentence: str) -> None:
    folder = edited(name, **fields)
    pattern = r"config.json.*" + re.escape(sentence).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern) as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.norm.weight"), r"describes: norm.weight is missing; download both again"),
        (lambda t: t.pop("lm_head.weight"), r"describes: lm_head.weight is missing"),
        (lambda t: t.update(extra=torch.ones(2)), r"describes: extra is not a weight of this model"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm.weight is \[3\] instead of \[32\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32).char()}),
            r"is I8, and weights must be float32, .*bfl",
        ),
    ],
)
def test_weights_that_are_not_the_configs(
    edited: Edit, change: Callable[[dict[str, Tensor]], Any], sentence: str
) -> None:
    folder = edited()
    _spoil(folder, change)
    with pytest.raises(ValueError, match=sentence):
        read_checkpoint(folder)


def test_folders_that_are_no_checkpoint(edited: Edit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*none; give a local folder with config.json and"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no config.json; give the folder of a Hugging Face checkpoint"):
        read_checkpoint(tmp_path)
    folder = edited()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json; download"):
        read_checkpoint(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(
        ValueError, match=r"has only pytorch_model.bin, and reading that runs code; convert it to safet"
    ):
        read_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_checkpoint(folder)


def test_out_must_be_new_and_a_tokenizer_is_needed(
    edited: Edit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited()
    with pytest.raises(SystemExit, match="1"):
        main([str(folder), str(folder)])
    assert (
        f"error: {folder} exists already and is no empty folder, and nothing is written over" in capsys.readouterr().err
    )
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"hf has no tokenizer: it holds neither tokenizer.json nor tokenizer.model"):
        import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_that_differ_are_refused(edited: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary base a tenth of a percent off; a norm's epsilon."""
    folder = edited()
    for fields in ({"rope_theta": 5005.0}, {"norm_epsilon": 1e-4}):
        with monkeypatch.context() as patched:
            wrong = from_hf.model_config
            patched.setattr(from_hf, "model_config", lambda *a, f=fields: wrong(*a).model_copy(update=f))  # noqa: B023
            with pytest.raises(ValueError, match=r"differ from transformers' by .*, above 0.0001 of their range"):
                import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_cannot_load_is_imported_without_a_comparison(edited: Edit, tmp_path: Path) -> None:
    """Its Llama wants the width to be a multiple of the heads; ours does not."""
    folder = edited("llama-tied-wide-head", num_attention_heads=3, num_key_value_heads=3, head_dim=16)
    for name in ("q", "k", "v", "o"):
        shape = (32, 48) if name == "o" else (48, 32)
        keys = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1)]
        _spoil(folder, lambda t, keys=keys, shape=shape: t.update({key: torch.randn(shape) for key in keys}))
    decoder, _ = read_checkpoint(folder)
    with pytest.raises(ValueError, match=r"transformers cannot load .* to compare with \(.*\(32\) .*\); fix the check"):
        compare(decoder, folder)
    assert main([str(folder), str(tmp_path / "out"), "--no-compare"]) == 0
    assert load_model(tmp_path / "out").decoder.config.heads == 3


def test_the_help_gives_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "4 bytes a parameter" in " ".join(capsys.readouterr().out.split())
