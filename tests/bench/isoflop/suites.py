"""Suites on a tiny config, and runs that look finished without training; for the tests of ``bench/isoflop``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from bench.isoflop.suite import Run, Suite, load_suite, plan
from settings import to_yaml

DENSE = {"model.router": None, "model.layers": 1}
TINY: dict[str, Any] = {
    "tokens": 1024,
    "reference": "dense",
    "variants": {"dense": {"set": DENSE}, "skip": {"equal_flops": "density"}},
}
"""With the ``tiny`` config (3 layers with learned routers, 256 tokens a step): 4 steps, density matched."""


def write_suite(tmp_path: Path, tiny: dict[str, Any], **changes: Any) -> Path:
    """A suite of the ``tiny`` config with these fields instead of TINY's."""
    (tmp_path / "backbone.yaml").write_text(yaml.safe_dump(tiny))
    path = tmp_path / "suite.yaml"
    content = {"backbone": str(tmp_path / "backbone.yaml"), **TINY, **changes}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def planned(path: Path, out: Path) -> tuple[Suite, list[Run]]:
    """The suite of a file and its runs."""
    suite = load_suite(path)
    return suite, plan(suite, out)


def finish(run: Run, losses: list[float], speed: float = 100.0, share: float = 1.0, density: float = 0.4) -> None:
    """Write what a run leaves behind that was evaluated evenly over its steps, the last of ``losses`` at the end.

    Args:
        speed: tokens a second.
        share: executed FLOPs of the planned.
        density: of every site.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    steps, batch = run.config.train.steps, run.config.train.global_batch_samples * run.config.data.sequence_tokens
    per_token = share * run.planned_flops / (steps * batch)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line = {"train/tokens": step * batch, "flops/executed_per_token": per_token, "speed/tokens_per_s": speed}
        lines.append({"step": step, "train/loss": 5.0, **line})
    for place, loss in enumerate(losses):
        line = {"validation/code/loss": loss, "validation/code/flops_per_token": per_token / 3}
        if run.config.model.sites:
            sites = {f"validation/code/density/{site}": density for site in run.config.model.sites}
            line |= {"validation/code/density": density, **sites}
        lines.append({"step": steps * place // max(len(losses) - 1, 1), **line})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_dial(run: Run, step: int | None = None) -> None:
    """A dial of three points, the middle one as trained; of the last step unless given."""
    points = [
        {"density": d, "trained": d == 0.4, "flops_per_token": 1e6 * d, "loss": 4 + abs(d - 0.4)} for d in (0.3, 0.4, 1)
    ]
    content = {"step": run.config.train.steps if step is None else step, "points": points}
    (run.folder / "dial").mkdir()
    text = json.dumps({**content, "held_out_windows": 5, "validation_set": "code"})
    (run.folder / "dial/dial.json").write_text(text)
