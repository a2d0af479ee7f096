"""Tables, pictures and comparisons of a suite, from runs whose figures are known."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench.isoflop.figures import FEW, density_figure, dial_figure, loss_figure, task_figure
from bench.isoflop.report import TIME, as_csv, compare, main_table, rows, spread, time_table, whole_report
from bench.isoflop.results import collect
from bench.isoflop.suite import Run, Suite
from model.flops import parameter_counts
from tests.bench.isoflop.suites import DENSE, finish, planned, write_dial, write_suite

DOWNSTREAM = {"tasks": ["blimp", "perplexity"], "data": "d", "limit": 3}


@pytest.fixture
def suite_and_runs(tiny: dict[str, Any], tmp_path: Path) -> tuple[Suite, dict[str, Run]]:
    """Dense, skip and one with its own seed; two seeds."""
    variants = {
        "dense": {"title": "all layers", "set": DENSE},
        "skip": {"equal_flops": "density"},
        "late": {"seeds": [1]},
        "absent": {},
    }
    path = write_suite(tmp_path, tiny, variants=variants, seeds=[0, 1], downstream=DOWNSTREAM)
    suite, runs = planned(path, tmp_path / "out")
    return suite, {run.name: run for run in runs}


@pytest.fixture
def finished(suite_and_runs: tuple[Suite, dict[str, Run]]) -> tuple[Suite, dict[str, Run]]:
    """All but ``absent`` have run, and one is downstream."""
    _, runs = suite_and_runs
    finish(runs["dense-seed0"], [6.0, 4.5, 4.0])
    finish(runs["dense-seed1"], [6.2, 4.6, 4.2])
    finish(runs["skip-seed0"], [6.0, 4.5, 3.9], speed=50, share=0.9, density=0.25)
    finish(runs["skip-seed1"], [6.1, 4.8, 4.4], speed=50, share=1.0, density=0.35)
    finish(runs["late-seed1"], [6.1, 5.2, 4.5], speed=200)
    metrics = {"blimp_a": {"acc": 0.5}, "blimp_b": {"acc": 0.75}, "perplexity": {"bits_per_byte": 2.5}}
    asked = {**DOWNSTREAM, "step": 4}
    (runs["dense-seed0"].folder / "harness.json").write_text(json.dumps({"asked": asked, "metrics": metrics}))
    other = {**asked, "limit": 4}
    (runs["dense-seed1"].folder / "harness.json").write_text(json.dumps({"asked": other, "metrics": metrics}))
    return suite_and_runs


def _cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert set(lines[1]) == {"---"}
    return {line[0]: line[1:] for line in [lines[0], *lines[2:]]}


def test_the_table_has_means_spreads_and_pairs_of_the_same_seed(finished: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = finished
    table = _cells(main_table(suite, collect(suite, list(runs.values()))))
    assert list(table) == ["variant", "all layers", "skip", "late", "absent"]
    assert len({len(row) for row in table.values()}) == 1
    counts = parameter_counts(runs["dense-seed0"].config.model)
    inside = f"{counts['total'] - counts['embedding'] - counts['head']:,}"
    loss, downstream = "4.1000 ± 0.1414 (2)", ["0.6250", "2.5000"]
    assert table["all layers"] == ["1", inside, "-", "-", "1,024", "1.000", loss, "-", "-", *downstream]
    density = runs["skip-seed0"].config.model.router.density  # type: ignore[union-attr]
    skip = table["skip"]
    assert skip[2:6] == [f"{density:.3f}", "0.300 ± 0.071", "1,024", "0.950"]
    far = "+0.3 standard errors, p 1"
    assert skip[6:] == ["4.1500 ± 0.3536 (2)", "+0.0500 ± 0.2121 (2)", far, "-", "-"]  # -0.1 and +0.2
    late = f"{runs['late-seed1'].planned_flops / runs['dense-seed1'].planned_flops:.3f}"
    assert table["late"][5:] == [late, "4.5000 (1)", "+0.3000 (1)", "-", "-", "-"]
    assert set(table["absent"]) == {"-"}
    assert table["variant"][6:] == [
        "validation loss, code", "minus all layers, by seed", "from 0", "blimp, accuracy", "perplexity, bits per byte"
    ]  # fmt: skip


def test_time_is_a_ratio_and_nothing_else(finished: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = finished
    table = _cells(time_table(suite, collect(suite, list(runs.values()))))
    assert table["all layers"] == ["1.000", "1.000", "1.000"] and table["absent"] == ["-", "-", "-"]
    assert table["skip"] == ["0.500", "0.475", "2.000"]
    assert table["late"][0] == "2.000" and table["late"][2] == "0.500"


def test_without_a_reference_nothing_is_made_up(suite_and_runs: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = suite_and_runs
    finish(runs["skip-seed1"], [6.0, 4.0])
    results = collect(suite, list(runs.values()))
    row = _cells(main_table(suite, results))["skip"]
    assert row[5:8] == ["-", "4.0000 (1)", "-"]
    assert rows(suite, results)[0]["flops_of_reference"] == ""
    assert collect(suite, []) == [] and set(_cells(main_table(suite, []))["skip"]) == {"-"}


def test_rows_are_exact_and_the_page_says_what_made_it(finished: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = finished
    results = collect(suite, list(runs.values()))
    found = list(csv.DictReader(as_csv(rows(suite, results)).splitlines()))
    assert [(row["variant"], row["seed"]) for row in found] == [
        ("dense", "0"), ("skip", "0"), ("dense", "1"), ("skip", "1"), ("late", "1")
    ]  # fmt: skip
    dense, skip = found[0], found[1]
    assert float(dense["flops"]) == pytest.approx(runs["dense-seed0"].planned_flops, rel=1e-12)
    assert float(skip["flops"]) == pytest.approx(0.9 * runs["skip-seed0"].planned_flops, rel=1e-12)
    assert float(skip["flops_planned"]) == runs["skip-seed0"].planned_flops
    assert (float(dense[f"{TIME}training_s"]), float(skip[f"{TIME}training_s"])) == pytest.approx((10.24, 20.48))
    assert (dense["loss/code"], skip["loss/code"], dense["density"], skip["density"]) == ("4.0", "3.9", "", "0.25")
    assert (dense["downstream/blimp"], found[2]["downstream/blimp"]) == ("0.625", "")  # of another limit
    assert as_csv([]) == "variant\n"
    page = whole_report(suite, results, 7, ["one", "two"])
    assert "5 of 7 runs are done" in page and page.endswith("## Made by\n\n* one\n* two\n")


def test_a_resumed_run_counts_once_and_a_cut_line_not_at_all(suite_and_runs: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = suite_and_runs
    run = runs["dense-seed0"]
    finish(run, [6.0, 5.0, 4.0])
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    slower = json.dumps({**json.loads(lines[1]), "speed/tokens_per_s": 50.0})  # step 2 once more
    path.write_text("\n".join([*lines, slower, '{"step": 9, "train/to']))
    (result,) = collect(suite, [run])
    assert result.tokens == 1024 and result.seconds == pytest.approx(10.24 + 2.56)
    assert result.curve.tokens == [0, 512, 1024] and result.curve.losses == [6.0, 5.0, 4.0]
    assert result.curve.flops[1] == pytest.approx(result.flops / 2)


def test_a_final_loss_that_is_not_finite_is_shown_as_none(suite_and_runs: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = suite_and_runs
    finish(runs["dense-seed0"], [6.0, 5.0, 4.0])
    finish(runs["skip-seed0"], [6.0, 5.0, None])  # type: ignore[list-item]
    results = collect(suite, list(runs.values()))
    assert _cells(main_table(suite, results))["skip"][6:8] == ["-", "-"]
    assert loss_figure(suite, results) is not None
    finish(runs["dense-seed1"], [6.5, 5.5, None])  # type: ignore[list-item]
    results = collect(suite, list(runs.values()))
    figure = loss_figure(suite, results)
    assert figure is not None
    line = figure.axes[2].lines[0]
    assert line.get_ydata()[-2:] == pytest.approx([6.25, 5.25])  # losses of the same steps, and no others


def test_another_run_in_the_folder_is_told(suite_and_runs: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = suite_and_runs
    run = runs["skip-seed0"]
    finish(run, [5.0, 4.0])
    path = run.folder / "config.yaml"
    kept = path.read_text()
    path.write_text(kept.replace("resume: auto", "resume: required").replace("run_dir: ", "run_dir: ./"))
    assert len(collect(suite, [run])) == 1  # how it was started, and from where, is nothing that decides what it is
    path.write_text(kept.replace("ffn_width: 48", "ffn_width: 64").replace("lr: 0.003", "lr: 0.1"))
    with pytest.raises(
        ValueError, match=r"another config: model.ffn_width 64 instead of 48, train.optimizer.lr 0.1 in"
    ):
        collect(suite, [run])
    path.write_text("model: {}")
    with pytest.raises(ValueError, match=r"skip-seed0 holds a run that this version cannot read .* remove the folder"):
        collect(suite, [run])


def test_spread() -> None:
    assert spread([1.0, 2.0, None], "+.2f", count=True) == "+1.50 ± 0.71 (2)"
    assert spread([1.0], ".2f") == "1.00" and spread([], ".2f") == spread([None], ".2f") == "-"


def _write(folder: Path, table: list[dict[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.csv").write_text(as_csv(table))
    return folder


def test_tables_agree_but_for_time(finished: tuple[Suite, dict[str, Run]], tmp_path: Path) -> None:
    suite, runs = finished
    table = rows(suite, collect(suite, list(runs.values())))
    other = _write(tmp_path / "other", [{**row, f"{TIME}tokens_per_s": "7"} for row in table])
    assert compare(table, other).endswith("they are the same")
    off = [dict(row) for row in table]
    off[1]["loss/code"] = repr(3.9 * (1 + 5e-6))
    told = compare(table, _write(other, off))
    assert f"{14 * 5} figures of 5 runs" in told
    assert "the largest relative difference is 5.0e-06 (loss/code of skip with seed 0)" in told


CHANGES: dict[str, tuple[Callable[[list[dict[str, str]]], object], str]] = {
    "a figure": (
        lambda t: t[1].update({"loss/code": "3.95"}),
        "loss/code of skip with seed 0 differs from .* by 1.3e-02",
    ),
    "no figure": (lambda t: t[1].update({"density": ""}), "density of skip with seed 0 differs from .* by inf"),
    "a column": (lambda t: [row.pop("downstream/blimp") for row in t], "downstream/blimp of dense with seed 0 differs"),
    "a run less": (lambda t: t.pop(0), "dense with seed 0 is not in .*results.csv; compare suites of the same runs"),
    "a run more": (lambda t: t.append({**t[0], "seed": "9"}), "dense with seed 9 is only in .*results.csv"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_what_differs_is_named(
    finished: tuple[Suite, dict[str, Run]],
    tmp_path: Path,
    change: Callable[[list[dict[str, str]]], object],
    said: str,
) -> None:
    suite, runs = finished
    table = rows(suite, collect(suite, list(runs.values())))
    other = [dict(row) for row in table]
    change(other)
    with pytest.raises(ValueError, match=said):
        compare(table, _write(tmp_path / "other", other))


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*results.csv; give the --out folder"):
        compare([], tmp_path)


def _labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_losses_over_what_they_cost(finished: tuple[Suite, dict[str, Run]], tmp_path: Path) -> None:
    suite, runs = finished
    figure = loss_figure(suite, collect(suite, list(runs.values())))
    assert figure is not None
    flops, minutes, tokens = figure.axes
    assert _labels(figure) == ["all layers", "skip", "late"]
    dense, skip, late = (line for line in flops.lines)
    assert list(dense.get_ydata()) == pytest.approx([4.55, 4.1])  # 6.1 is above 1.15 x 4.1
    both = (runs["skip-seed0"].planned_flops * 0.9 + runs["skip-seed1"].planned_flops) / 2
    assert list(skip.get_xdata()) == pytest.approx([both / 2, both])
    assert list(minutes.lines[1].get_xdata()) == pytest.approx([10.24 / 60, 20.48 / 60])
    assert list(tokens.lines[0].get_xdata()) == pytest.approx([512e-6, 1024e-6])
    bars = [segment.tolist() for segment in flops.collections[1].get_segments()]
    assert [[low[1], high[1]] for low, high in bars] == [[4.5, 4.8], [3.9, 4.4]]
    assert len(suite.variants) <= FEW and {text.get_text() for text in tokens.texts} == {"all layers", "skip", "late"}
    styles = {(line.get_linestyle(), line.get_marker()) for line in (dense, skip, late)}
    assert len(styles) == 3
    for line in (dense, skip, late):
        assert float(str(line.get_color())) <= 0.7  # a grey
    figure.savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert loss_figure(suite, []) is None


def test_densities_of_learned_routers_by_site(finished: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = finished
    figure = density_figure(suite, collect(suite, list(runs.values())))
    assert figure is not None and _labels(figure) == ["skip", "late"]
    skip, target, late, _ = figure.axes[0].lines
    assert list(skip.get_ydata()) == pytest.approx([0.3] * 3) and list(late.get_ydata()) == [0.4] * 3
    density = runs["skip-seed0"].config.model.router.density  # type: ignore[union-attr]
    assert list(target.get_ydata()) == [density, density] and target.get_linestyle() == ":"
    assert density_figure(suite, collect(suite, [runs["dense-seed0"]])) is None


def test_tasks_of_the_runs_over_their_flops(finished: tuple[Suite, dict[str, Run]], tmp_path: Path) -> None:
    suite, runs = finished
    assert task_figure(suite, collect(suite, list(runs.values()))) is None
    for name, last in (("dense-seed0", 0.6), ("dense-seed1", 0.8), ("late-seed1", 0.5)):
        tasks: list[dict[str, Any]] = [{"step": 0, "tasks/a/acc": 0.25, "tasks/share_of_time": 0.1, "tasks/b/acc": 1}]
        tasks += [{"step": 4, "tasks/a/acc": last}, {"step": 2, "tasks/c/exact_match": None}]
        with (runs[name].folder / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in tasks))
    results = collect(suite, list(runs.values()))
    assert results[0].curve.tasks["a/acc"] == ([0.0, pytest.approx(results[0].flops)], [0.25, 0.6])
    figure = task_figure(suite, results)
    assert figure is not None and _labels(figure) == ["all layers", "late"]
    assert [axes.get_title() for axes in figure.axes] == ["a/acc"]  # of the others there is no curve
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.25, pytest.approx(0.7)]


def test_dials_and_dense_points(finished: tuple[Suite, dict[str, Run]]) -> None:
    suite, runs = finished
    assert dial_figure(suite, collect(suite, list(runs.values()))) is None
    write_dial(runs["skip-seed0"])
    write_dial(runs["late-seed1"], step=3)  # of an earlier checkpoint
    results = collect(suite, list(runs.values()))
    figure = dial_figure(suite, results)
    assert figure is not None and _labels(figure) == ["all layers", "skip"]
    dense, dial, circle = figure.axes[0].lines
    assert (list(dense.get_xdata()), list(dense.get_ydata())) == ([results[0].forward_flops / 1e6], [4.0])
    assert list(dial.get_xdata()) == [0.3, 0.4, 1.0] and list(circle.get_ydata()) == [4.0]
    assert figure.axes[0].get_ylim()[1] <= 1.05 * 4.0


def test_ten_variants_can_be_told_apart_without_colour(tiny: dict[str, Any], tmp_path: Path) -> None:
    variants = {"dense": {"set": DENSE}} | {f"v{n}": {"set": {"model.layers": n + 1}} for n in range(9)}
    suite, runs = planned(write_suite(tmp_path, tiny, variants=variants), tmp_path)
    for n, run in enumerate(runs):
        finish(run, [6.0, 5.0 - 0.1 * n, 4.0 - 0.1 * n])
    figure = loss_figure(suite, collect(suite, runs))
    assert figure is not None
    lines = figure.axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker(), line.get_color()) for line in lines}) == len(lines) == 10
    assert len({line.get_marker() for line in lines}) == 10 and not figure.axes[2].texts
