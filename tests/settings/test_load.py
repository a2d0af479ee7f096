"""Loading a config: precedence, unknown keys, overrides and the sentences that a user reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from settings import Strict, load, to_yaml
from settings.load import peek
from settings.parse import Dumper, Loader


class Source(Strict):
    """A list item."""

    name: str
    """Name."""
    weight: float = Field(1.0, gt=0)
    """Share."""


class Data(Strict):
    """A nested block."""

    sources: list[Source] = Field(default_factory=list)
    """Items."""
    extra: dict[str, Source] = Field(default_factory=dict)
    """Items by a name of the user's."""
    shuffle: bool = True
    """A flag."""


class Train(Strict):
    """A block with a cross-field rule."""

    steps: int = Field(gt=0)
    """Steps."""
    warmup: int = 0
    """Steps."""
    rate: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] | None = None
    """Decay."""
    stage: Literal[0, 1] = 0
    resume: Literal["auto", "never"] = "auto"
    """Whether to."""
    """Stage."""

    @model_validator(mode="after")
    def _ordered(self) -> Train:
        if self.warmup > self.steps:
            raise ValueError(f"train.warmup ({self.warmup}) must not exceed train.steps ({self.steps})")
        return self


class Run(Strict):
    """A run."""

    train: Train
    """Training."""
    data: Data | None = None
    """Data."""
    name: str = "größe"
    """Name."""


GOOD = "train: {steps: 10, rate: 2e-4}\ndata:\n  sources: [{name: a}, {name: b, weight: 3}]\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def sentence(path: Path, *overrides: str, block: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, overrides, Run, block)
    message = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in message
    return message


def test_defaults_then_file_then_command_line(write) -> None:
    path = write(GOOD)
    run = load(path, [], Run)
    assert (run.train.steps, run.train.rate, run.train.warmup) == (10, 2e-4, 0)
    assert [source.weight for source in run.data.sources] == [1.0, 3.0]
    run = load(path, ["train.steps=20", "train.warmup=3", "train.steps=30"], Run)
    assert (run.train.steps, run.train.warmup, run.train.rate) == (30, 3, 2e-4)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=x", "x"),
        ("name='10'", "10"),
        ("name=a=b", "a=b"),
        ("name='a: b'", "a: b"),
    ],
)
def test_override_values_are_yaml(write, override: str, value: str) -> None:
    assert load(write(GOOD), [override], Run).name == value


def test_overrides_of_other_forms(write) -> None:
    path = write(GOOD)
    assert load(path, ["data.shuffle=false"], Run).data.shuffle is False
    assert load(path, ["train.rate=1e-5"], Run).train.rate == 1e-5
    assert load(path, ["data=null"], Run).data is None
    assert [s.name for s in load(path, ["data.sources=[{name: z}]"], Run).data.sources] == ["z"]
    assert load(write("train: {steps: 10}\ndata:\n"), ["data.shuffle=false"], Run).data.shuffle is False
    assert load(write("name: x\n"), ["train.steps=5"], Run).train.steps == 5


@pytest.mark.parametrize("override", ["train.steps", "=3", "--steps=3", ""])
def test_malformed_override(write, override: str) -> None:
    assert sentence(write(GOOD), override).startswith(f"override '{override}' must look like key.sub=value")


def test_override_with_bad_value(write) -> None:
    assert sentence(write(GOOD), "train.steps=[1") == (
        "override 'train.steps=[1': the value is not valid YAML; quote it"
    )
    assert "override 'train={steps: 1, steps: 2}': key 'steps' is given twice" in sentence(
        write(GOOD), "train={steps: 1, steps: 2}"
    )
    assert (
        sentence(write(GOOD), "train.steps.x=3")
        == "override 'train.steps.x=3': 'train.steps' is a value, not a block of keys"
    )


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("trian: {steps: 10}", [], "unknown key 'trian'; did you mean 'train'?"),
        ("train: {stepps: 10}", [], "unknown key 'train.stepps'; did you mean 'train.steps'?"),
        (GOOD, ["warmup=3"], "unknown key 'warmup'; did you mean 'train.warmup'?"),
        (GOOD, ["train.warm_up=3"], "unknown key 'train.warm_up'; did you mean 'train.warmup'?"),
        ("train: {zzz: 10}", [], "unknown key 'train.zzz'; valid keys: steps, warmup, rate, betas, stage, resume"),
        (
            "train: {steps: 1}\ndata: {sources: [{name: a}, {nam: b}]}",
            [],
            "unknown key 'data.sources[1].nam'; did you mean 'data.sources[1].name'?",
        ),
        (
            "train: {steps: 1}\ndata: {extra: {mine: {name: a, weihgt: 2}}}",
            [],
            "unknown key 'data.extra.mine.weihgt'; did you mean 'data.extra.mine.weight'?",
        ),
        ("train: {steps: 1}\n3: 4", [], "unknown key '3'; valid keys: train, data, name"),
    ],
)
def test_unknown_keys_name_the_nearest(write, text: str, overrides: list[str], expected: str) -> None:
    path = write(text)
    assert sentence(path, *overrides) == f"{path}: {expected}"


def test_every_unknown_key_is_told(write) -> None:
    message = sentence(write("train: {stepps: 10}\nnme: x\n"))
    assert "'train.stepps'" in message and "'nme'" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x", "key 'train' is required but missing"),
        ("train: {rate: 1}", "key 'train.steps' is required but missing"),
        ("train: {steps: many}", "train.steps: must be a whole number, got 'many'"),
        ("train: {steps: 0}", "train.steps: input should be greater than 0, got 0"),
        ("train: {steps: yes}", "train.steps: must be a number, got True (YAML reads true, yes and on as True"),
        ("train: {steps: 1, rate: off}", "train.rate: must be a number, got False"),
        ("train: {steps: 1, betas: [on, 0.9]}", "train.betas: must be a number, got [True, 0.9]"),
        ("train: {steps: 1, stage: yes}", "train.stage: must be a number, got True"),
        ("train: {steps: 1, rate: .nan}", "train.rate: input should be a finite number, got nan"),
        ("train: {steps: 1, warmup: 5}", "train: train.warmup (5) must not exceed train.steps (1)"),
        ("train: 5", "train: input should be a valid dictionary or instance of Train, got 5"),
        (
            "train: {steps: 1}\ndata: {sources: [{name: a}, {name: b, weight: -1}]}",
            "data.sources[1].weight: input should be greater than 0, got -1",
        ),
    ],
)
def test_bad_values(write, text: str, expected: str) -> None:
    path = write(text)
    assert sentence(path).startswith(f"{path}: {expected}")


def test_a_quoted_yes_would_be_no_choice_either(write) -> None:
    path = write("train: {steps: 1, resume: yes}")
    assert sentence(path) == f"{path}: train.resume: input should be 'auto' or 'never', got True"


def test_every_bad_value_is_told(write) -> None:
    message = sentence(write("train: {steps: 0, rate: x}\n"))
    assert "train.steps:" in message and "train.rate:" in message and "got 'x'" in message


@pytest.mark.parametrize("text", ["train: {steps: 1}\nname: x\ntrain: {steps: 2}\n", "train:\n  rate: 1\n  rate: 1\n"])
def test_a_key_written_twice(write, text: str) -> None:
    path = write(text)
    key = "train" if text.startswith("train: {") else "rate"
    assert sentence(path) == f"{path}: key '{key}' is given twice, the second time in line 3; keep one"


def test_merged_mappings_may_be_overridden(write) -> None:
    text = "train: {steps: 1}\ndata:\n  sources:\n  - &a {name: a, weight: 2}\n  - {<<: *a, name: b}\n"
    assert [(s.name, s.weight) for s in load(write(text), [], Run).data.sources] == [("a", 2.0), ("b", 2.0)]


def test_missing_file_lists_what_is_there(write, tmp_path: Path) -> None:
    write(GOOD)
    (tmp_path / "other.yml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("")
    path = tmp_path / "rnu.yaml"
    assert sentence(path) == f"config file {path} does not exist; files there: other.yml, run.yaml"
    nowhere = tmp_path / "no" / "run.yaml"
    assert sentence(nowhere) == f"config file {nowhere} does not exist"
    assert sentence(tmp_path) == f"{tmp_path} is a folder, not a config file; files there: other.yml, run.yaml"
    (tmp_path / "empty").mkdir()
    assert sentence(tmp_path / "empty") == f"{tmp_path / 'empty'} is a folder, not a config file"


@pytest.mark.parametrize("text", ["train: {steps: 1", "a: b: c", "? [1, 2]\n: 3", "a: !!python/object:os.system {}"])
def test_bad_yaml(write, text: str) -> None:
    path = write(text)
    assert sentence(path).startswith(f"{path} is not valid YAML: ")


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """What other tests import may have raised it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("depth", [1000, 2000, 5000])
def test_what_is_nested_too_deeply(write, depth: int, usual_recursion_limit: None) -> None:
    value, told = "[" * depth + "]" * depth, "or an override, holds lists or mappings nested too deeply"
    assert told in sentence(write(GOOD), f"train.steps={value}")
    path = write(f"train: {value}\n")
    assert told in sentence(path) and peek(path).keys() <= {"train"}


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert sentence(path).startswith(f"{path} is not valid YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "list"), ("hello", "str")])
def test_not_a_mapping(write, text: str, kind: str) -> None:
    path = write(text)
    assert sentence(path) == f"{path} must hold keys (train), got a {kind}"


def test_an_empty_file(write) -> None:
    path = write("# nothing yet\n")
    assert sentence(path) == f"{path} is empty; it must hold: train"
    with pytest.raises(ValueError, match=r"is empty; it must hold: sources, extra, shuffle$"):
        load(path, [], Data)


def test_one_block(write) -> None:
    path = write(GOOD + "nonsense: 1\n")  # other blocks are another command's business
    train = load(path, ["train.steps=7"], Train, block="train")
    assert train.steps == 7
    with pytest.raises(ValueError, match=r"unknown key 'train\.stepps'; did you mean 'train\.steps'"):
        load(path, ["train.stepps=7"], Train, block="train")
    with pytest.raises(ValueError, match=r"train\.steps: input should be greater"):
        load(path, ["train.steps=0"], Train, block="train")
    with pytest.raises(ValueError, match="no 'tokenizer:' block; this command reads only that block"):
        load(path, [], Train, block="tokenizer")


def test_an_override_of_no_block_is_not_lost_where_one_block_is_read(write) -> None:
    path = write(GOOD)
    assert load(path, ["data.shuffle=false"], Train, block="train").steps == 10
    for override, near in (("trian.steps=7", "did you mean 'train'?"), ("seed=1", "there are: train, data")):
        with pytest.raises(ValueError) as caught:
            load(path, [override], Train, block="train")
        name = override.partition("=")[0].partition(".")[0]
        said = f"override '{override}': {path} has no block '{name}', and only train is read; {near}"
        assert str(caught.value) == said


def test_resolved_config_loads_again_as_it_is(write) -> None:
    run = load(write(GOOD), ["train.rate=1e-7", "data.shuffle=false", "name='10'"], Run)
    text = to_yaml(run)
    assert load(write(text), [], Run) == run
    assert text.index("train:") < text.index("data:") < text.index("name:")  # in the schema's order
    assert "warmup: 0" in text  # defaults are written out
    default = load(write(GOOD), [], Run)
    assert "größe" in to_yaml(default) and load(write(to_yaml(default)), [], Run) == default


def test_libyaml_reads_and_writes_what_pyyaml_does() -> None:
    """Where it is not there, PyYAML's own code takes its place."""
    configs = sorted(Path(__file__).resolve().parents[2].glob("configs/*.yaml"))
    assert len(configs) > 10
    for path in configs:
        raw = yaml.safe_load(path.read_text())
        assert yaml.load(path.read_bytes(), Loader=Loader) == raw
        assert yaml.safe_load(yaml.dump(raw, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)) == raw


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:00:00", "1:00:00"), ("010", "010"), ("1e-3", 0.001), ("12_000_000", 12_000_000), ("0x1f", 31),
        ("-7", -7), (".5", 0.5), ("1.5e3", 1500.0), (".inf", float("inf")), ("1.2.3", "1.2.3"), ("1e3x", "1e3x"),
        ("2026-11-29", "2026-11-29"),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    """PyYAML by itself takes 1:00:00 for 3600, 010 for 8 and 1e-3 for a word."""
    found = yaml.load(text, Loader=Loader)
    assert found == value and type(found) is type(value)
    for written in (text, value):  # and texts that look like numbers come back as texts
        assert yaml.load(yaml.dump(written, Dumper=Dumper), Loader=Loader) == written


def test_a_time_of_day_is_no_number_of_steps(write) -> None:
    path = write(GOOD)
    with pytest.raises(ValueError, match=r"train\.steps: must be a whole number, got '1:00:00'"):
        load(path, ["train.steps=1:00:00"], Run)


def test_there_are_no_comments_on_a_command_line(write) -> None:
    path = write(GOOD)
    assert load(path, ["name=runs/exp #3"], Run).name == "runs/exp #3"
    assert load(path, ["name=#3"], Run).name == "#3" and load(path, ['name="a #3"'], Run).name == "a #3"
    with pytest.raises(
        ValueError, match=r"override 'name=\[a\] #3': # begins a comment, so what follows it would be lost"
    ):
        load(path, ["name=[a] #3"], Run)


def test_loading_does_not_change_the_file(write) -> None:
    path = write(GOOD)
    load(path, ["train.steps=3"], Run)
    assert path.read_text() == GOOD


def test_strict_takes_descriptions_and_freezes(write) -> None:
    assert Train.model_fields["steps"].description == "Steps."
    run = load(write(GOOD), [], Run)
    with pytest.raises(ValueError, match="frozen"):
        run.name = "y"
