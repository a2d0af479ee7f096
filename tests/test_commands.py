"""Every command parses before it imports: help and mistakes cost no torch, and what is advised can be typed."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from settings.load import key_paths
from tests.test_imports import MAY_IMPORT
from trainer.config import PretrainConfig
from trainer.exit_status import EXIT_MISTAKE
from tune.config import TuneConfig

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "deepspeed", "transformers", "datasets", "matplotlib", "peft", "tensorboard", "lm_eval", "starlette"]
# Runs a module as ``python -m`` does, once for each list of arguments; prints statuses, output and what was imported.
RUN = """
import contextlib, io, json, runpy, sys
done = []
for arguments in json.loads(sys.argv[2]):
    sys.argv, told, status = [sys.argv[0], sys.argv[1], sys.argv[2], *arguments], io.StringIO(), 0
    module, lists, sys.argv = sys.argv[1], sys.argv[2], [sys.argv[1], *arguments]
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
    sys.argv = ["", module, lists]
    done.append((status, told.getvalue()))
print(json.dumps([done, [name for name in HEAVY if name in sys.modules]]))
""".replace("HEAVY", repr(HEAVY))


def _files() -> list[Path]:
    """Every Python file of the project, tests left out."""
    return [path for package in sorted(MAY_IMPORT) for path in sorted((ROOT / package).rglob("*.py"))]


def _module(path: Path) -> str:
    """Its name as ``python -m`` takes it."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


COMMANDS = {_module(path) for path in _files() if 'if __name__ == "__main__":' in path.read_text()}
CONTRACT = {
    *("data.tokenizer", "data.prepare", "pretrain.train", "tune.train", "tune.merge", "convert.to_hf"),
    *(
        "convert.from_hf",
        "convert.average",
        "evals.perplexity",
        "evals.generate",
        "evals.harness",
        "evals.routing",
        "evals.dial",
        "evals.play",
    ),
    *("launch.slurm", "launch.doctor", "launch.plan", "launch.watch", "launch.rewind", "launch.profile"),
    *("bench.step", "bench.decode", "bench.loader", "bench.isoflop"),
}
# Takes a config first: what must be said of one that is not there, or has a key that is none.
CONFIG_FIRST = {
    "data.tokenizer": [],
    "data.prepare": [],
    "pretrain.train": [],
    "tune.train": [],
    "launch.doctor": [],
    "launch.slurm": ["--gpus-per-node", "8", "--dry-run"],
    "launch.plan": ["--gpus", "8", "--gpu", "h100-80g"],
}


def run_light(module: str, *lists: list[str]) -> list[tuple[int, str]]:
    """Status and output of ``module`` for each of the ``lists`` of arguments; none of them may import what is heavy."""
    words = [sys.executable, "-c", RUN, module, json.dumps(lists)]
    ended = subprocess.run(words, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, timeout=300)
    done, imported = json.loads(ended.stdout.splitlines()[-1])
    assert imported == [], f"{module} {lists} imports {imported}: {done}"
    return [(status, told) for status, told in done]


def test_every_command_of_the_contract_is_there() -> None:
    assert COMMANDS >= CONTRACT


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_help_and_usage_errors_import_nothing_heavy(module: str) -> None:
    helped, refused, abbreviated = run_light(module, ["--help"], ["--no-such-flag"], ["--hel"])
    assert helped[0] == 0 and "usage: " in helped[1] and module in helped[1]
    assert refused[0] == 2 and "error: " in refused[1] and "Traceback" not in refused[1]
    assert abbreviated[0] == 2 and "error: " in abbreviated[1]


def test_every_parser_is_made_in_one_way() -> None:
    """But for those that run before anything is installed."""
    makers = {str(path.relative_to(ROOT)) for path in _files() if "ArgumentParser(" in path.read_text()}
    assert makers == {"settings/arguments.py", "bench/gpu/__main__.py", "bench/gpu/wheels.py"}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("launch.demo", ["configs/demo.yaml", "configs/tune_demo.yaml", "--processes"]),
        ("data.prepare", ["configs/demo.yaml", "--workers"]),
        ("bench.saving", ["configs/demo.yaml", "--rounds"]),
        ("bench.saving", ["configs/demo.yaml", "--steps"]),
        ("bench.host", ["configs/demo.yaml", "--rounds"]),
        ("bench.sequence", ["configs/demo.yaml", "--rounds"]),
        ("bench.sequence", ["configs/demo.yaml", "--tokens"]),
        ("bench.resume", ["configs/demo.yaml", "--ranks"]),
        ("bench.preparation", ["configs/demo.yaml", "--tasks"]),
        ("evals.perplexity", ["runs/no", "no.txt", "--batch-tokens"]),
    ],
)
def test_a_count_of_zero_is_refused_before_anything_heavy(module: str, words: list[str]) -> None:
    for status, told in run_light(module, [*words, "0"], [*words, "-1"], [*words, "x"]):
        assert status == 2 and f"error: argument {words[-1]}: must be a whole number, at least " in told


def test_data_that_is_not_prepared_is_told_before_anything_heavy(tmp_path: Path, tiny, write_config) -> None:
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "my/checkpoints").mkdir(parents=True)
    bare, unprepared, no_initial = run_light(
        "pretrain.train",
        ["configs/demo.yaml", "data.dir=/nowhere", f"train.run_dir={tmp_path}"],
        ["configs/demo.yaml", f"data.dir={tmp_path}", f"train.run_dir={tmp_path}"],
        [write_config(tiny), f"init.path={tmp_path}/nowhere"],
    )
    assert bare[0] == unprepared[0] == no_initial[0] == 78
    assert f"there is no folder {tmp_path}/nowhere; give init.path a stage-one run" in no_initial[1]
    assert no_initial[1].endswith(f"; {tmp_path} holds my\n")
    assert (
        "/nowhere has no tokenizer: " in bare[1]
        and "python -m data.tokenizer configs/demo.yaml data.dir=/nowhere " in bare[1]
    )
    assert "manifest.json does not exist; prepare the source with: python -m data.prepare configs/demo" in unprepared[1]


def test_a_base_or_examples_that_are_not_there_are_told_before_anything_heavy(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    base.mkdir()
    tuned.mkdir()
    (tuned / "config.yaml").write_text("base: {path: x}\n")
    own = ["configs/tune_demo.yaml", f"base.path={base}", "data.test=[{name: x, files: [no.jsonl]}]"]
    mistakes = [
        (["configs/tune_demo.yaml", "base.path=nowhere"], "there is no folder nowhere; give base.path a stage-one run"),
        (["configs/tune_demo.yaml", f"base.path={tuned}"], "is a stage-two run, whose weights apply on top of its own"),
        ([*own, f"train.run_dir={base}/run"], "are the same, or one contains the other; give the tuned run a folder"),
        (
            [*own, "data.sources=[{name: x, files: [README.md]}]", "data.validation=[]"],
            "source 'x': no file matches 'no.jsonl' in",
        ),
    ]
    for (status, told), (_, sentence) in zip(run_light("tune.train", *(m[0] for m in mistakes)), mistakes, strict=True):
        assert status == EXIT_MISTAKE and sentence in told, told


@pytest.mark.parametrize("module", CONFIG_FIRST)
def test_mistakes_in_a_config_are_told_before_anything_heavy(module: str) -> None:
    extra, config = CONFIG_FIRST[module], "configs/tune_demo.yaml" if module == "tune.train" else "configs/demo.yaml"
    block = "data" if module.startswith("data.") else "train"
    missing, misspelt = run_light(module, ["no/such.yaml", *extra], [config, f"{block}.seeed=1", *extra])
    status = EXIT_MISTAKE if module in ("pretrain.train", "tune.train") else 1
    assert missing[0] == status and missing[1].startswith("error: config file no/such.yaml does not exist")
    assert misspelt[0] == status and f"unknown key '{block}.seeed'; did you mean '{block}.seed'?" in misspelt[1]


def test_a_run_folder_that_is_taken_is_told_before_anything_heavy(tiny, write_config) -> None:
    run_dir = Path(tiny["train"]["run_dir"])
    (run_dir / "checkpoints" / "step-00000031").mkdir(parents=True)
    config = write_config(tiny)
    (taken,) = run_light("pretrain.train", [config, "train.checkpoint.resume=never"])
    assert (
        taken[0] == EXIT_MISTAKE
        and taken[1].splitlines()[0] == f"{run_dir}: starting; torch and DeepSpeed take some seconds to load"
    )
    assert "already holds step-00000031; set train.checkpoint.resume=auto to go on with that run" in taken[1]
    (run_dir / "checkpoints" / "step-00000031").rmdir()
    (unknown,) = run_light("pretrain.train", [config, "train.checkpoint.mirror=s33://bucket/run"])
    assert (
        unknown[0] == EXIT_MISTAKE
        and "train.checkpoint.mirror s33://bucket/run: the protocol 's33' is not" in unknown[1]
    )
    (none,) = run_light("pretrain.train", [config, "train.checkpoint.resume=required"])
    assert none[0] == EXIT_MISTAKE and "there is no checkpoint; check train.run_dir" in none[1]


@functools.cache
def _texts() -> list[tuple[str, str]]:
    """Every string of the project's Python files and every document: where, and the text; fields of f-strings as {}."""
    texts = [(path.name, path.read_text()) for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]
    for path in _files():
        tree = ast.parse(path.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values]
                texts.append((where, "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                texts.append((where, node.value))
    return texts


KEYS = {*key_paths(PretrainConfig), *key_paths(TuneConfig)}
BLOCKS = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
LAST_PARTS = {key.rpartition(".")[2] for key in KEYS}


def test_commands_that_are_advised_are_commands() -> None:
    """``python -m launch.rewind`` in an error or a document is a module that can be started so."""
    ours = {*MAY_IMPORT} - {"settings"}
    named = {
        (where, name) for where, text in _texts() for name in re.findall(r"(?:-m|--module) ([a-z_]+\.[a-z_]+)", text)
    }
    mine = {(where, name) for where, name in named if name.partition(".")[0] in ours}
    assert len(mine) > 50
    assert {(where, name) for where, name in mine if name not in COMMANDS} == set()


def test_overrides_that_are_advised_are_keys() -> None:
    """``train.checkpoint.resume=auto`` in an error or a document is a key; a bare ``resume=auto`` is none."""
    found = [
        (w, key) for w, text in _texts() for key in re.findall(rf"(?<![\w./-])((?:{BLOCKS})(?:\.\w+)+)=(?!=)", text)
    ]
    assert len(found) > 50
    assert {(where, key) for where, key in found if key not in KEYS} == set()
    advised = r"(?:again with|go on with|set|give|resume with) ([a-z_]+)=(?!=)"
    bare = {(where, name) for where, text in _texts() for name in re.findall(advised, text)}
    assert {(where, name) for where, name in bare if name in LAST_PARTS and name not in KEYS} == set()


def test_keys_that_are_advised_are_keys() -> None:
    """``raise data.sequence_tokens`` in an error names a field, or a block."""
    verbs = "set|raise|lower|give|change|choose|check|add|remove|leave|put|name|correct|needs?|in"
    advised = rf"\b(?:{verbs}) (?:both |the |a |another |or )?((?:{BLOCKS})(?:\.[a-z_]\w*)+)(?![\w(/`]|\.py)"
    found = {(where, key) for where, text in _texts() if ".py:" in where for key in re.findall(advised, text)}
    assert len(found) > 50
    assert {(w, key) for w, key in found if key not in KEYS and not any(k.startswith(f"{key}.") for k in KEYS)} == set()


def test_options_that_are_advised_are_options() -> None:
    """``raise --window`` in an error of a command is an option of its folder's; in shared code, of any command."""
    of_folder = {folder: _options(folder) for folder in MAY_IMPORT}
    shared = {"settings", "data", "model", "trainer"}
    everywhere = set().union(*of_folder.values())
    advised = r"\b(?:with|without|give|raise|lower|fewer|add|another|larger|say|set|or|and|task) (--[a-z][a-z-]+)"
    found = {(where, name) for where, text in _texts() if ".py:" in where for name in re.findall(advised, text)}
    assert len(found) > 40
    wrong = set()
    for where, name in found:
        folder = where.partition("/")[0]
        if name not in (everywhere if folder in shared else of_folder[folder]):
            wrong.add(name)
    assert wrong == {"--ipc"}  # Docker's


def _options(folder: str) -> set[str]:
    """The options that parsers in ``folder`` are given."""
    calls = (
        node
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    )
    arguments = (part.value for call in calls for part in call.args if isinstance(part, ast.Constant))
    return {text for text in arguments if isinstance(text, str) and re.fullmatch(r"--[a-z][a-z-]*", text)}
