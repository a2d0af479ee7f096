"""The end of a sentence about an unknown name."""

from __future__ import annotations

from settings import did_you_mean


def test_near_name_or_all_of_them() -> None:
    assert did_you_mean("stepz", ["lr", "steps"]) == "did you mean 'steps'?"
    assert did_you_mean("stepz", {"steps": 1}, prefix="train.") == "did you mean 'train.steps'?"
    assert did_you_mean("zzz", ("lr", "steps")) == "there are: lr, steps"
    assert did_you_mean("zzz", ["lr"], all_of_them="valid keys:") == "valid keys: lr"
    assert did_you_mean("zzz", []) == "there are: none"
