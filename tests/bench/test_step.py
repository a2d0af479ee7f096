"""The step benchmark at toy size: rows hold what they promise, and the check can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from bench import step
from bench.common.report import Row
from bench.common.timing import Spread
from model.flops import dense_flops
from tests.bench.toy import BATCH, MODEL, RUN, refused, rows_of

TOY = [*RUN, *MODEL, *BATCH]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return rows_of(step.main, TOY, tmp_path_factory.mktemp("bench") / "step.json", "step_s")


def test_all_contestants_have_whole_rows(rows: dict[str, Any]) -> None:
    assert list(rows) == ["dense", "hf_llama", "routed_1", "routed_0.5", "routed_0.25"]
    for row in rows.values():
        assert row["tokens"] == 64
        assert None not in row.values()


def test_density_and_flops_are_measured(rows: dict[str, Any]) -> None:
    assert rows["dense"]["ratio_to_dense"] == 1.0
    for name in ("dense", "hf_llama"):
        assert rows[name]["density"] == rows[name]["flop_bound_ratio"] == 1.0
    assert rows["routed_1"]["density"] == 1.0
    assert rows["routed_1"]["flop_bound_ratio"] > 1.0  # the routers
    assert 0.35 < rows["routed_0.5"]["density"] < 0.65
    assert 0.1 < rows["routed_0.25"]["density"] < 0.4
    assert rows["routed_0.25"]["flop_bound_ratio"] < rows["routed_0.5"]["flop_bound_ratio"] < 1.0
    assert rows["routed_0.25"]["peak_memory_bytes"] < rows["routed_1"]["peak_memory_bytes"]


def test_the_limits_get_times_to_dense_memory_to_dense_and_the_dense_mfu() -> None:
    def row(ratio: float, mfu: float, memory: int) -> Row:
        return Row("any", 1.0, "cpu", "fp32", 64, 1.0, Spread(0.0, ratio, 9.0), 1.0, mfu, memory)

    found = step.promised({"dense": row(1.0, 0.7, 400), "routed_0.5": row(0.6, 0.65, 300)})
    assert found.pop("step/dense") == found.pop("step/memory_dense") == 1.0
    assert found == {"step/dense_mfu": 0.7, "step/routed_0.5": 0.6, "step/memory_routed_0.5": 0.75}


def test_the_check_judges_what_was_measured_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """A toy model is nowhere near the promised utilisation."""
    with pytest.raises(SystemExit) as exit_info:
        step.main([*TOY, "--densities", "0.5", "--check"])
    assert exit_info.value.code == 1
    out, err = capsys.readouterr()
    judged = [line.split()[1] for line in out.splitlines() if line.startswith(("ok ", "MISSED "))]
    assert set(judged) == {"step/routed_0.5", "step/dense_to_peer", "step/dense_mfu", "step/memory_routed_0.5"}
    assert "these differ: layers=2, width=64" in out
    assert "of 4 limits missed" in err and "step/dense_mfu is" in err


def test_mfu_is_three_forward_passes_over_time_and_peak() -> None:
    options = step.parse([*TOY, "--densities", "0.5"])
    contestants = step.build(options)
    for contestant in contestants.values():
        contestant.step()
    seconds = {name: [0.25, 0.5, 0.75] for name in contestants}
    for name in ("dense", "routed_0.5"):
        found = step.row(name, contestants, options, seconds, peak=1e9)
        assert found.mfu_executed == pytest.approx(3 * contestants[name].flops()[0] / 0.5 / 1e9)
    assert step.row("dense", contestants, options, seconds, 1e9).mfu_executed == pytest.approx(
        3 * dense_flops(contestants["dense"].config, 64, 2 * 32 * 33 / 2) / 0.5 / 1e9
    )


def test_checkpointing_and_execution_reach_the_models() -> None:
    options = step.parse([*TOY, "--densities", "0.5", "--checkpointing", "--execution", "reference"])
    assert not options.compile
    contestants = step.build(options)
    routed = contestants["routed_0.5"]
    assert routed.config.router is not None and routed.config.router.execution == "reference"
    assert contestants["dense"].model.recompute and routed.model.recompute
    assert contestants["hf_llama"].model.is_activation_checkpointing


def test_compiled_layers_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def note(decoder: object) -> None:
        compiled.append(decoder)

    monkeypatch.setattr("model.decoder.Decoder.compile_layers", note)
    contestants = step.build(step.parse([*TOY, "--densities", "0.5", "--compile"]))
    assert compiled == [contestants["dense"].model, contestants["routed_0.5"].model]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--densities", "0.5", "0.5"], "--densities must differ"),
        (["--densities", "1.5"], "--densities must lie above 0 and not above 1, got 1.5"),
        (["--heads", "3"], "must be divisible by"),
        (["--layers", "0"], "layers Input should be greater than 0"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--json", "no/such/folder/step.json"], "--json"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(step.main, [*TOY, *arguments], capsys)


def test_a_deeper_model_costs_what_the_dense_one_does(tmp_path: Path) -> None:
    found = rows_of(step.main, [*TOY, "--densities", "--deeper"], tmp_path / "step.json", "step_s")
    assert list(found) == ["dense", "hf_llama", "deeper"]
    assert found["deeper"]["flop_bound_ratio"] == pytest.approx(1.0, abs=0.1)  # of draws, on 64 tokens
    assert 0.0 < found["deeper"]["density"] < 0.5


def test_a_deeper_model_that_cannot_be_as_cheap_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(
        step.main, [*TOY, "--deeper", "--heads", "4", "--kv-heads", "4", "--ffn-width", "1", "--tokens", "2"], capsys
    )
    assert "no density makes 4 routed layers cost what 2 dense ones do" in said
