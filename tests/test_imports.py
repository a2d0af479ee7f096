"""Imports run one way, between packages and within them, and the model knows nothing of training."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "model": {"settings"},
    "settings": set(),
    "data": {"settings"},
    "trainer": {"settings", "data", "model"},
    "pretrain": {"settings", "data", "model", "trainer", "convert"},
    "convert": {"settings", "data", "model", "trainer", "tune"},
    "tune": {"settings", "data", "model", "trainer"},
    "launch": {"settings", "data", "model", "trainer", "tune"},
    "bench": {"settings", "data", "model", "trainer", "tune"},
    "evals": {"settings", "data", "model", "trainer", "tune", "convert"},
}
# What a package within one of those may import of its siblings; modules beside it are named, other folders may not be.
MAY_IMPORT_WITHIN = {
    "trainer.checkpoints": {
        "trainer.config_blocks",
        "trainer.git_state",
        "trainer.config",
        "trainer.distributed",
        "trainer.engine",
    }
    | {"trainer.deepspeed_internals", "trainer.log"},
    "trainer.monitor": {
        "trainer.config_blocks",
        "trainer.checkpoints",
        "trainer.git_state",
        "trainer.config",
        "trainer.deepspeed_internals",
    }
    | {"trainer.distributed", "trainer.evaluate", "trainer.exit_status", "trainer.flight_recorder"}
    | {"trainer.heartbeat", "trainer.log", "trainer.run_folder", "trainer.tally"},
    "trainer.tasks": {"trainer.config", "trainer.distributed", "trainer.preflight"},
    "data.prepare": {"data.config", "data.discovery", "data.files", "data.shards", "data.sources"}
    | {"data.store", "data.token_files", "data.tokenization", "data.tokenizer", "data.tokenizer_json", "data.urls"},
    "bench.common": set(),
    "bench.gpu": {"bench.common"},
    "bench.isoflop": {"bench.common"},
    "bench.loop": {"bench.common", "bench.loader"},
    "bench.tuning": {"bench.common"},
    "evals.dial": {"evals.placement", "evals.windows"},
    "evals.harness": {"evals.perplexity", "evals.placement", "evals.scoring", "evals.texts"},
    "evals.play": {"evals.dial", "evals.generate", "evals.placement", "evals.scoring"},
    "evals.routing": {"evals.placement", "evals.texts", "evals.windows"},
    "launch.demo": set(),
    "launch.doctor": {"launch.configs", "launch.plan"},
    "launch.plan": {"launch.configs"},
    "launch.profile": set(),
    "launch.slurm": {"launch.configs"},
    "launch.watch": set(),
}


@cache
def _modules() -> dict[str, Path]:
    """Every module of the project by its dotted name, packages too."""
    files = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def _imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports: modules, and what it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _our_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    names = (name if name in _modules() else name.rpartition(".")[0] for name in _imports(path))
    return {name for name in names if name in _modules()}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = {name.partition(".")[0] for name in _imports(path)} & (MAY_IMPORT.keys() - {package})
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {sorted(ours - MAY_IMPORT[package])}"


@pytest.mark.parametrize("package", MAY_IMPORT_WITHIN)
def test_a_package_within_another_imports_only_the_siblings_that_it_may(package: str) -> None:
    parent, found = package.partition(".")[0], set()
    for path in (ROOT / package.replace(".", "/")).rglob("*.py"):
        for name in _our_imports(path):
            top, _, rest = name.partition(".")
            sibling = f"{top}.{rest.partition('.')[0]}"
            if top == parent and rest and sibling != package:
                found.add(sibling)
    assert found == MAY_IMPORT_WITHIN[package]


def test_every_package_is_listed() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(MAY_IMPORT)
    within = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("*/*/__init__.py")}
    assert {name for name in within if not name.startswith("tests.")} == set(MAY_IMPORT_WITHIN)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions and for annotations count: whoever reads the one file has to read the other."""
    graph = {name: _our_imports(path) - {name} for name, path in _modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_the_model_does_not_know_deepspeed() -> None:
    assert not any(
        name.partition(".")[0] == "deepspeed" for p in (ROOT / "model").rglob("*.py") for name in _imports(p)
    )


def test_what_deepspeed_does_not_document_is_named_in_one_file() -> None:
    """Attributes of engines, optimisers and parameters; keys of checkpoint files are strings, not attributes."""
    private = {"_hp_mapping", "_get_zero_param_shapes", "_copy_recovery_script", "__compatible_ops__", "micro_steps"}
    private |= {"checkpoint_engine", "fp16_groups", "fp32_groups", "single_partition_of_fp32_groups"}
    private |= {"round_robin_bit16_padding", "fp32_partitioned_groups_flat", "update_lp_params"}
    for name, path in _modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            # hasattr(parameter, "ds_id") names one, too
            words = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
                words += [ast.literal_eval(part) for part in node.args[1:2] if isinstance(part, ast.Constant)]
            for word in words:
                if word in private or word.startswith("ds_"):
                    assert name == "trainer.deepspeed_internals", (
                        f"{path.relative_to(ROOT)} knows of DeepSpeed's {word}"
                    )
