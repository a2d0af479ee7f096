"""Limits are judged on the right device and on the right side, and what was not measured is not judged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bench import decode
from bench.common import limits
from bench.common.limits import LIMITS, Limit, judge, require


def _just(metric: str, device: str, factor: float) -> float:
    limit = LIMITS[metric]
    return getattr(limit, device) * (factor if limit.sense == "at most" else 1 / factor)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("metric", LIMITS)
def test_each_limit_holds_on_one_side_only(metric: str, device: str) -> None:
    kind = device.partition(":")[0]
    for factor, holds in ((0.99, True), (1.0, True), (1.01, False)):
        (verdict,) = judge({metric: _just(metric, kind, factor)}, device)
        assert verdict.holds is holds
        assert str(verdict).startswith("ok" if holds else "MISSED") and metric in str(verdict)


def test_a_device_has_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.LIMITS, "step/routed_0.5", Limit("half", cpu=0.5, cuda=0.7))
    assert [judge({"step/routed_0.5": 0.6}, device)[0].holds for device in ("cpu", "cuda:0")] == [False, True]


def test_decoding_is_judged_at_every_default_batch() -> None:
    for batch in decode.parse([]).batches:
        measured = {f"decode/batch_{batch}/routed_{density}": 1.01 for density in ("1", "0.5", "0.25")}
        holds = {verdict.metric.rpartition("_")[2]: verdict.holds for verdict in judge(measured, "cpu")}
        assert holds == {"1": True, "0.5": False}
    at_once = "decode/batch_1/routed_0.5"
    assert [judge({at_once: 0.7}, device)[0].holds for device in ("cpu", "cuda")] == [False, True]


def test_more_utilisation_and_tokens_are_better_and_more_time_is_worse() -> None:
    rates = {"step/dense_mfu", "loop/dense", "loop/routed_0.5", "evaluation/choices", "evaluation/yes_or_no"}
    assert {name for name, limit in LIMITS.items() if limit.sense == "at least"} == rates
    assert judge({"step/dense_mfu": 0.9}, "cpu")[0].holds
    assert not judge({"step/dense_mfu": 0.1}, "cpu")[0].holds


def test_only_what_was_measured_is_judged() -> None:
    assert judge({"step/routed_0.3": 9.0, "step/hf_llama": 9.0}, "cpu") == []
    assert [v.metric for v in judge({"step/routed_1": 1.0, "step/routed_0.3": 9.0}, "cpu")] == ["step/routed_1"]


def test_nothing_to_judge_is_no_pass() -> None:
    with pytest.raises(ValueError, match="has nothing to check"):
        require([])


def test_every_missed_limit_is_named_and_nan_is_missed() -> None:
    good, *bad = judge({"step/routed_1": 1.0, "step/routed_0.5": 9.0, "loader/waited_share": math.nan}, "cpu")
    require([good])
    require([replace(verdict, value=0.0) for verdict in bad])
    sentence = (
        r"2 of 3 limits missed: step/routed_0.5 is 9 \(at most .*\); loader/waited_share is nan \(at most 0.01\)$"
    )
    with pytest.raises(ValueError, match=sentence):
        require([good, *bad])
