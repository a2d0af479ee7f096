"""The dial passes through the trained point, reaches what it is asked for, and says what it costs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.batches import ValidationSet
from evals.dial.__main__ import check, main, table, turn
from evals.dial.calibrate import TOLERANCE, Measured, _quantile, calibrate, measure, site_targets
from evals.dial.figure import draw
from evals.dial.file import Dial
from evals.windows import Windows, open_set, split
from model.config import ModelConfig
from model.decoder import Decoder
from model.flops import Routed, executed_flops
from tests.launching import run
from tests.model.tiny import force
from trainer.checkpoints.weights_folder import write_weights
from tune.load import Loaded, load_model

DENSITIES = [0.2, 0.4, 0.7, 0.9, 1.0]
CALIBRATION, HELD_OUT = 12, 5


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    """The folder of a run of a few steps: two layers with two routers each."""
    folder = tmp_path_factory.mktemp("dial")
    config = {
        "model": {
            "vocab_size": 400, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn_width": 48, "init_std": 0.1,
            "router": {"density": 0.6, "granularity": "module"},
        },
        "data": corpus,
        "train": {
            "run_dir": str(folder / "run"), "steps": 4, "global_batch_samples": 8, "micro_batch_samples": 4,
            "precision": "fp32", "optimizer": {"lr": 0.01},
            "evaluation": {"every_steps": 4, "samples": HELD_OUT, "with_noise": False},
            "log": {"peak_tflops": 1.0, "images": False},
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = run("pretrain.train", str(folder / "run.yaml"))
    assert done.returncode == 0, done.stdout[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(trained_run: Path) -> Loaded:
    return load_model(trained_run)


@pytest.fixture(scope="module")
def decoder(loaded: Loaded) -> Decoder:
    return loaded[0]


@pytest.fixture(scope="module")
def windows(loaded: Loaded) -> Windows:
    return split(open_set(loaded[1].data, None), CALIBRATION, HELD_OUT, 4)


@pytest.fixture(scope="module")
def trained(decoder: Decoder, windows: Windows) -> Measured:
    return measure(decoder, windows.calibration)


@pytest.fixture(scope="module")
def dial(decoder: Decoder, windows: Windows) -> Dial:
    return turn(decoder, 4, windows, DENSITIES)


def _loss(decoder: Decoder, windows: Windows, **options: Any) -> float:
    """Mean over the targets of the held-out windows, in one pass of the plain model."""
    tokens, targets = (torch.cat([getattr(b, name) for b in windows.held_out]) for name in ("tokens", "targets"))
    with torch.no_grad():
        output = decoder(tokens, targets, **options)
    assert output.loss is not None
    return float(output.loss.nll) / targets.numel()


def test_the_command_writes_a_dial_through_the_trained_point(
    trained_run: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained_run), "--densities", "0.3", "1", "--calibration-samples", "6"]) == 0
    printed = capsys.readouterr().out
    dial = Dial.load(trained_run / "dial/dial.json", loaded[1].model, loaded[2])
    assert table(dial) in printed and str(trained_run / "dial/dial.png") in printed
    assert [point.density for point in dial.points if not point.trained] == [0.3, 1.0] and len(dial.points) == 3
    assert (dial.step, dial.validation_set, dial.sites) == (4, "code", loaded[1].model.sites)
    assert (dial.calibration_windows, dial.held_out_windows, dial.window_tokens) == (6, HELD_OUT, 32)
    # By default the held-out windows are those of the training's own evaluation.
    line = json.loads((trained_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert dial.trained.loss == pytest.approx(line["validation/code/loss"], rel=1e-6)
    assert dial.trained.held_out_density == pytest.approx(line["validation/code/density"], abs=1e-9)
    assert dial.trained.flops_per_token == pytest.approx(line["validation/code/flops_per_token"])
    assert (trained_run / "dial/dial.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (trained_run / "dial").iterdir()) == ["dial.json", "dial.png"]


def test_one_checkpoint_of_a_run_and_another_folder(trained_run: Path, tmp_path: Path) -> None:
    saved, few = trained_run / "checkpoints/step-00000004", ["--densities", "0.5", "--samples", "2"]
    main([str(saved), *few, "--out", str(tmp_path / "new/out"), "--set", "code"])
    dial = Dial.load(tmp_path / "new/out/dial.json")
    assert dial.calibration_windows == dial.held_out_windows == 2
    elsewhere = Path(shutil.copytree(saved, tmp_path / "step-00000004"))
    _refused([str(elsewhere), *few])
    main([str(elsewhere), *few, "--out", str(tmp_path / "out")])
    assert Dial.load(tmp_path / "out/dial.json") == dial


def test_thresholds_of_zero_are_the_trained_model(
    decoder: Decoder, windows: Windows, trained: Measured, dial: Dial
) -> None:
    own = trained.tally.density
    thresholds, seen = calibrate(decoder, windows.calibration, trained, sum(own) / len(own))
    assert thresholds.tolist() == [0.0] * len(own) == dial.trained.thresholds
    assert seen.tally.density == own
    assert dial.trained.loss == pytest.approx(_loss(decoder, windows), rel=1e-6)
    assert dial.trained.density == dial.trained.calibration_density == pytest.approx(sum(own) / len(own))


def test_a_model_with_thresholds_of_its_own_is_trained_at_those(
    trained_run: Path, windows: Windows, dial: Dial
) -> None:
    decoder = load_model(trained_run).decoder
    decoder.thresholds = torch.tensor([0.3, -0.2, -math.inf, 0.1])
    point = turn(decoder, 4, windows, []).trained
    assert point.thresholds == pytest.approx([0.3, -0.2, None, 0.1])
    assert point.held_out_density != dial.trained.held_out_density and point.held_out_site_densities[2] == 1.0


def test_density_one_executes_everything(loaded: Loaded, trained_run: Path, windows: Windows, dial: Dial) -> None:
    point = dial.points[-1]
    assert point.density == point.held_out_density == 1.0 and point.thresholds == [None] * len(dial.sites)
    shape = (len(dial.sites), HELD_OUT, dial.window_tokens)
    forced = force(load_model(trained_run).decoder, torch.ones(shape, dtype=torch.bool))
    assert point.loss == pytest.approx(_loss(forced, windows), rel=1e-6)
    assert abs(point.loss - dial.trained.loss) > 1e-4
    routers = 2 * 2 * loaded[1].model.width * len(dial.sites)
    assert point.flops_per_token == pytest.approx(point.dense_flops_per_token + routers)


def test_the_calibration_windows_execute_what_was_asked(dial: Dial, decoder: Decoder, windows: Windows) -> None:
    """At every site, to a token: or as nearly as can be, where many tokens have one margin."""
    misses = []
    for point in dial.points[:-1]:
        thresholds = torch.tensor(point.thresholds)
        seen = measure(decoder, windows.calibration, thresholds)
        assert sum(seen.tally.density) / len(dial.sites) == pytest.approx(point.calibration_density)
        for margins, reached, target in zip(seen.margins, seen.tally.density, point.site_targets, strict=True):
            cuts = [0.0, *((margins >= m - 1e-6).double().mean().item() for m in margins)]
            best = min(abs(cut - target) for cut in cuts)
            assert abs(reached - target) <= best + 1 / len(margins) + TOLERANCE
            misses.append(best)
        assert sum(point.site_targets) / len(dial.sites) == pytest.approx(point.density)
    assert sorted(misses)[len(misses) // 2] <= 1 / (CALIBRATION * dial.window_tokens)  # most can be met


def test_flops_are_those_of_the_record_and_rise_along_the_dial(dial: Dial, decoder: Decoder, windows: Windows) -> None:
    flops = [point.flops_per_token for point in dial.points]
    assert flops == sorted(flops) and flops[0] < 0.8 * flops[-1]
    tokens = torch.cat([batch.tokens for batch in windows.held_out])
    for point in dial.points[:-1]:
        with torch.no_grad():
            routing = decoder(tokens, thresholds=torch.tensor(point.thresholds)).routing
        counts = Routed(
            tokens.numel(),
            float(routing.visible_keys),
            routing.executed_tokens.tolist(),
            routing.attended_keys.tolist(),
        )
        assert point.flops_per_token == pytest.approx(executed_flops(decoder.config, counts) / tokens.numel())
        assert point.held_out_density == pytest.approx(float(routing.executed.float().mean()))
        assert point.loss == pytest.approx(_loss(decoder, windows, thresholds=torch.tensor(point.thresholds)), rel=1e-6)


@pytest.mark.parametrize("density", [0.15, 0.85])
def test_whole_passes_end_where_site_by_site_does(
    decoder: Decoder, windows: Windows, trained: Measured, density: float
) -> None:
    """Each site's threshold set in turn, under the final thresholds of those before it."""
    targets = site_targets(trained.tally.density, density)
    expected = torch.zeros(len(targets))
    for site, target in enumerate(targets):
        expected[site] = _quantile(measure(decoder, windows.calibration, expected).margins[site], target)
    thresholds, _ = calibrate(decoder, windows.calibration, trained, density, tolerance=0)
    torch.testing.assert_close(thresholds, expected, rtol=0, atol=1e-5)
    alone = [_quantile(margins, target) for margins, target in zip(trained.margins, targets, strict=True)]
    assert (torch.tensor(alone) - expected).abs().max() > 1e-3  # what earlier sites execute does matter


def test_site_targets() -> None:
    assert site_targets([0.2, 0.6], 0.4) == pytest.approx([0.2, 0.6])
    assert site_targets([0.2, 0.6], 0.2) == pytest.approx([0.1, 0.3])
    assert site_targets([0.2, 0.6], 0.7) == pytest.approx([0.6, 0.8])
    assert site_targets([0.2, 0.6], 1.0) == [1.0, 1.0] == site_targets([1.0, 1.0], 1.0)
    assert site_targets([0.0, 0.0], 0.5) == [0.5, 0.5]  # routers that execute nothing on their own


@pytest.mark.parametrize(
    ("margins", "share", "threshold"),
    [
        ([3.0, 1.0, -1.0, -3.0], 0.25, 2.0),
        ([3.0, 1.0, -1.0, -3.0], 0.5, 0.0),
        ([3.0, 1.0, -0.5, -3.0], 0.5, 0.0),  # 0 will do, so it is 0, not the middle
        ([3.0, 1.0, 0.5, -3.0], 0.5, 0.75),
        ([4.0, 2.0, 2.0, 2.0, 1.0], 0.4, 3.0),  # a bundle stays whole: 1 or 4 of 5, and 1 is nearer to 2
        ([4.0, 2.0, 2.000001, 2.0, 1.0], 0.6, 1.5),
        ([-2.0, -4.0], 1.0, pytest.approx(-4.0, abs=1e-4)),
        ([4.0, 2.0], 0.0, pytest.approx(4.0, abs=1e-4)),
        ([-1.0, -2.0], 0.0, 0.0),
        ([2.0, 1.0], 1.0, 0.0),
    ],
)
def test_a_threshold_lies_in_a_gap(margins: list[float], share: float, threshold: float) -> None:
    found = _quantile(torch.tensor(margins), share)
    assert found == threshold
    assert float((torch.tensor(margins) >= found).float().mean()) == pytest.approx(share, abs=0.21)


def test_the_two_parts_share_no_window(loaded: Loaded) -> None:
    config = loaded[1]
    whole = ValidationSet(config.data, "code")
    for held_out in (HELD_OUT, whole.samples // 2):
        for calibration in (1, 7, whole.samples - held_out):
            parts = split(whole, calibration, held_out, 4)
            ids = [torch.cat([b.sample_ids for b in part]).tolist() for part in (parts.calibration, parts.held_out)]
            assert [len(part) for part in ids] == [calibration, held_out] == [len(set(part)) for part in ids]
            assert not set(ids[0]) & set(ids[1])
            trains = [int(b.sample_ids) for b in whole.batches(0, 1, 1, held_out)]
            assert ids[1] == trains
            assert max(len(b.tokens) for b in parts.calibration) <= 4
    spread = torch.cat([b.sample_ids for b in split(whole, 6, 5, 4).calibration])
    assert int(spread[-1] - spread[0]) > whole.samples / 2


def test_thresholds_between_the_points(dial: Dial, decoder: Decoder, windows: Windows) -> None:
    for point in dial.points[:-1]:
        assert dial.thresholds(point.density).tolist() == pytest.approx(point.thresholds)
    assert dial.thresholds(1.0).tolist() == [-math.inf] * len(dial.sites)
    previous = None
    for low, high in zip(dial.points[:-1], dial.points[1:], strict=True):
        between = dial.thresholds((low.density + high.density) / 2)
        assert torch.isfinite(between).all() and between.dtype == torch.float32
        ends = [torch.tensor([math.nan if t is None else t for t in p.thresholds]) for p in (low, high)]
        ends[1] = torch.where(ends[1].isnan(), torch.tensor(dial.lowest_margins), ends[1])
        assert (between <= torch.maximum(*ends) + 1e-6).all() and (between >= torch.minimum(*ends) - 1e-6).all()
        density = sum(measure(decoder, windows.calibration, between).tally.density) / len(dial.sites)
        assert low.calibration_density - 0.01 < density < high.calibration_density + 0.01
        assert previous is None or density > previous
        previous = density


def test_a_density_outside_of_the_points_gives_the_nearest_and_a_warning(dial: Dial) -> None:
    with pytest.warns(UserWarning, match=r"density 0.1 is outside the calibrated range \(0.200 to 1.000\), so the"):
        assert dial.thresholds(0.1).tolist() == pytest.approx(dial.points[0].thresholds)
    short = dial.model_copy(update={"points": dial.points[:-1]})
    with pytest.warns(UserWarning, match=r"outside the calibrated range \(0.200 to 0.900\)"):
        assert short.thresholds(1.0).tolist() == pytest.approx(short.points[-1].thresholds)
    for density in (0.0, -0.5, 1.01):
        with pytest.raises(ValueError, match=r"a density must be above 0 and at most 1, got "):
            dial.thresholds(density)


def test_a_dial_of_another_model_or_checkpoint(dial: Dial, decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "dial.json"
    path.write_text(dial.model_dump_json())
    assert Dial.load(path, decoder.config, 4) == dial == Dial.load(path)

    class Later(ModelConfig):
        """A later version's config, with a field more."""

        new: int = 3

    sizes = decoder.config.model_dump()
    sizes["router"]["execution"] = "reference"  # other kernels, the same decisions
    assert Dial.load(path, Later.model_validate(sizes)) == dial
    with pytest.raises(ValueError, match="is the dial of another model"):
        Dial.load(path, Later.model_validate(sizes | {"new": 4}))
    other = decoder.config.model_copy(update={"ffn_width": 64})
    with pytest.raises(ValueError, match=r"dial.json is the dial of another model \(its config's fingerprint is "):
        Dial.load(path, other)
    with pytest.raises(ValueError, match=r"was calibrated at step 4, these weights are of step 8; calibrate them"):
        Dial.load(path, decoder.config, 8)


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 3}', '{"model": "a", "new": 1}'])
def test_a_file_that_is_no_dial(tmp_path: Path, content: str) -> None:
    path = tmp_path / "dial.json"
    with pytest.raises(ValueError, match=r"there is no dial .*dial.json; calibrate one with python -m evals.dial RUN"):
        Dial.load(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"dial.json is not a dial of this version \(.*calibrate it again"):
        Dial.load(path)


def test_models_without_a_dial(decoder: Decoder) -> None:
    sizes = decoder.config.model_dump()
    dense, stride = (
        ModelConfig.model_validate({**sizes, "router": router}) for router in (None, {"kind": "stride", "density": 0.5})
    )
    with pytest.raises(ValueError, match=r"this model is dense: it has no routers, so there is no dial"):
        check(dense, DENSITIES)
    with pytest.raises(ValueError, match=r"router.kind stride keeps to the density it was given, .* only learned"):
        check(stride, DENSITIES)
    check(decoder.config, DENSITIES)


def test_what_the_command_refuses(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    run_folder = str(trained_run)
    cases: list[tuple[list[str], str]] = [
        ([str(tmp_path / "none")], "there is no folder"),
        ([str(tmp_path)], "is neither a run folder nor a whole checkpoint"),
        ([run_folder, "--densities", "0.5", "0"], "a density must be above 0 and at most 1, got 0;"),
        ([run_folder, "--densities", "1.5"], "a density must be above 0 and at most 1, got 1.5;"),
        ([run_folder, "--set", "cod"], "there is no validation set 'cod'; did you mean 'code'?"),
        ([run_folder, "--set", "xyz"], "there is no validation set 'xyz'; there are: code"),
        ([run_folder, "--samples", "100000"], "fewer than 100000 to calibrate on and 100000 others to measure on;"),
        ([run_folder, "--samples", "0"], "must be at least 1 each"),
        ([run_folder, "--out", str(in_the_way)], f"{in_the_way} cannot be written (File exists); give another folder"),
        ([run_folder, "--out", str(in_the_way / "a")], "cannot be written (Not a directory); give another folder"),
    ]
    for arguments, sentence in cases:
        _refused(arguments)
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_run_without_validation_sets(loaded: Loaded) -> None:
    data = loaded[1].data.model_copy(update={"validation": []})
    with pytest.raises(ValueError, match=r"the run's config has no data.validation, so there is nothing to measure"):
        open_set(data, None)


def test_validation_sets_are_looked_for_where_the_run_was_started(loaded: Loaded) -> None:
    data = loaded[1].data.model_copy(update={"dir": "runs/x-data"})
    with pytest.raises(ValueError, match=r"there is no folder runs/x-data, .* in which the run was started"):
        open_set(data, None)


def test_more_than_a_dense_model_takes_is_explained(dial: Dial) -> None:
    assert all(point.flops_per_token <= point.dense_flops_per_token for point in dial.points[:-1])
    full = dial.points[-1].model_copy(update={"flops_per_token": 1.01 * dial.points[-1].dense_flops_per_token})
    more = dial.model_copy(update={"points": [*dial.points[:-1], full]})
    assert "101.0%" in table(more) and table(more).endswith("its router, which a dense model does not have")


def test_the_picture_shows_every_point(dial: Dial) -> None:
    axes = draw(dial, "a-run").axes[0]
    curve, marked, dense = axes.lines
    assert list(curve.get_ydata()) == [point.loss for point in dial.points]
    assert list(curve.get_xdata()) == [point.flops_per_token / 1e6 for point in dial.points]
    assert list(marked.get_ydata()) == [dial.trained.loss]
    assert next(iter(dense.get_xdata())) == pytest.approx(dial.trained.dense_flops_per_token / 1e6)
    assert [text.get_text() for text in axes.texts] == [f"{point.held_out_density:.2f}" for point in dial.points]
    assert "a-run, step 4" in axes.get_title()


def _refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 1


def test_what_is_not_of_stage_one_has_no_dial(
    decoder: Decoder, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_model(trained_run).tokenizer_folder
    write_weights(decoder, tmp_path / "weights", data, {})
    with pytest.raises(SystemExit):
        main([str(tmp_path / "weights"), "--out", str(tmp_path)])
    assert (
        "weights is not from a stage-one run, on whose validation windows a dial is measured" in capsys.readouterr().err
    )
