"""Every number of ranks and ZeRO stage reads what every other has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import resume
from bench.resume import difference, measure, table
from tests.launching import run

BASE = ["train.micro_batch_samples=2", "train.steps=10"]
BASE += ["model.layers=2", "model.width=33", "model.head_width=6", "model.ffn_width=21"]
BASE += ["deepspeed.persistence_threshold=50"]  # at stage 3 the norms of 33 entries are whole on every rank, too


def _fork(count: int, words: list[str], log: Path) -> int:
    done = run("bench.resume", *words, processes=count)
    log.write_text(done.stdout)
    return done.returncode


@pytest.mark.parametrize(
    ("precision", "stages"),
    [
        ("bf16", [0, 1, 3]),  # 2 lies as 1 does
        pytest.param("bf16", [0, 1, 2, 3], marks=pytest.mark.slow),
        pytest.param("fp32", [0, 1, 2, 3], marks=pytest.mark.slow),
    ],
)
def test_any_size_goes_on_from_any_other(
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    stages: list[int],
) -> None:
    """Odd sizes, so that partitions need padding; as far off as the uninterrupted runs are among themselves.

    In bf16 one routing decision that falls differently moves so small a model by a thousandth of a nat, resumed or
    not, so there a tenth of what lost moments cost is allowed.
    """
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(resume, "_start_ranks", _fork)
    found = measure(Path(write_config(tiny)), BASE, precision, [1, 2], stages, str(work))
    print(table(found))
    written, resumed = found["written"], found["resumed"]
    assert len(written) == 2 * len(stages) and len(resumed) == len(written) ** 2
    among_themselves = max(difference(a, b) for a in written.values() for b in written.values())
    without = min(difference(losses, written[writer]) for writer, losses in found["weights_only"].items())
    tolerance = 2 * among_themselves if precision == "fp32" else without / 10
    assert among_themselves < tolerance < without / 2
    for pair, losses in resumed.items():
        writer, reader = pair.split()
        apart = difference(losses, written[writer])
        assert apart == 0 if writer == reader else apart < tolerance, pair


def test_another_order_of_the_partitions_is_noticed(
    tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many ranks, the same stage and precision; loaded as it is it would be 0.3 nats off, and say nothing."""
    monkeypatch.setattr(resume, "_start_ranks", _fork)
    work = tmp_path / "work"
    work.mkdir()
    shuffled = "deepspeed.extra={zero_optimization: {round_robin_gradients: true}}"
    plain, config = Path(write_config(tiny)), [*BASE, "train.precision=bf16"]
    found = measure(plain, config, "bf16", [2], [2], str(work), read_with=[shuffled])
    assert difference(found["resumed"]["2x2 2x2"], found["written"]["2x2"]) < 2e-3


def test_ranks_are_started_under_torchrun(tmp_path: Path) -> None:
    status = resume._start_ranks(2, ["--help"], tmp_path / "log")
    assert status == 0 and (tmp_path / "log").read_text().count("usage: bench.resume") == 2
