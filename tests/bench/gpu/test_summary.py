"""What the summary says, and that it can be read as plain text."""

from __future__ import annotations

import json

from bench.gpu import summary
from bench.gpu.parts import parts
from bench.gpu.schedule import Figures, Outcome, Part

ROWS = [{"": "dense", "ms": "1,204.10", "MFU": ""}, {"": "routed_0.5", "ms": "71.00", "MFU": "61.0%"}]


def _outcome(name: str, **values: object) -> Outcome:
    part = Part(name, f"how {name} goes", ("python", "-m", name), 1.0, 1.0, lambda found, log: Figures(""))
    return Outcome(part, **values)  # type: ignore[arg-type]


DONE = [
    _outcome("facts", status="passed", seconds=7.4, limit_s=24, figures=Figures("H200, bf16 790 TFLOP/s")),
    _outcome("step", status="passed", seconds=81, limit_s=90, figures=Figures("time to dense 0.61", ROWS)),
    _outcome(
        "decode",
        status="failed",
        seconds=12,
        limit_s=60,
        reason="exit status 1",
        last_lines=["a | b", "```", "error: it is so"],
    ),
    _outcome("profile", status="not reached", reason="takes 25 s at least, and 3 s were left"),
]


def test_the_page() -> None:
    text = summary.markdown(DONE, {"commit": "abc", "time": "10 minutes"})
    assert text.startswith("# GPU check: 2 of 4 parts passed, 1 did not, 1 not finished\n")
    assert "\n- **commit**: abc\n- **time**: 10 minutes\n" in text
    assert "| facts   | passed          |   7 |  24 | H200, bf16 790 TFLOP/s" in text
    assert "| decode  | **failed**      |  12 |  60 | exit status 1" in text
    assert "| profile | **not reached** |     |     | takes 25 s at least, and 3 s were left |" in text
    assert (
        "## decode: failed, exit status 1\n\nThe last lines of `decode.log`:\n\n```\na | b\n'''\nerror: it is so\n```"
        in text
    )
    table = """
## step

How step goes.

|            |       ms |   MFU |
| ---------- | -------: | ----: |
| dense      | 1,204.10 |       |
| routed_0.5 |    71.00 | 61.0% |
"""
    assert text.endswith(table)
    assert "killed here" not in text
    assert text.index("## decode") < text.index("## step")  # what went wrong comes first


def test_a_page_that_is_not_the_last_says_so() -> None:
    text = summary.markdown([DONE[0], _outcome("step", status="running", limit_s=60)], {"commit": "abc"})
    assert "1 of 2 parts passed, 1 not finished" in text and "the command was killed here" in text
    assert "| step  | running |     |  60 |" in text


def test_the_file_to_go_on_with_holds_the_rows() -> None:
    found = json.loads(summary.as_json(DONE, {"commit": "abc"}))
    assert found["about"] == {"commit": "abc"}
    by_name = {part["name"]: part for part in found["parts"]}
    assert by_name["step"]["figures"] == {"key": "time to dense 0.61", "rows": ROWS}
    assert by_name["decode"]["last_lines"][-1] == "error: it is so" and by_name["decode"]["figures"] is None


def test_a_pipe_in_a_cell_stays_in_its_cell() -> None:
    rows = [{"name": "a|b", "ms": 0.5}]
    outcome = _outcome("profile", status="passed", limit_s=1, figures=Figures("", rows))
    assert "| a\\|b | 0.5 |" in summary.markdown([outcome], {"x": "y"})


def test_key_figures_of_benchmarks_and_tests(tmp_path) -> None:
    by_name = {part.name: part for part in parts("cuda", tmp_path)}

    def row(name: str, ratio: float) -> dict[str, object]:
        shares = {"density": 0.5, "flop_bound_ratio": 0.5, "mfu_executed": 0.456, "peak_memory_bytes": 2**31}
        return {"name": name, "step_s": 0.0125, "ratio_to_dense": ratio, **shares}

    step = by_name["step-rounded-compiled"].read([row("dense", 1.0), row("routed_0.5", 0.61)], "")
    assert step.key == "time to dense routed_0.5 0.61; dense MFU 45.6%"
    cells = {"": "routed_0.5", "density": "0.500", "ms": "12.50", "to dense": "0.610"}
    assert step.rows[1] == cells | {"FLOP bound": "0.500", "MFU": "45.6%", "GiB": "2.00"}
    rows = [row("batch_1/dense", 1.0), row("batch_1/routed_0.5", 0.7), row("batch_8/hf_llama_static", 0.9)]
    decode = by_name["decode"].read(rows, "")
    assert decode.key == "time to dense batch 1: routed_0.5 0.70; batch 8: hf_llama_static 0.90"
    log = "SKIPPED [1] x.py: 3 passed\n====== 1 failed, 10 passed, 1 skipped, 2 warnings in 71.20s (0:01:11) ======\n"
    assert by_name["tests"].read(None, log).key == "1 failed, 10 passed, 1 skipped"


def test_limits_are_judged_on_a_gpu_only(tmp_path) -> None:
    judged = {part.name for part in parts("cuda", tmp_path) if "--check" in part.command}
    assert judged == {"step-rounded-compiled", "attention", "decode"}
    assert not any("--check" in part.command for part in parts("cpu", tmp_path))
    assert sum("--layers=2" in part.command for part in parts("cpu", tmp_path)) == 6
    assert not any("--layers=2" in part.command for part in parts("cuda", tmp_path))
