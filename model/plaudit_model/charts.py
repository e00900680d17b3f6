"""Charts, tables and the page they stand on, as text: SVG and HTML without scripts, links or a plotting library.

Needs the standard library alone, so that whatever has numbers can show them. Every text is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

COLOURS = ("#3b82f6", "#d97706", "#059669", "#dc2626", "#8b5cf6", "#0891b2", "#65a30d", "#db2777")
"""Readable on white and on black."""
_STROKES = {"line": "stroke-width='2'", "dashed": "stroke-dasharray='5 4'", "faint": "opacity='.35'"}
_LETTER = 6.6  # pixels, at 12px
_FINEST, _DOTS = (
    400,
    12,
)  # more points than twice the one are thinned; so few as the other have a dot each, and so has one between two gaps
_STYLE = """<style>.chart{color:#374151;font:12px system-ui,sans-serif;max-width:100%;height:auto}
@media(prefers-color-scheme:dark){.chart{color:#d1d5db}}</style>"""
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><title>%s</title>
<style>:root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:62rem;
padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}summary{cursor:pointer}p{max-width:48rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%%,26rem),1fr));gap:1.5rem}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid #8884;overflow-wrap:anywhere}
.number{text-align:right;white-space:nowrap}</style>
<h1>%s</h1>
%s
</html>
"""
Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """A curve, `y` over `x`, of one length; None, NaN and infinities leave a gap.

    `low` and `high`, if given, are the ends of an interval around each y: a band, or bars around `points`; where one is
    None, none is drawn. `colour` is a place in `COLOURS`, else the series' own. Without a name it is not in the legend.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers = ()
    high: Numbers = ()
    style: Literal["line", "dashed", "faint", "points"] = "line"
    colour: int | None = None


def chart(series: Sequence[Series], title: str, x_label: str = "", y_label: str = "") -> str:
    """An SVG element, 460 by 300 pixels and more for a long legend. Raises ValueError for columns of a series that have
    other lengths."""
    rows = [list(_thinned(_rows(own))) for own in series]
    known = [row for some in rows for row in some if row]
    (left, right), (low, high) = _range([row[0] for row in known]), _range([v for row in known for v in row[1:]])
    legend, top = _legend(series)
    up = [(value, f"{value:,.10g}") for value in ticks(low, high)]
    begin = 32 + _LETTER * max(len(shown) for _, shown in up)

    def at(x: float, y: float) -> tuple[float, float]:
        return begin + (x - left) / (right - left) * (444 - begin), top + 212 * (high - y) / (high - low)

    drawn = [f"<g font-size='14' font-weight='600'>{_text(6, 18, title, 'start')}</g>", *legend]
    for value, shown in up:
        y = at(left, value)[1]
        drawn.append(f"<path d='M{begin:.1f} {y:.1f}H444' stroke='currentColor' opacity='.15'/>")
        drawn.append(_text(begin - 6, y + 4, shown, "end"))
    for value in ticks(left, right):
        shown = f"{value:,.10g}"
        drawn.append(_text(min(at(value, low)[0], 458 - _LETTER / 2 * len(shown)), top + 230, shown))
    drawn.append(_text((begin + 444) / 2, top + 250, x_label))
    drawn.append(f"<g transform='translate(16 {top + 106}) rotate(-90)'>{_text(0, 0, y_label)}</g>")
    for place, (own, some) in enumerate(zip(series, rows, strict=True)):
        spots = [tuple(at(row[0], value) for value in row[1:]) if row else None for row in some]
        drawn += _shapes(own, spots, _colour(own, place))
    head = f"width='460' height='{top + 258}' viewBox='0 0 460 {top + 258}' role='img'"
    named = f"<svg xmlns='http://www.w3.org/2000/svg' class='chart' {head} aria-label='{html.escape(title)}'>"
    return f"{named}{_STYLE}<g fill='currentColor'>{''.join(drawn)}</g></svg>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; it may go without a head. A column without a letter in it is one of numbers, set to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    texts = [any(map(str.isalpha, "".join(column))) for column in zip(*body, strict=True)]

    def line(kind: str, cells: Sequence[str]) -> str:
        shown = zip(cells, texts or [True] * len(cells), strict=True)
        return "".join(f"<{kind}{'' if text else ' class=number'}>{html.escape(cell)}</{kind}>" for cell, text in shown)

    head = [line("th", columns)] if columns else []
    return f"<table>{''.join(f'<tr>{cells}</tr>' for cells in [*head, *(line('td', row) for row in body)])}</table>"


def page(title: str, *parts: str) -> str:
    """A self-contained HTML page, light or dark as its reader has it. `parts` are HTML; a `<div class="charts">` holds
    charts side by side where there is room."""
    whole = _PAGE % (html.escape(title), html.escape(title), "\n".join(parts))
    return whole.encode(errors="backslashreplace").decode()  # names of files and texts may hold what UTF-8 cannot


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers in [low, high], which are apart: 1, 2 or 5 times a power of ten between them."""
    size = 10.0 ** math.floor(math.log10(high - low))
    step = next(size * part for part in (2, 1, 0.5, 0.2) if high - low >= 2 * size * part)
    return [place * step for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _rows(own: Series) -> Iterator[tuple[float, ...] | None]:
    """(x, y, low, high) of each point, None for a gap."""
    for row in zip(own.x, own.y, own.low or own.y, own.high or own.y, strict=True):
        numbers = [math.nan if value is None else float(value) for value in row]
        if None in row[2:]:
            numbers[2:] = [numbers[1]] * 2
        yield tuple(numbers) if all(map(math.isfinite, numbers)) else None


def _thinned(rows: Iterable[tuple[float, ...] | None]) -> Iterator[tuple[float, ...] | None]:
    """Of many rows the lowest and the highest of each stretch, in their order: no peak is lost; nor is a gap."""
    every = list(rows)
    size = -(-len(every) // _FINEST)
    for start in range(0, len(every), max(size, 1)):
        some = every[start : start + size]
        ends = sorted((row[1], place) for place, row in enumerate(some) if row)
        kept = {place for _, place in (ends if size < 3 else [*ends[:1], *ends[-1:]])}
        yield from (row for place, row in enumerate(some) if place in kept or row is None)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ends that are apart, also around one value or none."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    apart = high - low > 1e-9 * max(abs(low), abs(high))
    return (low, high) if apart else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))


def _legend(series: Sequence[Series]) -> tuple[list[str], int]:
    """Names beside their colours, in as many lines as they take, and where the axes begin."""
    drawn, x, y = [], 8.0, 38
    for place, own in enumerate(series):
        if own.name:
            width = 38 + _LETTER * len(own.name)
            x, y = (8.0, y + 18) if x > 8 and x + width > 460 else (x, y)
            ends = (8,) if own.style == "points" else (0, 16)
            mark = _shapes(replace(own, low=()), [((x + end, y - 4.0),) * 3 for end in ends], _colour(own, place))
            drawn += [*mark, _text(x + 23, y, own.name, "start")]
            x += width
    return drawn, y + 14 if drawn else 34


def _shapes(own: Series, spots: Sequence[tuple[tuple[float, float], ...] | None], colour: str) -> list[str]:
    """The stretches between gaps; a spot is where its y, low and high lie."""
    drawn = []
    for run in ([spot for spot in some if spot] for known, some in groupby(spots, key=bool) if known):
        line, low, high = ([f"{spot[i][0]:.1f},{spot[i][1]:.1f}" for spot in run] for i in range(3))
        if own.style != "points":
            if own.low:
                drawn.append(f"<polygon points='{' '.join(low + high[::-1])}' fill='{colour}' opacity='.15'/>")
            stroke = f"stroke='{colour}' {_STROKES[own.style]}"
            drawn.append(f"<polyline points='{' '.join(line)}' fill='none' {stroke}/>")
        elif own.low:
            drawn += [f"<path d='M{a}L{b}' stroke='{colour}' opacity='.6'/>" for a, b in zip(low, high, strict=True)]
        if own.style == "points" or (own.style == "line" and (len(own.x) <= _DOTS or len(run) == 1)):
            drawn += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for (x, y), *_ in run]
    return drawn


def _colour(own: Series, place: int) -> str:
    return COLOURS[(place if own.colour is None else own.colour) % len(COLOURS)]


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{html.escape(words)}</text>"
