"""The compute dial: one checkpoint, any budget at inference.

    python -m evals.dial runs/books-z2
    python -m evals.dial runs/books-z2/checkpoints/step-00000400 --densities 0.25 0.5 1 --set books --out /tmp/dial

For each density the routers' thresholds are calibrated on some windows of a validation set
(``evals/dial/calibrate.py``); loss, density and executed FLOPs are then measured on others. The trained point,
at its own thresholds, is one line of the table. ``RUN/dial`` gets ``dial.json`` and ``dial.png``; generation at any
budget in between is then

    loaded = load_model(run)
    thresholds = Dial.load(run / "dial" / "dial.json", config.model, step).thresholds(0.7)
    decoder(tokens, thresholds=thresholds)
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from data.files import write_atomically
from evals.dial import JSON, PICTURE, folder_of
from evals.placement import add_placement, check_placement, placed
from model.config import ModelConfig
from model.flops import dense_flops, executed_flops
from settings import command_parser, path_argument, user_errors
from trainer import preflight
from trainer.config import PretrainConfig

if TYPE_CHECKING:
    import torch

    from evals.dial.file import Dial, Point
    from evals.windows import Windows
    from model.decoder import Decoder
    from trainer.tally import Tally

DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def turn(
    decoder: Decoder,
    step: int,
    windows: Windows,
    densities: Sequence[float] = DENSITIES,
    tell: Callable[[Point], None] = lambda point: None,
) -> Dial:
    """Calibrate and measure ``decoder`` at the trained point and at ``densities``.

    Args:
        decoder: with learned routers, in evaluation mode.
        step: its number of optimiser steps.
        windows: to calibrate and to measure on.
        densities: plain means over the routed sites, each above 0 and at most 1.
        tell: called with each point once it is known, lowest density first.
    """
    import torch

    from evals.dial.calibrate import calibrate, measure, site_targets
    from evals.dial.file import Dial, fingerprint

    trained = measure(decoder, windows.calibration)
    own = trained.tally.density
    as_trained = torch.zeros(len(own)) if decoder.thresholds is None else decoder.thresholds.cpu()
    # A point at the trained density is included anyway; but at density 1, other tokens may not reach thresholds of 0.
    asked = {density for density in densities if density != fmean(own) or density == 1}
    points, lowest_margins = [], trained.margins.amin(1)
    for density, calibrated in sorted([(fmean(own), False), *((density, True) for density in asked)]):
        thresholds, seen, targets = as_trained, trained, own
        if calibrated:
            thresholds, seen = calibrate(decoder, windows.calibration, trained, density)
            targets = site_targets(own, density)
            lowest_margins = seen.margins.amin(1)
        held_out = measure(decoder, windows.held_out, thresholds).tally
        points.append(_point(decoder.config, density, not calibrated, thresholds, targets, seen.tally, held_out))
        tell(points[-1])
    return Dial(
        model=fingerprint(decoder.config),
        step=step,
        validation_set=windows.name,
        calibration_windows=sum(len(batch.tokens) for batch in windows.calibration),
        held_out_windows=sum(len(batch.tokens) for batch in windows.held_out),
        window_tokens=windows.held_out[0].tokens.shape[1],
        sites=decoder.config.sites,
        points=points,
        lowest_margins=lowest_margins.tolist(),
    )


def _point(
    model: ModelConfig,
    density: float,
    trained: bool,
    thresholds: torch.Tensor,
    targets: list[float],
    calibration: Tally,
    held_out: Tally,
) -> Point:
    from evals.dial.file import Point
    from model.router import numbers_of

    routed = held_out.routed
    return Point(
        density=density,
        trained=trained,
        thresholds=numbers_of(thresholds),
        site_targets=targets,
        calibration_density=fmean(calibration.density),
        held_out_density=fmean(held_out.density),
        held_out_site_densities=held_out.density,
        flops_per_token=executed_flops(model, routed) / routed.tokens,
        dense_flops_per_token=dense_flops(model, routed.tokens, routed.visible_keys) / routed.tokens,
        loss=held_out.loss,
    )


def check(model: ModelConfig, densities: Sequence[float]) -> None:
    """Refuse a model without a dial, and invalid densities.

    Raises:
        ValueError: in either case.
    """
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"a density must be above 0 and at most 1, got {density:g}; give others to --densities")
    if model.router is None:
        raise ValueError("this model is dense: it has no routers, so there is no dial; give a run with a router block")
    if not model.router.learned:
        raise ValueError(
            f"router.kind {model.router.kind} keeps to the density it was given, whatever the threshold; only learned "
            "routers have a dial, so give a run with router.kind learned"
        )


def _writable(folder: Path) -> Path:
    """``folder``, created if needed; an error is raised before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); give another folder with --out") from error
    return folder


def _folder_of(run_or_checkpoint: Path) -> Path:
    """``RUN/dial``, for a run or one of its checkpoints."""
    folder = folder_of(run_or_checkpoint)
    if folder is None:
        raise ValueError(f"{run_or_checkpoint} is not in a run folder; say with --out where to write")
    return folder


HEADER = "density: asked  calibration  held out   MFLOPs/token  of dense     loss  against trained"


def table(dial: Dial) -> str:
    """The points as text, one per line."""
    lines = [HEADER]
    for point in dial.points:
        against = "  as trained" if point.trained else f"{point.loss - dial.trained.loss:>+17.4f}"
        lines.append(
            f"{point.density:>14.3f}{point.calibration_density:>13.3f}{point.held_out_density:>10.3f}"
            f"{point.flops_per_token / 1e6:>15,.2f}{point.flops_per_token / point.dense_flops_per_token:>10.1%}"
            f"{point.loss:>9.4f}{against:>17}"
        )
    if any(point.flops_per_token > point.dense_flops_per_token for point in dial.points):
        lines.append(
            "above 100 % of dense: every token runs every layer and its router, which a dense model does not have"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate, measure, print, write."""
    parser = command_parser("evals.dial", __doc__)
    parser.add_argument(
        "path", type=path_argument, metavar="RUN_OR_CHECKPOINT", help="a run folder or one of its checkpoints"
    )
    parser.add_argument(
        "--densities", type=float, nargs="+", default=list(DENSITIES), metavar="RHO", help="above 0 and at most 1"
    )
    parser.add_argument("--set", metavar="NAME", help="validation set (default: the first one)")
    parser.add_argument(
        "--calibration-samples", type=int, metavar="N", help="windows to calibrate on (default: as many as --samples)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="other windows to measure on (default: those of the training's evaluation, or half of the set)",
    )
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="folder to write (default: RUN/dial)")
    add_placement(parser)
    options = parser.parse_args(arguments)
    with user_errors():
        check_placement(options)
        preflight.open_model(options.path)
        from evals.dial.figure import draw
        from evals.windows import open_set, split

        with placed(options) as placement:
            loaded = placement.load(options.path)
        config = loaded.config
        if not isinstance(config, PretrainConfig):
            raise ValueError(
                f"{loaded.source} is not from a stage-one run, on whose validation windows a dial is measured; give a "
                "stage-one run or one of its checkpoints"
            )
        assert loaded.step is not None
        check(config.model, options.densities)
        validation_set = open_set(config.data, options.set)
        samples = options.samples
        if samples is None:
            samples = max(min(config.train.evaluation.samples, validation_set.samples // 2), 1)
        calibration_samples = samples if options.calibration_samples is None else options.calibration_samples
        windows = split(validation_set, calibration_samples, samples, config.train.micro_batch_samples)
        folder = _writable(options.out or _folder_of(options.path))
        dial = turn(loaded.decoder, loaded.step, windows, options.densities, _tell)
        print(f"\n{table(dial)}\n")
        picture = io.BytesIO()
        draw(dial, Path(str(config.train.run_dir)).name).savefig(picture, dpi=110)
        write_atomically(folder / PICTURE, picture.getvalue())
        write_atomically(folder / JSON, (dial.model_dump_json(indent=1) + "\n").encode())
        print(f"wrote {folder / JSON} and {folder / PICTURE}")
    return 0


def _tell(point: Point) -> None:
    print(f"density {point.density:.3f}: loss {point.loss:.4f}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
