"""The mean of checkpoints: parameter by parameter, of one model only, and what it says of where it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from convert.average import average, main
from convert.to_hf import export
from model.decoder import Decoder
from tests.convert.exports import CASES, make, make_tuned, write_run
from trainer.checkpoints import manifest
from trainer.checkpoints.weights_folder import read_weights, write_weights
from tune.load import load_model

SEEDS = (1, 2, 3, 4)


def add_checkpoint(run: Path, model: Decoder, step: int) -> Path:
    """Another checkpoint of a run of one rank at stage 2, with the weights of ``model``."""
    saved = run / f"checkpoints/step-{step:08d}"
    shutil.copytree(run / "checkpoints/step-00000003", saved)
    (saved / manifest.NAME).unlink()
    torch.save({"module": dict(model.named_parameters())}, saved / "deepspeed/mp_rank_00_model_states.pt")
    manifest.write(saved, {"step": step, "world_size": 1})
    return saved


def runs_of(folder: Path, name: str, data: dict[str, Any]) -> tuple[Path, list[Path], list[dict[str, Tensor]]]:
    """A run with checkpoints at steps 3, 5, 6 and 7, whose weights are random, and those."""
    made = [make(name, seed) for seed in SEEDS]
    run = write_run(folder, made[0], data)
    saved = [run / "checkpoints/step-00000003"]
    saved += [add_checkpoint(run, model, step) for model, step in zip(made[1:], (5, 6, 7), strict=True)]
    return run, saved, [dict(model.named_parameters()) for model in made]


def mean(weights: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    """In another order of operations: all at once, in fp64."""
    return {
        name: torch.einsum(
            "m...,m->...", torch.stack([w[name].double() for w in weights]), torch.tensor(shares, dtype=torch.float64)
        )
        for name in weights[0]
    }


def close(decoder: Decoder, expected: dict[str, Tensor]) -> bool:
    """To one rounding to fp32."""
    found = dict(decoder.named_parameters())
    assert found.keys() == expected.keys()
    return all(bool(((found[n].double() - w).abs() <= 2**-24 * w.abs() + 1e-30).all()) for n, w in expected.items())


@pytest.fixture
def dense(tmp_path: Path, corpus: dict[str, Any]) -> tuple[Path, list[Path], list[dict[str, Tensor]]]:
    return runs_of(tmp_path / "run", "dense", corpus)


@pytest.mark.parametrize("name", ["dense-tied-llama3", "layer", "module-ensemble"])
def test_the_last_ones_of_a_run(
    tmp_path: Path, corpus: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, saved, weights = runs_of(tmp_path / "run", name, corpus)
    out = tmp_path / "out"
    assert main([str(run), "--last", "3", str(out)]) == 0
    decoder, config = read_weights(out)
    assert close(decoder, mean(weights[1:], [1 / 3] * 3))
    assert config.model == make(name).config and (decoder.ensemble is not None) == (CASES[name][1] is not None)
    entries = json.loads((out / "manifest.json").read_text())
    assert entries["kind"] == "weights" and entries["source"] == "mean of 3 checkpoints, uniform"
    assert [(m["checkpoint"], m["step"], m["share"]) for m in entries["averaged"]] == [
        (str(path), step, 1 / 3) for path, step in zip(saved[1:], (5, 6, 7), strict=True)
    ]
    said = capsys.readouterr().out
    assert "mean of 3 checkpoints, uniform" in said and f"{saved[1]}: 33.33%" in said and f"wrote     {out}" in said


def test_the_export_of_a_mean_says_of_what(dense: tuple[Path, list[Path], Any], tmp_path: Path) -> None:
    run, saved, _ = dense
    average([run], tmp_path / "out", last=2)
    export(tmp_path / "out", tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    assert "| exported from | mean of 2 checkpoints, uniform |" in card
    assert f"| averaged checkpoint | {saved[-1]}, 50.00% of the mean |" in card


def test_exponential_by_step(dense: tuple[Path, list[Path], Any], tmp_path: Path) -> None:
    """Steps 3, 5, 6, 7 have a mean interval of 4/3: the first is three of them back, and the others 1.5 and 0.75."""
    run, saved, weights = dense
    average([run], tmp_path / "out", last=4, decay=0.8)
    counts = [0.8**3, 0.8**1.5, 0.8**0.75, 1.0]
    assert close(read_weights(tmp_path / "out")[0], mean(weights, [count / sum(counts) for count in counts]))
    average(saved[1:], tmp_path / "even", decay=0.8)
    counts = [0.64, 0.8, 1.0]
    assert close(read_weights(tmp_path / "even")[0], mean(weights[1:], [count / sum(counts) for count in counts]))


def test_a_list_in_any_order_of_checkpoints_and_folders(
    dense: tuple[Path, list[Path], Any], tmp_path: Path, corpus: dict[str, Any]
) -> None:
    _, saved, weights = dense
    other = make("dense", 9)
    other.seed = 0  # as the run's train.seed
    write_weights(other.bfloat16(), tmp_path / "folder", Path(corpus["dir"]), {"source": "a test"})
    rounded = {name: weight.float() for name, weight in other.named_parameters()}
    assert main([str(saved[3]), str(saved[0]), str(tmp_path / "folder"), str(tmp_path / "out")]) == 0
    decoder, _ = read_weights(tmp_path / "out")
    assert close(decoder, mean([weights[3], weights[0], rounded], [1 / 3] * 3))
    assert next(decoder.parameters()).dtype == torch.float32
    average([saved[3], saved[0]], tmp_path / "two")
    entries = json.loads((tmp_path / "two/manifest.json").read_text())
    assert [member["step"] for member in entries["averaged"]] == [3, 7]  # by steps


@pytest.mark.parametrize("name", ["bf16-0", "bf16-1", "bf16-3", "fp32-2"])
def test_means_of_what_real_engines_saved(two_rank_runs: Path, tmp_path: Path, name: str) -> None:
    """Of the fp32 masters, at every way in which they lie in the files; the second is the first, times two."""
    run = two_rank_runs / name
    masters = torch.load(run / "masters.pt")
    twice = load_model(run).decoder
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2)
    write_weights(twice, tmp_path / "twice", load_model(run).tokenizer_folder, {"source": "a test"})
    average([run, tmp_path / "twice"], tmp_path / "out")
    found = dict(read_weights(tmp_path / "out")[0].named_parameters())
    assert found.keys() <= masters.keys()
    for key, parameter in found.items():
        torch.testing.assert_close(parameter, 1.5 * masters[key], rtol=2**-23, atol=0)


def test_the_mean_is_a_base_for_others(dense: tuple[Path, list[Path], Any], tmp_path: Path) -> None:
    """Of what a mean is said to be by itself: any reader takes it."""
    run, _, weights = dense
    average([run], tmp_path / "out", last=4)
    loaded = load_model(tmp_path / "out")
    assert close(loaded.decoder, mean(weights, [0.25] * 4)) and loaded.tokenizer_folder == tmp_path / "out"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence that ends the command."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 1
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not Path(str(arguments[-1])).exists() or "already exists" in sentence
    return sentence


def change(checkpoint: Path, **blocks: dict[str, Any]) -> None:
    """Other fields in a checkpoint's config, as if it had been written so."""
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    for block, fields in blocks.items():
        config[block] |= fields
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    written = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").unlink()
    manifest.write(checkpoint, {"step": written["step"], "world_size": 1})


def test_two_models(
    dense: tuple[Path, list[Path], Any], tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, saved, _ = dense
    other = write_run(tmp_path / "other", make("layer"), corpus)
    out = tmp_path / "out"
    told = refused(capsys, saved[1], other, out)
    assert (
        "are different models (model.rope_scaling None there, {" in told
        or "are different models (model.rope_theta" in told
    )
    assert "model.router set there, null here" in told and "give checkpoints of one run, or of forks of it" in told
    change(saved[2], train={"seed": 5})
    assert "step-00000006 and " in (told := refused(capsys, run, "--last", 3, out)) and "(seed 5 there, 0 here)" in told
    vote = write_run(tmp_path / "vote", make("ensemble"), corpus)
    assert "ensemble.layers 3 there, None here" in refused(capsys, vote, saved[1], out)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes((Path(corpus["dir"]) / "tokenizer.model").read_bytes() + b"\n")
    change(saved[1], data={"dir": str(tokenizer)})
    assert "are different models (tokenizer " in refused(capsys, saved[0], saved[1], out)


def test_tuned_from_two_bases(tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run, saved, _ = runs_of(tmp_path / "run", "ensemble", corpus)
    for path, sha in zip(saved[2:], "ab", strict=True):
        change(path, base={"sha256": sha * 64})
    assert "are different models (base aaaaaaaaaaaa there, bbbbbbbbbbbb here)" in refused(
        capsys, run, "--last", 2, tmp_path / "out"
    )


def test_adapters_are_merged_first(tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tuned, block = make_tuned(make("layer-ensemble"), "lora")
    run = write_run(tmp_path / "tuned", tuned, corpus, adapter=block)
    shutil.copytree(run, tmp_path / "copy")
    told = refused(capsys, run, tmp_path / "copy", tmp_path / "out")
    assert (
        "has lora adapters, and the product of averaged factors is not "
        "the average of their products; merge each checkpoint (python -m tune.m" in told
    )


def test_fewer_than_asked_and_torn_ones(
    dense: tuple[Path, list[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, saved, weights = dense
    out = tmp_path / "out"
    assert "--last 5 asks for 5 whole checkpoints, but " in (told := refused(capsys, run, "--last", 5, out))
    assert "has 4 (step-00000007, step-00000006, step-00000005, step-00000003); ask for fewer" in told
    (saved[2] / "trainer.pt").write_bytes(b"x")  # in no manifest, so nobody's
    (saved[2] / "config.yaml").write_text("torn")
    told = refused(capsys, saved[2], saved[3], out)
    assert "step-00000006 is neither a run folder nor a whole checkpoint: config.yaml has 4 bytes instead of" in told
    assert "has 3 (step-00000007, step-00000005, step-00000003)" in refused(capsys, run, "--last", 4, out)
    assert main([str(run), "--last", "3", str(out)]) == 0
    assert "skipped: step-00000006 is torn: config.yaml has 4 bytes" in capsys.readouterr().err
    assert close(read_weights(out)[0], mean([weights[n] for n in (0, 1, 3)], [1 / 3] * 3))


def test_what_is_not_finite_is_named(
    dense: tuple[Path, list[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = dense
    spoilt = make("dense")
    with torch.no_grad():
        spoilt.norm.weight[0] = float("nan")
    add_checkpoint(run, spoilt, 9)
    told = refused(capsys, run, "--last", 2, tmp_path / "out")
    assert "norm.weight in " in told and "step-00000009 is not finite" in told
    assert not list(tmp_path.glob("out*"))


def test_weights_of_another_shape(
    dense: tuple[Path, list[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, saved, weights = dense
    (saved[3] / manifest.NAME).unlink()
    less = {name: weight for name, weight in weights[3].items() if name != "norm.weight"}
    torch.save({"module": less}, saved[3] / "deepspeed/mp_rank_00_model_states.pt")
    manifest.write(saved[3], {"step": 7, "world_size": 1})
    told = refused(capsys, run, "--last", 2, tmp_path / "out")
    assert "do not match its config.yaml (norm.weight is missing); one of them was changed after it was written" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN", "OUT"], "alone is itself; give --last N with a run, or two or more checkpoints"),
        (["RUN", "--last", "1", "OUT"], "--last must be at least 2, got 1"),
        (["A", "B", "--last", "2", "OUT"], "--last 2 takes one run, but 2 paths were given; leave it out"),
        (["A", "--last", "2", "OUT"], "--last 2 takes a run, but "),
        (["RUNS", "--last", "2", "OUT"], "give the folder that train.run_dir names; "),
        (["A", "A", "OUT"], "would be averaged with itself; give each checkpoint once"),
        (["RUN", "D", "OUT"], "would be averaged with itself; give each checkpoint once"),
        (["RUN", "--last", "2", "--decay", "1", "OUT"], "--decay must be above 0 and below 1, got 1"),
        (["RUN", "--last", "2", "RUN"], "already exists and is not an empty folder; nothing is overwritten"),
        (["nowhere", "A", "OUT"], "there is no folder nowhere"),
        (["A", "HF", "OUT"], "is a Hugging Face folder, not a run"),
        (["A", "FOLDER", "--decay", "0.5", "OUT"], "--decay needs the number of optimiser steps, which "),
        (["A", "SAME", "--decay", "0.5", "OUT"], "--decay needs different numbers of optimiser steps, but all "),
    ],
)  # fmt: skip
def test_arguments_that_make_no_mean(
    dense: tuple[Path, list[Path], Any],
    exported: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    run, saved, _ = dense
    weights, hf = exported("dense")
    places = {"RUN": run, "OUT": tmp_path / "out", "A": saved[0], "B": saved[1], "D": saved[3]}
    places |= {"RUNS": run.parent, "HF": hf, "FOLDER": weights, "SAME": tmp_path / "same"}
    shutil.copytree(saved[0], tmp_path / "same")
    assert sentence in refused(capsys, *(places.get(word, word) for word in arguments))
