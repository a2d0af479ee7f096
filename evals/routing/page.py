"""The routing report as one HTML page: style and charts inside, no script, nothing fetched, readable on paper.

:func:`page` turns a :class:`RoutingReport`, numbers and words, into text. Everything that comes from a model or a text
goes through :func:`escape`. Darker is more, everywhere: the scale is a single blue whose lightness falls step by step,
so it can be read by colour-blind people and in black and white.

Dimension letters: S routed sites, E logged steps, G token classes, k late layers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from data.tokenization import WORD_START

_BLUES = ("f7fbff", "deebf7", "c6dbef", "9ecae1", "6baed6", "4292c6", "2171b5", "08519c", "08306b")
_STEPS = len(_BLUES) - 1
_DARK_FROM = 6  # white letters from here on: black ones would have too little contrast
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
        history: None where no metrics of the training are at hand.
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
    parts = [f"<h1>Which layers do the tokens use?</h1>\n<p class=sub>{escape(report.name)}</p>"]
    parts.append(_introduction(report))
    if report.routing is not None:
        parts += [_text(report.routing), _charts(report.routing), _extremes(report.routing)]
        if report.routing.history is not None:
            parts.append(_history(report.routing.sites, report.routing.history))
    if report.votes is not None:
        parts.append(_votes(report.votes))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Routing of {escape(report.name)}</title>\n<style>{_style()}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def level(share: float) -> int:
    """Which of the scale's steps, 0 to 8, a share from 0 to 1 has."""
    return min(max(int(share * _STEPS + 0.5), 0), _STEPS)


def visible(piece: str) -> str:
    """A piece as it is shown: a space where it stands for one, a sign for what cannot be seen.

    Signs that would act on the page's text, as those that turn its direction, are spelt out; so are bytes that are
    only a part of a character.
    """
    byte = _BYTE.fullmatch(piece)
    if byte is not None:
        piece = chr(int(byte[1], 16))
    return "".join(_MARKS.get(sign) or _spelt(sign) for sign in piece)


def _spelt(sign: str) -> str:
    acts = unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and sign not in _JOINERS
    return f"<U+{ord(sign):04X}>" if acts else sign


def _introduction(report: RoutingReport) -> str:
    rows = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>\n" for label, value in report.facts)
    words = (
        "<p>This model has no routers: every token runs every layer, so there is nothing to show about skipping.</p>"
        if report.routing is None
        else _explanation(report.routing, report.layers)
    )
    return f"<h2>What this is</h2>\n{words}\n<table class=facts>\n{rows}</table>"


def _explanation(routing: Routing, layers: int) -> str:
    """How to read the page, in plain words."""
    always = f" {routing.always} of the layers have no router and run for every token." if routing.always else ""
    modules = (
        " Each layer has two modules, attention (looks at earlier tokens) and ffn (works on the token alone), which "
        "are decided on separately."
        if routing.unit == "modules"
        else ""
    )
    worth = (
        " Training leaves out what costs the answers least, so a token that runs few layers is not a worse one."
        if routing.how == LEARNED
        else ""
    )
    return (
        "<p>A language model reads text in small pieces called <b>tokens</b>: short words, parts of words, digits, "
        f"punctuation marks. An ordinary model sends every token through all of its layers, here {layers}. This one "
        "may leave some out, which saves computing. For every token and every layer, "
        f"{escape(routing.how)}.{modules}{always}</p>\n"
        "<p>A layer that runs for a token has <b>executed</b> it; otherwise the token <b>skipped</b> the layer. The "
        "<b>density</b> is the share of tokens that were executed: 0.50 means every second one. Training aimed at "
        f"{routing.target:.2f}; on the text of this page it was {routing.mean:.2f}. On this page darker always means "
        f"more.{worth}</p>"
    )


def _text(routing: Routing) -> str:
    total = len(routing.sites)
    shown = []
    for heading, tokens in routing.text:
        spans = "".join(_span(token, total, routing.unit) for token in tokens)
        shown.append(f"<h3>{escape(heading)}</h3>\n<p class=text>{spans}</p>")
    joined = "\n".join(shown)
    return (
        f"<h2>A text, token by token</h2>\n<p>The colour says how many of the {total} {routing.unit} with a router ran "
        "for a token. Hold the mouse over one to see which. ↵ is a line break, ⇥ a tab, ∎ the end of a document; · "
        "goes on with the character before it, which is spelt in several tokens.</p>\n"
        f"{_legend(total, routing.unit)}\n{joined}"
    )


def _span(token: ShownToken, total: int, unit: str) -> str:
    text = "∎\n" if token.ends else visible(token.text) or "�"
    title = f"{visible(token.piece).replace(' ', WORD_START)} – {token.used} of {total} {unit}"
    title += f": {token.where}" if token.where else ""
    return f'<i class=c{level(token.used / total)} title="{escape(title)}">{escape(text)}</i>'


def _legend(total: int, unit: str) -> str:
    """A swatch for every colour that a count from 0 to ``total`` can have."""
    counts: dict[int, list[int]] = {}
    for used in range(total + 1):
        counts.setdefault(level(used / total), []).append(used)
    swatches = "".join(
        f"<i class=c{step}>&nbsp;{used[0] if len(used) == 1 else f'{used[0]}–{used[-1]}'}&nbsp;</i>"
        for step, used in counts.items()
    )
    return f"<p class=legend>{swatches} {unit} used</p>"


def _charts(routing: Routing) -> str:
    unit = routing.unit
    return "\n".join(
        [
            f"<h2>Where tokens are executed</h2>\n<p>Bars run from 0 to 1; the line marks the target, "
            f"{routing.target:.2f}.</p>",
            _chart(f"By {unit.removesuffix('s')}", unit, routing.by_site, routing.target),
            _chart("By position in the window, from its first token on", "positions", routing.by_position,
                   routing.target),
            _chart("By class of token", "classes", routing.by_class, routing.target),
            _chart("By how often a token occurs in this text, a tenth of the text in each row", "tenths",
                   routing.by_frequency, routing.target),
        ]
    )  # fmt: skip


def _chart(title: str, rows: str, bars: Sequence[Bar], target: float) -> str:
    return f"<h3>{escape(title)}</h3>\n{_takeaway(rows, bars)}\n{_bars(bars, target)}"


def _takeaway(rows: str, bars: Sequence[Bar]) -> str:
    """The extremes in words, of rows with enough tokens to tell."""
    told = [bar for bar in bars if bar.tokens >= _ENOUGH]
    if len(told) < 2:
        return ""
    low, high = min(told, key=lambda bar: bar.share), max(told, key=lambda bar: bar.share)
    of = "" if len(told) == len(bars) else f" of the {rows} with at least {_ENOUGH} tokens"
    return (
        f"<p>Lowest{of}: <b>{escape(low.label)}</b> ({low.share:.2f}); highest: <b>{escape(high.label)}</b> "
        f"({high.share:.2f}).</p>"
    )


def _bars(bars: Sequence[Bar], target: float) -> str:
    rows = []
    for bar in bars:
        note = f" <small>{escape(bar.note)}</small>" if bar.note else ""
        picture = (
            '<svg class=bar viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class=back width=100 height=10 /><rect class=full width="{100 * bar.share:.1f}" height=10 />'
            f'<path class=aim d="M{100 * target:.1f} 0v10"/></svg>'
        )
        rows.append(
            f"<tr><th>{escape(bar.label)}{note}</th><td class=wide>{picture}</td><td>{bar.share:.3f}</td>"
            f"<td>{bar.tokens:,}</td></tr>"
        )
    head = "<tr><th></th><td class=wide></td><td>density</td><td>tokens</td></tr>"
    return f"<table class=chart><thead>{head}</thead>\n" + "\n".join(rows) + "\n</table>"


def _extremes(routing: Routing) -> str:
    if not routing.most:
        return ""
    return (
        "<h3>Frequent tokens that are executed most and least</h3>\n"
        f"<p>{WORD_START} stands for a space, and the words behind a token for its class.</p>\n"
        f"<div class=pair><div><h4>Most</h4>{_bars(routing.most, routing.target)}</div>\n"
        f"<div><h4>Least</h4>{_bars(routing.least, routing.target)}</div></div>"
    )


def _history(sites: Sequence[str], history: History) -> str:
    rows = []
    for site, values in zip(sites, history.densities, strict=True):
        lines = _polyline("aim", history.targets) + _polyline("curve", values)
        picture = (
            '<svg class=line viewBox="0 0 100 40" preserveAspectRatio="none" aria-hidden="true">'
            f"<rect class=back width=100 height=40 />{lines}</svg>"
        )
        middle = values[len(values) // 2]
        numbers = "".join(f"<td>{value:.2f}</td>" for value in (values[0], middle, values[-1]))
        rows.append(f"<tr><th>{escape(site)}</th><td class=wide>{picture}</td>{numbers}</tr>")
    joined = "\n".join(rows)
    steps = history.steps
    marks = "".join(f"<td>step {step:,}</td>" for step in (steps[0], steps[len(steps) // 2], steps[-1]))
    return (
        "<h2>Densities over training</h2>\n"
        f"<p>Each picture runs from step {steps[0]:,} to {steps[-1]:,}, left to right, and from 0 to 1, bottom to top; "
        "the broken line is the target. In training the routers may decide with noise added, so the last values can "
        "differ from those above.</p>\n"
        f"<table class=chart><thead><tr><th></th><td class=wide></td>{marks}</tr></thead>\n{joined}\n</table>"
    )


def _polyline(name: str, values: Sequence[float]) -> str:
    last = max(len(values) - 1, 1)
    points = " ".join(f"{100 * place / last:.1f},{40 - 40 * value:.1f}" for place, value in enumerate(values))
    return f'<polyline class={name} points="{points}"/>'


def _votes(votes: Votes) -> str:
    head = "".join(f"<td>{escape(name)}</td>" for name in votes.layers)
    rows = []
    for name, tokens, weights in zip(votes.classes, votes.tokens, votes.weights, strict=True):
        cells = "".join(f"<td class=c{level(weight)}>{weight:.2f}</td>" for weight in weights)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}<td>{tokens:,}</td></tr>")
    joined = "\n".join(rows)
    return (
        "<h2>How the last layers vote</h2>\n"
        f"<p>The last {len(votes.layers)} layers each say what they expect as the next token, and the answer is their "
        "weighted mean. Below is the mean weight of each layer, by the class of the token that is to be predicted; a "
        "row adds up to 1.</p>\n"
        f"<table class=grid><thead><tr><th></th>{head}<td>tokens</td></tr></thead>\n{joined}\n</table>"
    )


def _style() -> str:
    colours = "".join(
        f".c{step}{{background:#{colour};color:{'#fff' if step >= _DARK_FROM else '#000'}}}"
        for step, colour in enumerate(_BLUES)
    )
    return _CSS + colours


_CSS = """
*{box-sizing:border-box;-webkit-print-color-adjust:exact;print-color-adjust:exact}
body{margin:0;background:#fff;color:#111;font:16px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0}
h2{font-size:1.3rem;margin:2.6rem 0 .5rem;padding-top:.6rem;border-top:2px solid #08306b}
h3{font-size:1.02rem;margin:1.7rem 0 .2rem} h4{margin:.6rem 0 .2rem}
p{margin:.4rem 0 .7rem;max-width:46rem} .sub{color:#444;overflow-wrap:anywhere} small{color:#555;font-weight:400}
table{border-collapse:collapse;font-variant-numeric:tabular-nums} td{text-align:right}
th{text-align:left;font-weight:500} th,td{padding:.14rem .6rem .14rem 0;vertical-align:middle}
.facts td{text-align:left;overflow-wrap:anywhere} .facts tr{border-bottom:1px solid #ddd}
.chart{width:100%} .chart th{white-space:nowrap;width:1%;padding-right:1rem} .chart td{width:1%;white-space:nowrap}
.chart td.wide{width:98%;padding-right:.8rem} thead td{color:#555;font-size:.85rem}
.bar{display:block;width:100%;height:.95rem} .line{display:block;width:100%;height:2.6rem}
.back{fill:#eef1f5} .full{fill:#2171b5} .aim,.curve{fill:none;vector-effect:non-scaling-stroke}
.aim{stroke:#111;stroke-width:1.5} .line .aim{stroke-dasharray:4 4;stroke-width:1} .curve{stroke:#08519c;stroke-width:2}
.grid td{padding:.2rem .7rem;border:1px solid #fff} .grid thead td{padding:.2rem .7rem}
.text{max-width:none;margin:.3rem 0 1rem;padding:.7rem .8rem;border:1px solid #ccc;white-space:pre-wrap;
overflow-wrap:anywhere;line-height:1.85;font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.9rem}
.text i,.legend i{font-style:normal;padding:.1rem 0;border-bottom:1px solid #999;border-right:1px solid #fff;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.legend{position:sticky;top:0;background:#fff;padding:.4rem 0;margin:0;max-width:none}
.pair{display:flex;flex-wrap:wrap;gap:0 2rem} .pair>div{flex:1 1 24rem;min-width:0}
"""
