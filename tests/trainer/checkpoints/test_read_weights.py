"""A decoder read from a checkpoint has the engine's own fp32 weights, and nothing in the files can run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.trainer.checkpoints.saved_runs import CASES, STEPS, rehash
from tests.trainer.checkpoints.test_resume_safety import plant
from trainer.checkpoints.zero_files import MASTER, by_value
from tune.load import load_model


@pytest.fixture
def runs(two_rank_runs: Path) -> Path:
    """One run folder a case."""
    return two_rank_runs


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a case's run folder, to spoil."""
    return lambda name: Path(shutil.copytree(runs / name, tmp_path / name))


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_the_engines_fp32_masters(runs: Path, name: str) -> None:
    decoder, config, step, _ = load_model(runs / name)
    masters = torch.load(runs / name / "masters.pt")
    loaded = dict(decoder.named_parameters())
    assert loaded.keys() == masters.keys() and step == STEPS and not decoder.training
    assert all(torch.equal(weight, masters[key]) and weight.dtype == torch.float32 for key, weight in loaded.items())
    assert config.deepspeed.zero_stage == int(name.split("-")[1]) and config.train.precision == name.split("-")[0]
    tied = decoder.lm_head.weight is decoder.embed_tokens.weight
    assert tied == config.model.tied_head == name.startswith("bf16")
    if tied:  # not rounded to bf16 on the way
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in loaded.values())


def test_partitions_in_another_order_than_the_models(runs: Path) -> None:
    """``round_robin_gradients``, where DeepSpeed itself gives a master for another parameter's."""
    loaded, expected = (load_model(runs / name).decoder.state_dict() for name in ("shuffled", "bf16-2"))
    for name, weight in loaded.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_masters_that_round_to_the_same_weight_keep_their_order() -> None:
    """Norms early in training: 1 in bf16, and not 1 in fp32."""
    ones, masters = torch.ones(3, dtype=torch.bfloat16), [torch.full((3,), 1 + i / 1000) for i in range(3)]
    entries = by_value({"a": ones, "b": ones, "c": ones}, list(masters), {})
    found = {entry.name: entry.part(MASTER) for entry in entries}
    assert list(found) == ["a", "b", "c"]
    assert all(torch.equal(one, other) for one, other in zip(found.values(), masters, strict=True))


def test_the_newest_whole_checkpoint_is_taken_and_torn_ones_are_told(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("fp32-2")
    whole = folder / "checkpoints" / f"step-{STEPS:08d}"
    newer = Path(shutil.copytree(whole, whole.with_name("step-00000009")))
    (newer / "deepspeed/mp_rank_00_model_states.pt").write_bytes(b"half")
    assert load_model(folder).step == STEPS
    assert "skipped: step-00000009 is torn: deepspeed/mp_rank_00_model_states.pt" in capsys.readouterr().err
    assert load_model(whole).step == STEPS
    with pytest.raises(ValueError, match=r"step-00000009 is neither a run folder nor a whole checkpoint: .* 4 bytes"):
        load_model(newer)
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match=r"checkpoints holds no whole checkpoint; train until one is saved"):
        load_model(folder)
    assert "step-00000009 is torn" in capsys.readouterr().err


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*/none; give a run folder \(train.run_dir\) or one of"):
        load_model(tmp_path / "none")
    with pytest.raises(ValueError, match=r"is neither a run folder nor a whole checkpoint: it has no manifest.json"):
        load_model(tmp_path)
    (tmp_path / "my/checkpoints").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=rf"; {tmp_path} holds my$"):
            load_model(path)


@pytest.mark.parametrize("name", ["fp32-0", "bf16-1", "fp32-3"])
def test_weights_that_do_not_match_the_config(copy: Callable[[str], Path], name: str) -> None:
    saved = copy(name) / "checkpoints" / f"step-{STEPS:08d}"
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["model"]["ffn_width"] = 22
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    rehash(saved, "config.yaml")
    with pytest.raises(ValueError, match=r"do not match its config.yaml .*is \[21, 33\] instead of \[22, 33\]") as e:
        load_model(saved)
    assert "more); one of them was changed after it was written" in str(e.value)


@pytest.mark.parametrize("name", ["bf16-0", "bf16-2"])
def test_a_master_that_does_not_round_to_its_weight_is_not_taken(copy: Callable[[str], Path], name: str) -> None:
    """What a DeepSpeed with another order of parameters would look like."""
    saved = copy(name) / "checkpoints" / f"step-{STEPS:08d}"
    file = "mp_rank_00_model_states.pt" if name == "bf16-0" else "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(saved / "deepspeed" / file, weights_only=False)
    with torch.no_grad():
        if name == "bf16-0":
            content["optimizer"]["fp32_groups"][0][3].mul_(1.1)
        else:
            flat = content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
            flat.copy_(flat.roll(1))
    torch.save(content, saved / "deepspeed" / file)
    rehash(saved, f"deepspeed/{file}")
    with pytest.raises(ValueError, match=r"v_proj.weight is missing|is not where DeepSpeed 0.19 would have put it"):
        load_model(saved)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fp32-1", "mp_rank_00_model_states.pt"),
        ("bf16-1", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("fp32-3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("fp32-3", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ],
)
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    copy: Callable[[str], Path], tmp_path: Path, name: str, file: str
) -> None:
    saved, mark = copy(name) / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "executed"
    plant(saved / "deepspeed" / file, mark)
    with pytest.raises(ValueError, match=r"holds more than tensors and numbers \(posix\.mkdir\)"):
        load_model(saved)
    assert not mark.exists()
    torch.load(saved / "deepspeed" / file, weights_only=False)
    assert mark.exists()  # the payload was live
