"""The step benchmark at toy size: rows hold what they promise, and the check can fail."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bench import step

SIZES = {"layers": 2, "width": 64, "heads": 4, "kv-heads": 2, "ffn-width": 96, "vocab": 128, "tokens": 32, "samples": 2}
TOY = ["--device=cpu", "--repeats=2", *(f"--{name}={size}" for name, size in SIZES.items())]
KEYS = ["name", "density", "device", "dtype", "tokens", "step_s", "ratio_to_dense", "flop_bound_ratio", "mfu_executed"]
KEYS += ["peak_memory_bytes"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    path: Path = tmp_path_factory.mktemp("bench") / "step.json"
    step.main([*TOY, "--json", str(path)])
    return {row["name"]: row for row in json.loads(path.read_text())}


def test_rows_have_the_promised_keys(rows: dict[str, dict[str, float]]) -> None:
    assert list(rows) == ["dense", "hf_llama", "routed_1", "routed_0.5", "routed_0.25"]
    for row in rows.values():
        assert list(row) == KEYS
        assert (row["device"], row["dtype"], row["tokens"], row["peak_memory_bytes"]) == ("cpu", "fp32", 64, None)
        assert all(row[key] > 0 and math.isfinite(row[key]) for key in ("step_s", "ratio_to_dense", "mfu_executed"))


def test_density_and_flops_are_measured(rows: dict[str, dict[str, float]]) -> None:
    assert rows["dense"]["ratio_to_dense"] == 1.0
    for name in ("dense", "hf_llama"):
        assert rows[name]["density"] == rows[name]["flop_bound_ratio"] == 1.0
    assert rows["routed_1"]["density"] == 1.0
    assert rows["routed_1"]["flop_bound_ratio"] > 1.0  # the routers
    assert 0.35 < rows["routed_0.5"]["density"] < 0.65
    assert 0.1 < rows["routed_0.25"]["density"] < 0.4
    assert rows["routed_0.25"]["flop_bound_ratio"] < rows["routed_0.5"]["flop_bound_ratio"] < 1.0


def test_held_routers_pay_for_their_gradient() -> None:
    options = step.parse([*TOY, "--densities", "0.5"])
    routed = step.build(options)["routed_0.5"]
    for name, parameter in routed.model.named_parameters():
        if "router" in name:
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_check_fails_for_an_impossible_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        step.main([*TOY, "--densities", "--check", "0.0001"])
    assert exit_info.value.code == 1
    assert "more than the 0.0001 allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--densities", "0.5", "0.5"], "--densities must differ"),
        (["--densities", "1.5"], "--densities must lie above 0 and not above 1, got 1.5"),
        (["--heads", "3"], "must be divisible by"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--json", "no/such/folder/step.json"], "--json"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        step.main([*TOY, *arguments])
    assert exit_info.value.code == 1
    assert sentence in capsys.readouterr().err
