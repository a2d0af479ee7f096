"""The end of a sentence about an unknown name."""

from __future__ import annotations

from settings import did_you_mean


def test_the_nearest_name_or_all_of_them() -> None:
    assert did_you_mean("stepz", ["lr", "steps"]) == "did you mean 'steps'?"
    assert did_you_mean("stepz", {"steps": 1}, prefix="train.") == "did you mean 'train.steps'?"
    assert did_you_mean("zzz", ("lr", "steps")) == "there are: lr, steps"
    assert did_you_mean("zzz", ["lr"], all_of_them="valid keys:") == "valid keys: lr"
    assert did_you_mean("zzz", []) == "there are: none"


def test_a_key_that_lies_deeper() -> None:
    paths = ["train", "train.steps", "train.checkpoint.resume", "train.log.every_steps", "train.evaluation.every_steps"]
    told = {
        "resume": "did you mean 'train.checkpoint.resume'?",
        "resum": "did you mean 'train.checkpoint.resume'?",
        "every_steps": "did you mean 'train.log.every_steps' or 'train.evaluation.every_steps'?",
        "trainn": "did you mean 'train'?",  # a near name of the block itself goes before one that is as near elsewhere
        "zzz": "there are: train, data",
    }
    assert {name: did_you_mean(name, ["train", "data"], elsewhere=paths) for name in told} == told
