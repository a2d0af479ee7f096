"""A run from given weights begins as the model that they are; a fork goes on as the run would have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.facts import facts_of
from convert.to_hf import export
from model.config import EnsembleConfig, ModelConfig
from model.decoder import Decoder
from model.init import initialise
from pretrain.initial import open_initial
from tests.launching import run
from tests.logged import figures_of
from tests.trainer.checkpoints.saved_runs import TIED, rehash, save_runs
from tests.trainer.one_rank import engine_for, take_steps
from trainer.checkpoints.weights_folder import write_weights
from trainer.config import InitConfig, PretrainConfig
from trainer.distributed import World
from trainer.initial import GivenWeights
from tune.load import load_model

TRAIN = "pretrain.train"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, two_rank_runs: Path, corpus: dict[str, Any]) -> dict[str, Path]:
    """The weights of the run ``fp32-2`` as a folder and as an export, beside the runs."""
    folder = tmp_path_factory.mktemp("sources")
    loaded = load_model(two_rank_runs / "fp32-2")
    write_weights(loaded.decoder, folder / "weights", Path(corpus["dir"]), {"source": "a test"})
    export(folder / "weights", folder / "hf")
    return {"weights": folder / "weights", "hf": folder / "hf", "fp32": two_rank_runs / "fp32-2",
            "fp32-3": two_rank_runs / "fp32-3", "bf16": two_rank_runs / "bf16-2"}  # fmt: skip


def test_every_source_at_every_stage_gives_two_ranks_the_masters_bit_by_bit(
    tmp_path: Path, corpus: dict[str, Any], sources: dict[str, Path], two_rank_runs: Path
) -> None:
    cases, expected = {}, {}
    for stage, source in enumerate(["weights", "fp32-3", "fp32", "hf"]):
        run_folder = "fp32-3" if source == "fp32-3" else "fp32-2"
        name = f"{source}-{stage}"
        cases[name] = [f"deepspeed.zero_stage={stage}", f"init={{path: {sources[source]}}}"]
        expected[name] = two_rank_runs / run_folder / "masters.pt"
        cases[f"bf16-{stage}"] = [f"deepspeed.zero_stage={stage}", *TIED, f"init={{path: {sources['bf16']}}}"]
        expected[f"bf16-{stage}"] = two_rank_runs / "bf16-2" / "masters.pt"
    out = save_runs(tmp_path, corpus, cases, ranks=2, module="tests.trainer.initial_worker")
    for name, path in expected.items():
        here, there = torch.load(out / name / "masters.pt"), torch.load(path)
        assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in there), name


def test_a_fork_with_nothing_else_changed_is_the_run_that_went_on(
    tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit by bit, the state of a quantile controller among all. Then it is resumed where the source is gone."""
    tiny["train"] |= {"steps": 8, "checkpoint": {"every_steps": 4, "keep": 2}, "evaluation": {"every_steps": 4}}
    tiny["model"]["router"]["budget"] = {"controller": "quantile", "reach_by_step": 6}
    config, folder = write_config(tiny), Path(tiny["train"]["run_dir"])
    done = run(TRAIN, config, processes=2)
    assert done.returncode == 0, done.stdout[-3000:]
    shutil.move(folder / "checkpoints/step-00000004", tmp_path / "copy")
    fork = ["init={path: " + str(tmp_path / "copy") + ", kind: fork}", f"train.run_dir={tmp_path / 'fork'}"]
    done = run(TRAIN, config, *fork, "train.stop_at_step=6", processes=2)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"fork of {tmp_path / 'copy'}, step 4" in done.stdout
    shutil.rmtree(tmp_path / "copy")
    done = run(TRAIN, config, *fork, "train.checkpoint.resume=required", processes=2)
    assert done.returncode == 0, done.stdout[-3000:]

    straight, forked = figures_of(folder), figures_of(tmp_path / "fork")
    assert {step: line for step, line in forked.items() if step > 4 and step != 6} == {
        step: straight[step] for step in (5, 7, 8)
    }
    assert forked[6]["train/loss"] == straight[6]["train/loss"]  # evaluated, too, as it was the last for a while
    before, after = load_model(folder), load_model(tmp_path / "fork")
    for name, weight in before.decoder.named_parameters():
        assert torch.equal(weight, after.decoder.get_parameter(name)), name
    assert before.decoder.thresholds is not None
    assert torch.equal(before.decoder.thresholds, after.decoder.thresholds)  # type: ignore[arg-type]
    assert facts_of(after)["init"] == f"fork of {tmp_path / 'copy'}, step 4"


@pytest.mark.parametrize("controller", ["fixed", "quantile"])
def test_given_thresholds_outlive_a_resume(
    tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path, controller: str
) -> None:
    """Under a controller that has none of its own; one that has begins with them."""
    decoder = Decoder(ModelConfig.model_validate(tiny["model"]))
    initialise(decoder, decoder.config, 0)
    decoder.thresholds = torch.tensor([-0.5, 0.25, 0.125])
    write_weights(decoder, tmp_path / "given", Path(tiny["data"]["dir"]), {"source": "a test"})
    tiny["init"] = {"path": str(tmp_path / "given")}
    tiny["model"]["router"]["budget"] = {"controller": controller}
    config, folder = write_config(tiny), Path(tiny["train"]["run_dir"])
    for more in (["train.stop_at_step=1"], ["train.checkpoint.resume=required", "train.stop_at_step=2"]):
        done = run(TRAIN, config, *more)
        assert done.returncode == 0, done.stdout[-3000:]
        kept = load_model(folder).decoder.thresholds
        assert kept is not None and torch.equal(kept, decoder.thresholds) == (controller == "fixed"), more
    first = next(line for line in figures_of(folder).values() if "density/mean" in line)
    assert 0.2 < first["density/mean"] < 0.8  # not all of it, as without thresholds


def test_a_dense_model_is_taught_to_skip(
    configure: Callable[..., PretrainConfig], world: World, tmp_path: Path
) -> None:
    """It begins as it was, in training and evaluation, and its density follows the ramp from the second step on."""
    dense = configure("model.router=null", "train.run_dir=" + str(tmp_path / "dense"))
    with engine_for(dense, world) as engine:
        (first,) = take_steps(engine, dense, world, 1)
        decoder = engine.module.float()
        write_weights(decoder, tmp_path / "weights", Path(dense.data.dir), {"source": "a test"})
    router = "{density: 0.5, explore: 0.2, budget: {controller: quantile, dense_until_step: 6, reach_by_step: 12}}"
    for stage in (0, 2):
        config = configure(
            f"model.router={router}",
            f"init={{path: {tmp_path / 'weights'}}}",
            "train.steps=20",
            "train.optimizer.lr=0.0005",
            f"deepspeed.zero_stage={stage}",
        )
        assert config.init is not None
        with engine_for(config, world) as engine:
            given = open_initial(config.init, config.model, Path(config.data.dir), world)
            assert isinstance(given, GivenWeights)
            given.put_into(engine, world)
            steps = take_steps(engine, config, world, 20)
        assert steps[0].tally.density == [1.0] * 3
        # The dense run's second step, before which it had the weights of this one's first.
        assert steps[0].tally.loss == pytest.approx(_loss_of(dense, tmp_path / "weights", world), rel=1e-5)
        means = [sum(step.tally.density) / 3 for step in steps]
        assert means[:7] == [1.0] * 7 and all(mean == pytest.approx(0.5, abs=0.15) for mean in means[14:]), means
        assert first.tally.loss > 0


def _loss_of(config: PretrainConfig, weights: Path, world: World) -> float:
    """Of the dense model in ``weights`` on the first batch."""
    with engine_for(config, world) as engine:
        given = open_initial(InitConfig(path=str(weights)), config.model, Path(config.data.dir), world)
        assert isinstance(given, GivenWeights)
        given.put_into(engine, world)
        return take_steps(engine, config, world, 1)[0].tally.loss


def test_routers_with_a_price_begin_at_a_tie(
    configure: Callable[..., PretrainConfig], world: World, sources: dict[str, Path], tmp_path: Path
) -> None:
    dense = configure("model.router=null")
    with engine_for(dense, world) as engine:
        write_weights(engine.module, tmp_path / "weights", Path(dense.data.dir), {"source": "a test"})
    init = InitConfig(path=str(tmp_path / "weights"))
    noisy = configure("model.router={density: 0.5}")
    with pytest.raises(
        ValueError, match=r"new ones must execute every token at first, which noise of scale 1 prevents"
    ):
        open_initial(init, noisy.model, Path(noisy.data.dir), world)
    config = configure("model.router={density: 0.5, noise: {start: 0, end: 0, until: 1}}")
    with engine_for(config, world) as engine:
        given = open_initial(init, config.model, Path(config.data.dir), world)
        assert isinstance(given, GivenWeights)
        given.put_into(engine, world)
        assert not engine.module.layers[0].router.weight.any()
        assert take_steps(engine, config, world, 1)[0].tally.density == [1.0] * 3


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 401}, r"model.vocab_size 400 there, 401 here\); set the model block to its values"),
    "head size": ({"head_width": 8}, r"model.head_width 6 there, 8 here"),
    "rotation": ({"rope_theta": 5000.0}, r"model.rope_theta 10000.0 there, 5000.0 here"),
    "routers lost": ({"router": None}, "model.router set there, null here"),
    "other routers": (
        {"router": {"density": 0.5, "granularity": "module"}},
        r"router granularity layer there, module here",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_of_another_model(sources: dict[str, Path], world: World, name: str) -> None:
    changes, sentence = WRONG[name]
    config = ModelConfig.model_validate(load_model(sources["fp32"]).decoder.config.model_dump() | changes)
    for source in ("fp32", "weights", "hf"):
        with pytest.raises(ValueError, match=sentence) as error:
            open_initial(InitConfig(path=str(sources[source])), config, sources["weights"], world)
        assert "\n" not in str(error.value)


def test_what_is_nothing_to_start_from(
    sources: dict[str, Path], world: World, tmp_path: Path, corpus: dict[str, Any]
) -> None:
    loaded = load_model(sources["fp32"])
    model = loaded.decoder.config

    def refused(path: Path, sentence: str, **fields: Any) -> None:
        with pytest.raises(ValueError, match=sentence) as error:
            open_initial(InitConfig(path=str(path), **fields), model, sources["weights"], world)
        assert "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "there is no folder .*; give init.path a stage-one run")
    refused(tmp_path, "is neither a run folder nor a whole checkpoint: it has no manifest.json; give init.path")
    refused(sources["weights"], "has weights but no optimiser state, from which init.kind fork continues", kind="fork")
    refused(sources["hf"], "has weights but no optimiser state", kind="fork")

    copy = Path(shutil.copytree(sources["hf"], tmp_path / "hf"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refused(copy, "model_type gpt2 cannot be imported; take a checkpoint of llama")
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, copy / "model.safetensors")
    refused(copy, "model.norm.weight in .* has 1 of 33 values that are NaN")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors")
    torn = Path(shutil.copytree(sources["weights"], tmp_path / "torn"))
    (torn / "config.yaml").write_text((torn / "config.yaml").read_text() + "\n")
    refused(torn, "is not a complete folder of weights: config.yaml has .*; write or copy it again")
    loaded.decoder.add_ensemble(EnsembleConfig(layers=2))
    write_weights(loaded.decoder, tmp_path / "voting", Path(corpus["dir"]), {"source": "a test"})
    refused(
        tmp_path / "voting", "has a late-layer ensemble, which stage one does not train; give init.path what it was"
    )


def test_tokens_of_another_tokenizer(
    sources: dict[str, Path], world: World, tmp_path: Path, corpus: dict[str, Any]
) -> None:
    """The export's ``tokenizer.json`` is the same one as the ``tokenizer.model`` that it was made from."""
    model = load_model(sources["fp32"]).decoder.config
    init = InitConfig(path=str(sources["weights"]))
    open_initial(InitConfig(path=str(sources["hf"])), model, Path(corpus["dir"]), world)
    open_initial(init, model, tmp_path, world)  # none there: preparation has its own sentence
    other = json.loads((sources["hf"] / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]  # a merge's result must stay in it
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    shutil.copytree(sources["hf"], tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"has another one \(id 398 is .* there, .* here\); prepare the data with th"):
        open_initial(init, model, tmp_path / "other", world)


def test_a_run_of_stage_two_is_merged_first(sources: dict[str, Path], world: World, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(sources["fp32"], tmp_path / "tuned"))
    (checkpoint,) = (tuned / "checkpoints").glob("step-*")
    (checkpoint / "config.yaml").write_text((checkpoint / "config.yaml").read_text() + "base: {path: x}\n")
    rehash(checkpoint, "config.yaml")
    for path in (tuned, checkpoint):
        with pytest.raises(
            ValueError, match=r"is a stage-two checkpoint, .*; merge them first with: python -m tune.merge"
        ):
            open_initial(InitConfig(path=str(path)), load_model(sources["fp32"]).decoder.config, path, world)


def test_files_that_do_not_belong_together(
    sources: dict[str, Path], configure: Callable[..., PretrainConfig], world: World, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(sources["hf"], tmp_path / "hf"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors")
    config = configure("deepspeed.zero_stage=0").model_copy(
        update={"model": load_model(sources["fp32"]).decoder.config}
    )
    with engine_for(config, world) as engine:
        given = open_initial(InitConfig(path=str(copy)), config.model, sources["weights"], world)
        assert isinstance(given, GivenWeights)
        with pytest.raises(ValueError, match=r"has no norm.weight, so its files do not belong together; copy it again"):
            given.put_into(engine, world)


def test_rows_of_the_embedding_that_no_token_uses(configure: Callable[..., PretrainConfig]) -> None:
    """As padded vocabularies have them."""
    with pytest.raises(
        ValueError, match=r"model.vocab_size \(448\) must equal data.tokenizer.vocab_size \(400\), or w"
    ):
        configure("model.vocab_size=448")
    assert configure("model.vocab_size=448", "init={path: somewhere}").model.vocab_size == 448
    with pytest.raises(ValueError, match=r"model.vocab_size \(384\) must equal"):
        configure("model.vocab_size=384")
