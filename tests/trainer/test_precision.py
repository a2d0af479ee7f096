"""``train.precision: auto``: what it becomes, for all ranks alike, and that a resume does not change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests.launching import environment, run
from trainer import precision
from trainer.config import PretrainConfig
from trainer.deepspeed_config import deepspeed_config
from trainer.distributed import World
from trainer.precision import CPU_WIDTH, auto_precision, fast_bf16, resolve_precision, slow_bf16_warning

CPU = torch.device("cpu")
IMITATION = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Environment in which torch and oneDNN do what they do on a CPU with AVX2 and no more."""
FAST, SLOW = (True, "this CPU multiplies bf16 fast (AMX)"), (False, "this CPU has no bf16 instructions")


def ranks(*found: tuple[bool, str]) -> World:
    """A world in which the ranks say this of their devices."""

    class Said(World):
        def all_gather_objects(self, value: Any) -> list[Any]:
            return list(found) if isinstance(value, tuple) else [value]

    return Said(0, len(found), 0, len(found), CPU)


def has(monkeypatch: pytest.MonkeyPatch, device: tuple[bool, str]) -> None:
    """Let every device of this process be that."""
    monkeypatch.setattr(precision, "fast_bf16", lambda *_: device)


def test_one_slow_rank_decides_for_all(configure: Callable[..., PretrainConfig]) -> None:
    assert auto_precision(ranks(FAST), 512) == ("bf16", FAST[1])
    assert auto_precision(ranks(SLOW), 512) == ("fp32", SLOW[1])
    assert auto_precision(ranks(FAST, FAST), 512) == ("bf16", FAST[1])
    assert auto_precision(ranks(FAST, SLOW, FAST), 512) == ("fp32", f"{SLOW[1]}, on rank 1")
    config, told = resolve_precision(configure("train.precision=auto"), ranks(FAST, SLOW))
    assert config.train.precision == "fp32" and told == f"precision fp32: {SLOW[1]}, on rank 1"
    assert resolve_precision(configure("train.precision=bf16"), ranks(SLOW)) == (
        configure("train.precision=bf16"),
        None,
    )


@pytest.mark.parametrize(
    ("capabilities", "onednn", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True, (True, "AVX512-BF16")),
        ({"avx512_bf16": True, "amx_bf16": True}, True, (True, "AMX")),
        ({"bf16": True}, True, (True, "Arm's BF16")),
        ({"avx2": True, "avx512_f": True}, True, (False, "no bf16 instructions")),
        ({"avx512_bf16": True}, False, (False, "oneDNN does not use that here")),
    ],
)
def test_a_cpu_needs_the_instructions_and_a_library_that_uses_them(
    capabilities: dict[str, bool], onednn: bool, expected: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    fast, why = fast_bf16(CPU, CPU_WIDTH)
    assert fast is expected[0] and expected[1] in why
    assert fast_bf16(CPU, CPU_WIDTH - 1)[0] is False


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_that_emulates_bf16_is_slow(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert fast_bf16(torch.device("cuda"), 32)[0] is supported


def test_the_run_folder_holds_what_was_decided_and_a_resume_keeps_it(
    tiny: dict[str, Any],
    train_here: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny["train"]["precision"] = "auto"
    run_dir = Path(tiny["train"]["run_dir"])

    def resolved() -> str:
        return str(yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["precision"])

    has(monkeypatch, SLOW)
    assert train_here(tiny, "train.steps=2") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"precision fp32: {SLOW[1]}" and "1 rank on cpu, fp32" in out
    assert resolved() == "fp32"
    assert yaml.safe_load((run_dir / "config.original.yaml").read_text())["train"]["precision"] == "auto"
    has(monkeypatch, FAST)  # another machine
    assert train_here(tiny, "train.checkpoint.resume=auto", "train.optimizer.lr=0.5") == 0
    out = capsys.readouterr().out
    assert "at step 2; settings changed since: train.steps 2 -> 4, train.optimizer.lr 0.003 -> 0.5" in out
    assert "precision fp32: that of the checkpoint" in out and "bit by bit" not in out and resolved() == "fp32"
    assert train_here(tiny, "train.checkpoint.resume=auto", "train.steps=6", "train.precision=bf16") == 0
    out = capsys.readouterr().out
    assert "equal to rounding, not bit by bit" in out and resolved() == "bf16"


def test_a_checkpoint_in_a_precision_that_does_not_go_with_the_config_is_refused(
    configure: Callable[..., PretrainConfig], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision.manifest, "read", lambda folder, world: {"precision": "fp16"})
    config = configure("train.precision=auto", "deepspeed.zero_stage=0")
    with pytest.raises(ValueError, match=r"train\.precision fp16 needs deepspeed\.zero_stage 1, 2 or 3"):
        resolve_precision(config, world, Path("checkpoint"))


def test_nobody_reads_auto(configure: Callable[..., PretrainConfig]) -> None:
    with pytest.raises(AssertionError, match="decided before"):
        deepspeed_config(configure("train.precision=auto"), 1)


def test_bf16_on_a_slow_cpu_is_warned_of_with_its_ratio(
    tiny: dict[str, Any],
    train_here: Callable[..., int],
    configure: Callable[..., PretrainConfig],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    has(monkeypatch, SLOW)
    speeds = {torch.bfloat16: 1.0, torch.float32: 8.0}
    monkeypatch.setattr(precision, "PeakFlops", lambda _, dtype: SimpleNamespace(layer_flops_per_s=speeds[dtype]))
    tiny["train"]["precision"] = "bf16"
    assert train_here(tiny, "train.steps=1") == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if "is slow here" in line]
    assert len(warned) == 1
    assert f"({SLOW[1]})" in warned[0] and "at 0.12 of their fp32 speed" in warned[0]
    speeds[torch.bfloat16] = 9.0  # it is not slow, whatever was expected
    assert slow_bf16_warning(configure("train.precision=bf16"), world) is None
    assert slow_bf16_warning(configure("train.precision=fp32"), world) is None
    has(monkeypatch, FAST)
    assert slow_bf16_warning(configure("train.precision=bf16"), world) is None


@pytest.mark.parametrize("asked", ["auto", "bf16"])
def test_on_an_imitated_avx2_cpu(
    asked: str, tiny: dict[str, Any], write_config: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` trains in fp32; bf16 trains, too, warned of, its MFU below 1 (2.9 with a plain product as the peak)."""
    if not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("needs a CPU with AVX2; on another one there is nothing to imitate")
    for name, value in IMITATION.items():
        monkeypatch.setenv(name, value)
    assert IMITATION.items() <= environment().items()
    tiny["train"] |= {"precision": asked, "steps": 2, "log": {"every_steps": 1, "images": False}}
    done = run("pretrain.train", write_config(tiny))
    assert done.returncode == 0, done.stdout
    assert ("precision fp32: this CPU" in done.stdout) == (asked == "auto")
    assert ("train.precision bf16 is slow here" in done.stdout) == (asked == "bf16")
    assert "that MFU is measured against" not in done.stdout
    lines = (Path(tiny["train"]["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    shares = [line["speed/mfu_executed"] for line in map(yaml.safe_load, lines) if "speed/mfu_executed" in line]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)
