"""Overrides before, between and behind the other arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from settings import parse_arguments, positive_number, whole_number


def parser(nargs: str | None = None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("config", nargs=nargs)
    made.add_argument("overrides", nargs="*")
    made.add_argument("--workers", type=int)
    return made


@pytest.mark.parametrize(
    "words",
    [
        "c.yaml a=1 b=x//y/ --workers 2",
        "c.yaml --workers 2 a=1 b=x//y/",
        "a=1 c.yaml b=x//y/ --workers 2",
        "a=1 --workers 2 b=x//y/ c.yaml",
        "--workers 2 a=1 b=x//y/ -- c.yaml",
    ],
)
def test_overrides_stand_anywhere(words: str) -> None:
    options = parse_arguments(parser(), words.split())
    assert (options.config, options.overrides, options.workers) == (Path("c.yaml"), ["a=1", "b=x//y/"], 2)


def test_without_any_word_the_config_alone_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(parser(), [])
    assert capsys.readouterr().err.endswith("error: give a config, for example: configs/mine.yaml\n")
    assert parse_arguments(parser("?"), []).config is None


def test_a_file_named_like_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.yaml").write_text("")
    options = parse_arguments(parser(), ["a=1", "lr=1.yaml"])
    assert (options.config, options.overrides) == (Path("lr=1.yaml"), ["a=1"])


def test_an_override_longer_than_any_name() -> None:
    override = f"a={'x' * 5000}"
    options = parse_arguments(parser(), [override, "c.yaml"])
    assert (options.config, options.overrides) == (Path("c.yaml"), [override])


def test_nothing_but_overrides_is_left_to_say_that_there_is_no_such_file() -> None:
    options = parse_arguments(parser(), ["a=1", "b=2"])
    assert (options.config, options.overrides) == (Path("a=1"), ["b=2"])
    assert parse_arguments(parser("?"), []).config is None


def test_a_variable_that_is_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(parser(), ["$UNSET_HERE/c.yaml"])
    assert "the environment variable $UNSET_HERE is not set" in capsys.readouterr().err


@pytest.mark.parametrize(("least", "text"), [(1, "0"), (1, "-3"), (0, "-1"), (1, "2.5"), (1, "")])
def test_a_count_below_its_least_is_one_sentence(least: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = argparse.ArgumentParser()
    made.add_argument("--rounds", type=whole_number(least))
    with pytest.raises(SystemExit):
        made.parse_args([f"--rounds={text}"])
    told = capsys.readouterr().err
    assert f"error: argument --rounds: must be a whole number, at least {least}, got '{text}'\n" in told
    assert made.parse_args([f"--rounds={least}"]).rounds == least


@pytest.mark.parametrize("text", ["0", "-0.5", "nan", "inf", "-inf", "2.1", "two", ""])
def test_a_number_that_is_not_above_zero_or_beyond_its_most_is_one_sentence(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = argparse.ArgumentParser()
    made.add_argument("--share", type=positive_number(2))
    with pytest.raises(SystemExit):
        made.parse_args([f"--share={text}"])
    told = capsys.readouterr().err
    assert f"error: argument --share: must be a number above 0, at most 2, got '{text}'\n" in told
    assert [made.parse_args([f"--share={text}"]).share for text in ("1e-9", "2")] == [1e-9, 2.0]
