"""The attention benchmark at toy size: gathered queries get the reference's rows and are counted as what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import attention
from model import attend
from tests.bench.toy import RUN, refused, rows_of

SIZES = ["--heads=4", "--kv-heads=2", "--head-width=16", "--samples=2", "--lengths", "24", "80"]
TOY = [*RUN, *SIZES]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return rows_of(attention.main, TOY, tmp_path_factory.mktemp("bench") / "attention.json", "step_s")


def test_every_length_has_all_contestants(rows: dict[str, Any]) -> None:
    names = ["dense", "hf_llama", "reference", "gathered_1", "gathered_0.5", "gathered_0.25"]
    assert list(rows) == [f"{length}/{name}" for length in (24, 80) for name in names]
    for name, row in rows.items():
        assert row["tokens"] == 2 * int(name.partition("/")[0])
        assert None not in row.values()
    for length in (24, 80):
        bounds = [rows[f"{length}/{name}"]["flop_bound_ratio"] for name in names]
        assert bounds[:4] == [1.0] * 4 and 1.0 > bounds[4] > bounds[5]
        assert rows[f"{length}/gathered_0.25"]["peak_memory_bytes"] < rows[f"{length}/reference"]["peak_memory_bytes"]


def test_flops_and_gradients_are_those_of_the_queries_that_ask() -> None:
    options = attention.parse([*TOY, "--densities", "0.5"])
    inputs = attention.Inputs.random(options, 24)
    executed = torch.zeros(2, 24, dtype=torch.bool)
    executed[0, [0, 3]], executed[1, 23] = True, True
    asking = attention.gathered(inputs, executed)
    assert asking.density == 3 / 48
    assert asking.flops == 4 * 4 * 16 * (1 + 4 + 24)  # two products, heads, width, keys seen
    everything = attention.gathered(inputs, None)
    assert everything.flops == 4 * 4 * 16 * 2 * 24 * 25 / 2

    masked = attention.all_queries(inputs, attention.masked_sdpa(24, torch.device("cpu")))
    assert masked.flops == everything.flops
    grad = torch.where(executed.flatten()[:, None, None], masked.grad, 0.0)
    expected = torch.autograd.grad(masked.forward(), masked.leaves, grad)
    found = torch.autograd.grad(asking.forward(), asking.leaves, asking.grad)
    torch.testing.assert_close(found[0], expected[0][executed])
    for ours, reference in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, reference)


def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attend.attend
    monkeypatch.setattr(attend, "attend", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(AssertionError, match="not close"):
        attention.measure(attention.parse(TOY))


def test_the_limits_are_stated_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(contestants: dict[str, Any], rounds: int, device: torch.device) -> dict[str, list[float]]:
        times = dict.fromkeys(contestants, 3.0) | {"reference": 4.0, "gathered_0.5": 1.0}
        return {name: [seconds] * rounds for name, seconds in times.items()}

    monkeypatch.setattr(attention, "take_turns", made_up)
    result = attention.measure(attention.parse(TOY))
    assert result.measured["attention/24/gathered_0.5"] == 0.25
    assert result.measured["attention/80/dense"] == 0.75
    row = next(row for row in result.rows if row.name == "80/gathered_0.5")
    assert row.to_dense is not None and row.to_dense.median == pytest.approx(1 / 3)


def test_the_check_needs_the_stated_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        attention.main([*TOY, "--check"])
    assert exit_info.value.code == 1
    assert "--check has nothing to check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "1"], "--lengths must be at least 2, got 1"),
        (["--lengths", "16", "16"], "--lengths must differ"),
        (["--heads", "3"], "--heads (3) must be divisible by --kv-heads (2)"),
        (["--kv-heads", "0"], "--kv-heads must be at least 1, got 0"),
        (["--head-width", "0"], "--head-width must be at least 1, got 0"),
        (["--densities", "0"], "--densities must lie above 0 and not above 1, got 0"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--json", "no/such/folder/attention.json"], "--json"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(attention.main, [*TOY, *arguments], capsys)
