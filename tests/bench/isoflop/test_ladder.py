"""The fit over sizes, from tables whose figures are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bench.isoflop.ladder import Rung, fit, gather, main, report

SIZES = (100_000, 1_000_000, 10_000_000)


def folder(at: Path, parameters: int, leads: Sequence[float], variant: str = "skip-8") -> Path:
    """What a suite of one size has written, a seed a lead."""
    at.mkdir(parents=True)
    (at / "suite.yaml").write_text("reference: dense-4\n")
    lines = ["variant,seed,parameters_without_embedding,tokens,flops_of_reference,loss/books"]
    for seed, lead in enumerate(leads):
        lines.append(f"dense-4,{seed},{parameters},{15 * parameters},1.0,{4.0 + seed / 10}")
        lines.append(f"{variant},{seed},{2 * parameters},{15 * parameters},1.001,{4.0 + seed / 10 + lead}")
    lines.append(f"{variant},7,{2 * parameters},{15 * parameters},1.001,9.9")  # its reference is not there
    (at / "results.csv").write_text("\n".join(lines) + "\n")
    return at


def test_a_straight_line_is_found_and_has_no_uncertainty() -> None:
    rungs = [Rung(size, 1, [4.0, 4.0], [0.01 - 0.02 * place] * 2, 1.0) for place, size in enumerate(SIZES)]
    found = fit(rungs)
    assert found.slope == pytest.approx(-0.02) and found.at(1e8) == pytest.approx((-0.05, 0.0))


def test_the_uncertainty_is_that_of_simulated_ladders() -> None:
    """Of a thousand ladders with a scatter of 0.02 the lines at 1e8 scatter as one of them says of itself."""
    drawn = np.random.default_rng(0)
    lines, errors = [], []
    for _ in range(1000):
        rungs = [Rung(size, 1, [], (0.02 * drawn.standard_normal(4)).tolist(), 1.0) for size in SIZES]
        line, error = fit(rungs).at(1e8)
        lines.append(line)
        errors.append(error**2)
    assert np.std(lines) == pytest.approx(np.sqrt(np.mean(errors)), rel=0.06)


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leads = ([0.03, 0.01], [-0.01, 0.01], [-0.02, -0.04])
    folders = [folder(tmp_path / str(size), size, leads[place]) for place, size in enumerate(SIZES)]
    assert gather(folders, "skip-8")[0] == (100_000, 1_500_000, [4.0, 4.1], pytest.approx([0.03, 0.01]), 1.001)
    out = tmp_path / "out"
    assert main([*map(str, reversed(folders)), "--at", "1e8", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert (out / "ladder.md").read_text() in told and (out / "ladder.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split("|")[1].strip() for line in told.splitlines() if line.startswith("| ")]
    assert rows == ["parameters without embedding", "100,000", "1,000,000", "10,000,000"]
    assert "Slope: -0.0250 ± " in told and "The line at 100,000,000 parameters: -0.0533 ± " in told


def test_a_seed_that_two_folders_have_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And seeds of one size that lie in two folders are one size."""
    once = [folder(tmp_path / str(size), size, [0.03, 0.01]) for size in SIZES[:2]]
    again = folder(tmp_path / "again", SIZES[0], [0.03, 0.01, -0.02])
    assert gather([*once, once[0]], "skip-8") == gather(once, "skip-8")
    assert gather([*once, again], "skip-8")[0].leads == pytest.approx([0.03, 0.01, -0.02])
    other = folder(tmp_path / "other", SIZES[0], [0.04])
    with pytest.raises(SystemExit):
        main([*map(str, once), str(other), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert "both have seed 0 at 100,000 parameters, with losses of the reference 4.000000 and 4.000000 and lea" in told


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("no tables", "give the --out folders of bench.isoflop"),
        ("other variant", "give --variant one of its others: random-8"),
        ("one size", "needs two sizes and three runs of the variant, got 1 and 3"),
    ],
)
def test_mistakes(change: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"no tables": "skip-8", "other variant": "random-8"}
    place = folder(tmp_path / "a", 1000, [0.1, 0.2, 0.3], names.get(change, "skip-8"))
    if change == "no tables":
        (place / "results.csv").unlink()
    with pytest.raises(SystemExit) as stopped:
        main([str(place), "--out", str(tmp_path / "out"), "--at", "1e8"])
    assert stopped.value.code == 1 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_number_of_parameters_is_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--at", "0"])
    assert "argument --at: must be a number above 0, at most 1e+15, got '0'" in capsys.readouterr().err


def test_without_a_lead_of_two_seeds_no_test_is_made() -> None:
    rungs = [Rung(size, 1, [4.0], [0.1 * place], 1.0) for place, size in enumerate(SIZES)]
    assert report(rungs, fit(rungs), 1e8).count(" - |") == len(SIZES)
