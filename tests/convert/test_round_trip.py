"""What ``convert.to_hf`` writes comes back bit by bit, without its code; and a dense import takes new routers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert import hf_compare
from convert.from_hf import import_checkpoint, main, new_routers, read_checkpoint
from convert.hf_config import FAMILIES, HOPSCOTCH
from convert.modeling_hopscotch import HopscotchConfig
from model.budget import Budget
from model.config import ModelConfig
from model.decoder import Decoder
from model.schedules import Progress
from tests.conftest import VOCAB
from tests.model.tiny import assert_close
from tune.load import load_model

Exported = Callable[[str], tuple[Path, Path]]
CASES = ("dense", "dense-tied-llama3", "dense-odd-heads", "layer", "module-tied", "random", "stride", "some-layers",
         "ensemble", "layer-ensemble", "module-ensemble")  # fmt: skip
OF_TRAINING = {"noise", "temperature", "execution", "capacity_factor", "explore", "budget"}
TOKENS = torch.randint(VOCAB, (3, 40), generator=torch.Generator().manual_seed(4))


def of_inference(config: ModelConfig) -> dict[str, Any]:
    """What logits depend on, defaults resolved."""
    return config.model_dump(exclude={"init_std": True, "router": OF_TRAINING}) | {"head_width": config.head_dim}


def votes(decoder: Decoder) -> dict[str, Any] | None:
    """The ensemble's block as far as logits depend on it."""
    return decoder.ensemble and decoder.ensemble.config.model_dump(include={"layers", "temperature", "top"})


@torch.no_grad()
def logits_of(decoder: Decoder) -> Tensor:
    """Of ``TOKENS``."""
    return decoder(TOKENS).logits


@pytest.fixture
def edited(exported: Exported, tmp_path: Path) -> Callable[..., Path]:
    """A copy of an export with fields of its config.json set."""

    def edit(name: str, **fields: Any) -> Path:
        folder = Path(shutil.copytree(exported(name)[1], tmp_path / "hf", dirs_exist_ok=True))
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return edit


@pytest.mark.parametrize("name", CASES)
def test_an_export_comes_back_as_it_was(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    weights, folder = exported(name)
    assert main([str(folder), str(tmp_path / "out"), *(["--no-compare"] if name.startswith("dense") else [])]) == 0
    before, after = load_model(weights).decoder, load_model(tmp_path / "out").decoder
    stored, kept = load_file(weights / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert stored.keys() == kept.keys() and all(torch.equal(stored[key], kept[key]) for key in stored)
    assert of_inference(after.config) == of_inference(before.config)
    assert votes(after) == votes(before)
    assert before.thresholds is None or torch.equal(before.thresholds, after.thresholds)  # type: ignore[arg-type]
    assert after.seed == (before.seed if before.config.router else 0)
    assert torch.equal(logits_of(after), logits_of(before))
    printed = capsys.readouterr().out
    assert ("routers  " in printed) == (before.config.router is not None)
    assert ("ensemble  of the last" in printed) == (before.ensemble is not None)
    if not name.startswith("dense"):
        assert "not compared: that runs the Python file in HF_DIR, which --trust-remote-code allows" in printed


def test_the_folders_own_code_runs_only_when_trusted(exported: Exported, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """With routers that go by their site's number, and new ones on top of an ensemble."""
    folder = Path(shutil.copytree(exported("module-tied")[1], tmp_path / "hf"))
    (folder / "modeling_hopscotch.py").write_text("raise SystemExit('this was run')")
    assert import_checkpoint(folder, tmp_path / "out")
    for name, routers in (("random", None), ("ensemble", new_routers(0.5))):
        out = tmp_path / name
        assert main([str(exported(name)[1]), str(out), "--trust-remote-code",
                     *(["--routers", "0.5"] if routers else [])]) == 0  # fmt: skip
        assert (load_model(out).decoder.config.router is not None) and out.is_dir()
    monkeypatch.setattr(hf_compare, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="logits differ by"):
        import_checkpoint(exported("random")[1], tmp_path / "wrong", trusted=True)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), str(tmp_path / "both"), "--trust-remote-code", "--no-compare"])


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("layer", {"router_kind": "expert_choice"}, r"router_kind expert_choice \(learned, random and stride are sup"),
        ("layer", {"skip_layers": False}, r"skip_layers false \(routers here always decide; set it to true\)"),
        ("layer", {"router_end_layer": None}, "must give a number for router_end_layer; restore it"),
        ("layer", {"router_first_layer": 3}, r"an invalid model: router.always_on_first \(3\).*; restore it"),
        ("layer", {"router_density": 0.0}, "describes an invalid model: router density Input should be greater"),
        (
            "layer",
            {"router_seed": -1},
            r"has router_seed -1, but a seed must be a whole number from 0 to 2\^62 - 1; rest",
        ),
        (
            "layer",
            {"router_thresholds": [0.1, 0.2]},
            "must be a list of 3 numbers, one for each routed site, null for n",
        ),
        (
            "layer",
            {"router_thresholds": [0, "1", 2]},
            r"router_thresholds must be .*, got \[0, '1', 2\]; restore it, or",
        ),
        ("ensemble", {"ensemble_layers": 4}, r"ensemble_layers \(4\) exceeds num_hidden_layers \(3\); restore it"),
        ("ensemble", {"ensemble_temperature": 0}, "describes an invalid model: temperature Input should be gre"),
        ("ensemble", {"ensemble_layers": 2}, r"weights in .* are not those .*: ensemble"),
    ],
)
def test_an_export_that_was_changed(
    edited: Callable[..., Path], name: str, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        read_checkpoint(edited(name, **fields))
    assert "\n" not in str(error.value)


def test_fields_left_out_are_the_modelling_files_defaults() -> None:
    """As ``HopscotchConfig`` has them."""
    defaults = HopscotchConfig()
    assert {name: getattr(defaults, name) for name in FAMILIES[HOPSCOTCH]} == FAMILIES[HOPSCOTCH]


@pytest.mark.parametrize(("granularity", "sites"), [("layer", 3), ("module", 6)])
def test_new_routers_execute_everything_until_they_are_trained(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], granularity: str, sites: int
) -> None:
    folder, out = exported("dense")[1], tmp_path / "out"
    assert main([str(folder), str(out), "--routers", "0.5", "--granularity", granularity]) == 0
    printed = capsys.readouterr().out
    assert f"routers   learned, {sites} by {granularity}, density 0.5, new: all weights 0, so every token" in printed
    assert "compared  logits are transformers': largest difference" in printed
    source = json.loads((out / "manifest.json").read_text())["source"]
    assert source.endswith(f", with new {granularity} routers for density 0.5")
    model = load_model(out).decoder
    assert len(model.config.sites) == sites
    assert_close(logits_of(model), logits_of(read_checkpoint(folder)[0]))  # gathered rows round apart
    assert bool(model(TOKENS).routing.executed.all())
    losses = teach(model)
    density = model.eval()(TOKENS).routing.executed.float().mean((1, 2))
    assert float(density.mean()) < 0.9
    assert losses[-1] < losses[0]


def teach(model: Decoder, steps: int = 30) -> list[float]:
    """Train on ``TOKENS`` under the density's price, without noise as ``tune.train`` does; the losses."""
    budget, losses = Budget(model.config, TOKENS.shape[1]), []
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(steps):
        output = model(TOKENS[:, :-1], TOKENS[:, 1:], noise_scale=0.0)
        losses.append(float(output.loss.nll))
        price = (budget.prices() * output.routing.density).sum()
        (output.loss.loss / TOKENS[:, 1:].numel() + price).backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.observe(output.routing.density, Progress(1, 1))
    return losses


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, float("nan")])
def test_a_density_that_is_no_share(exported: Exported, tmp_path: Path, density: float,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    with pytest.raises(SystemExit, match="1"):
        main([str(exported("dense")[1]), str(tmp_path / "out"), f"--routers={density}"])
    assert f"--routers must be above 0 and at most 1, got {density:g}; it is the share" in capsys.readouterr().err


def test_routers_are_added_to_a_model_without_only(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"layer-hf already has learned routers of density 0.5, but --routers adds th"):
        import_checkpoint(exported("layer")[1], tmp_path / "out", routers=new_routers(0.25))
    with pytest.raises(SystemExit, match="1"):
        main([str(exported("dense")[1]), str(tmp_path / "out"), "--granularity", "module"])
    assert (
        "--granularity module applies to routers that are added; also give --routers DENSITY" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_new_routers_are_not_looked_for_in_the_files(edited: Callable[..., Path]) -> None:
    """A router's weight there is one too many, as without ``--routers``."""
    folder = edited("dense")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.router.weight"] = torch.ones(2, 64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.router.weight is not a weight of this model"):
        read_checkpoint(folder, new_routers(1.0))
