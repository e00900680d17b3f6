"""Line charts as SVG, without a plotting library: panels side by side, each with lines, bands and points."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#65a30d", "#be185d")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 380, 300, 52, 30, 44


@dataclass
class Panel:
    """One set of axes. x and y are plain numbers; a colour is a place in `COLOURS`."""

    title: str
    across: str
    up: str
    parts: list[tuple[str, np.ndarray, np.ndarray, int, str]] = field(default_factory=list)

    def line(self, name: str, x: np.ndarray, y: np.ndarray, colour: int, *, dashed: bool = False) -> None:
        self.parts.append((name, np.asarray(x, float), np.asarray(y, float), colour, "dashed" if dashed else "line"))

    def band(self, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: int) -> None:
        self.parts.append(("", np.concatenate([x, x[::-1]]), np.concatenate([low, high[::-1]]), colour, "band"))

    def point(self, name: str, x: float, y: tuple[float, float, float], colour: int) -> None:
        """A value with the low and the high end of its interval."""
        self.parts.append((name, np.full(3, float(x)), np.array(y, float), colour, "point"))

    def svg(self, place: int) -> str:
        xs, ys = (np.concatenate([part[axis] for part in self.parts]) for axis in (1, 2))
        low_x, high_x, low_y, high_y = xs.min(), xs.max(), ys.min(), ys.max()
        shift = place * WIDTH

        def at(x: float, y: float) -> tuple[float, float]:
            right = (x - low_x) / ((high_x - low_x) or 1) * (WIDTH - LEFT - 16)
            height = (y - low_y) / ((high_y - low_y) or 1) * (HEIGHT - TOP - BOTTOM)
            return shift + LEFT + right, HEIGHT - BOTTOM - height

        drawn = [f'<text x="{shift + LEFT}" y="18" font-weight="bold">{html.escape(self.title)}</text>']
        for value in ticks(low_y, high_y):
            (x0, y), (x1, _) = at(low_x, value), at(high_x, value)
            drawn.append(f'<line x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            drawn.append(f'<text x="{x0 - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for value in ticks(low_x, high_x):
            x, y = at(value, low_y)
            drawn.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:g}</text>')
        middle = shift + (LEFT + WIDTH) / 2
        drawn.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(self.across)}</text>')
        if self.up:
            x, y = shift + 12, (TOP + HEIGHT - BOTTOM) / 2
            turned = (
                f'<text transform="translate({x},{y}) rotate(-90)" text-anchor="middle">{html.escape(self.up)}</text>'
            )
            drawn.append(turned)
        for name, x_N, y_N, colour, kind in self.parts:
            drawn.append(shape([at(x, y) for x, y in zip(x_N, y_N, strict=True)], COLOURS[colour % len(COLOURS)], kind))
            drawn[-1] += f"<!-- {html.escape(name)} -->" if name else ""
        return "".join(drawn)


def shape(spots: list[tuple[float, float]], colour: str, kind: str) -> str:
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    if kind == "band":
        return f'<polygon points="{way}" fill="{colour}" opacity=".15"/>'
    if kind == "point":
        (x, y), (_, low), (_, high) = spots
        bar = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-width="1.5"/>'
        return f'{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    dash = ' stroke-dasharray="5 4"' if kind == "dashed" else ""
    return f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within the range."""
    step = 10.0 ** np.floor(np.log10((high - low) or 1))
    step = next(step * part for part in (1, 0.5, 0.2, 0.1) if (high - low) / (step * part) >= 3)
    return [round(float(value), 10) for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def write(path: Path, panels: list[Panel]) -> None:
    """Panels side by side, and below them what each colour is."""
    names = {name: (colour, kind) for panel in panels for name, _, _, colour, kind in panel.parts if name}
    legend, x = [], float(LEFT)
    for name, (colour, kind) in names.items():
        mark = "●" if kind == "point" else "╌" if kind == "dashed" else "—"
        legend.append(f'<text x="{x:.0f}" y="{HEIGHT + 16}" fill="{COLOURS[colour]}">{mark} {html.escape(name)}</text>')
        x += 30 + 6.4 * len(name)
    width = max(len(panels) * WIDTH, int(x))
    body = "".join(panel.svg(place) for place, panel in enumerate(panels)) + "".join(legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    style = 'font-family="system-ui, sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 28}" {style}>'
    path.write_text(f'{head}<rect width="100%" height="100%" fill="white"/>{body}</svg>\n', encoding="utf-8")
