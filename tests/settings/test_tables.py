"""Tables as they are printed and written."""

from __future__ import annotations

from settings.tables import aligned_markdown, columns, markdown

ROWS = [["model", "loss"], ["a", "3.1"], ["the other", "12.25"]]


def test_markdown() -> None:
    assert markdown(ROWS) == "| model | loss |\n| --- | --- |\n| a | 3.1 |\n| the other | 12.25 |"


def test_what_is_aligned() -> None:
    assert aligned_markdown(ROWS).splitlines() == [
        "| model     |  loss |",
        "|-----------|------:|",
        "| a         |   3.1 |",
        "| the other | 12.25 |",
    ]
    assert columns(ROWS) == "model       loss\na            3.1\nthe other  12.25"
