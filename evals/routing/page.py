"""The routing report as one HTML page: style and charts inside, no script, nothing fetched, readable on paper.

:func:`page` fills a :class:`RoutingReport`, numbers and words, into ``page.html``, which escapes whatever comes from a
model or a text; ``page.css`` is its style. Darker is more, everywhere: the scale is a single blue whose lightness falls
step by step, so it can be read by colour-blind people and in black and white.

Dimension letters: S routed sites, E logged steps, G token classes, k late layers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.tokenization import WORD_START

_BLUES = ("f7fbff", "deebf7", "c6dbef", "9ecae1", "6baed6", "4292c6", "2171b5", "08519c", "08306b")
_STEPS = len(_BLUES) - 1
_DARK_FROM = 6  # white letters from here on: black ones would have too little contrast
_HERE = Path(__file__).parent
_ENOUGH = 30
"""Tokens that a row needs to be called the lowest or the highest."""
LEARNED = "a small learned switch, the router, decides from the token and what stands before it whether it runs"
"""What :attr:`Routing.how` says of learned routers."""
_JOINERS = "\u200c\u200d"
_BYTE = re.compile(r"<0x([0-7][0-9A-Fa-f])>")  # one that is a whole character
_MARKS = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍", WORD_START: " "}


@dataclass(frozen=True)
class Bar:
    """A row of a chart: how often a kind of token executed.

    Attributes:
        label: what the tokens have in common.
        share: of their decisions that were to execute, 0 to 1.
        tokens: how many there are.
        note: more about the label; may be empty.
    """

    label: str
    share: float
    tokens: int
    note: str = ""


@dataclass(frozen=True)
class ShownToken:
    """A token of the shown text.

    Attributes:
        piece: as the tokenizer writes it.
        text: to be read; the piece, unless that is a byte of a longer character.
        used: routed sites that executed it.
        where: which ones, in words; empty for none.
        ends: it closes a document.
    """

    piece: str
    text: str
    used: int
    where: str
    ends: bool = False


@dataclass(frozen=True)
class History:
    """Densities over training.

    Attributes:
        steps: E optimiser steps.
        densities: [S][E], each site's.
        targets: [E], the budget's.
    """

    steps: list[int]
    densities: list[list[float]]
    targets: list[float]


@dataclass(frozen=True)
class Votes:
    """Mean weights of the late layers.

    Attributes:
        layers: k names.
        classes: names of the G classes of predicted tokens that occur, then ``all``.
        tokens: [G + 1], how many there are of each.
        weights: [G + 1][k].
    """

    layers: list[str]
    classes: list[str]
    tokens: list[int]
    weights: list[list[float]]


@dataclass(frozen=True)
class Routing:
    """What the routers did on the sample.

    Attributes:
        how: how it is decided, the end of a sentence that begins "For every token and every layer".
        unit: what a site is, in the plural: ``layers`` or ``modules``.
        always: layers that have no router and run for every token.
        sites: names of the S sites.
        target: the density that training aimed at.
        mean: executed share of all decisions.
        text: passages, each its heading and its tokens.
        by_site, by_position, by_class, by_frequency: the charts.
        most, least: frequent tokens with the largest and the smallest share.
        history: None where no metrics of the training are available.
    """

    how: str
    unit: str
    always: int
    sites: list[str]
    target: float
    mean: float
    text: list[tuple[str, list[ShownToken]]]
    by_site: list[Bar]
    by_position: list[Bar]
    by_class: list[Bar]
    by_frequency: list[Bar]
    most: list[Bar]
    least: list[Bar]
    history: History | None


@dataclass(frozen=True)
class RoutingReport:
    """All that the page says.

    Attributes:
        name: of the model.
        facts: pairs of a label and a value, for the table on top.
        layers: the model's.
        routing: None for a model without routers.
        votes: None for a model without a late-layer ensemble.
    """

    name: str
    facts: list[tuple[str, str]]
    layers: int
    routing: Routing | None
    votes: Votes | None


def page(report: RoutingReport) -> str:
    """The whole document."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"level": level, "visible": visible}
    helpers: dict[str, Any] = {"takeaway": _takeaway, "legend": _legend, "points": _points, "LEARNED": LEARNED}
    return environment.get_template("page.html").render(
        report=report, style=_style(), space=WORD_START, enough=_ENOUGH, **helpers
    )


def level(share: float) -> int:
    """Which of the scale's steps, 0 to 8, a share from 0 to 1 has."""
    return min(max(int(share * _STEPS + 0.5), 0), _STEPS)


def visible(piece: str) -> str:
    """A piece as it is shown: a space where it stands for one, a symbol for what is invisible.

    Characters that would affect the page's text, such as those that change its direction, are spelt out; so are bytes
    that are only a part of a character.
    """
    byte = _BYTE.fullmatch(piece)
    if byte is not None:
        piece = chr(int(byte[1], 16))
    return "".join(_MARKS.get(sign) or _spelt(sign) for sign in piece)


def _spelt(sign: str) -> str:
    acts = unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and sign not in _JOINERS
    return f"<U+{ord(sign):04X}>" if acts else sign


def _legend(total: int) -> list[tuple[int, list[int]]]:
    """Every colour that a count from 0 to ``total`` can have, and the counts that have it."""
    counts: dict[int, list[int]] = {}
    for used in range(total + 1):
        counts.setdefault(level(used / total), []).append(used)
    return list(counts.items())


def _takeaway(bars: Sequence[Bar]) -> tuple[Bar, Bar, bool] | None:
    """The rows with the lowest and the highest share, of those with enough tokens to tell, and whether all have."""
    known = [bar for bar in bars if bar.tokens >= _ENOUGH]
    if len(known) < 2:
        return None
    return min(known, key=lambda bar: bar.share), max(known, key=lambda bar: bar.share), len(known) == len(bars)


def _points(values: Sequence[float]) -> str:
    """Points of a line in a picture of 100 x 40, from shares."""
    last = max(len(values) - 1, 1)
    return " ".join(f"{100 * place / last:.1f},{40 - 40 * value:.1f}" for place, value in enumerate(values))


def _style() -> str:
    colours = "".join(
        f".c{step}{{background:#{colour};color:{'#fff' if step >= _DARK_FROM else '#000'}}}"
        for step, colour in enumerate(_BLUES)
    )
    return "\n" + (_HERE / "page.css").read_text(encoding="utf-8") + colours
