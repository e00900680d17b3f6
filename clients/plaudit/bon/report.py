"""The report on a scored file: numbers with their names, as an object, as lines, and as a page with a chart."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from random import Random
from statistics import fmean
from typing import Any

from .scored import Group, Reading, Sample
from .statistics import common_size, curve, fit, in_order, kl_upper_bound
from .texts import distinct, pearson, quantiles, refuses, self_bleu, words

_DIVERSITY_PROMPTS = 200
_WIDTH, _HEIGHT, _MARGIN = 760, 400, 60
_COLOURS = {"score": "#2563eb", "gold": "#d97706"}
_PAGE = """<!doctype html><meta charset="utf-8"><title>plaudit bon report</title>
<style>body{{font:15px system-ui;margin:2rem auto;max-width:56rem}}text{{font:12px system-ui}}</style>
<h1>{}</h1>{}<pre>{}</pre>
"""


def build(reading: Reading, columns: Sequence[str], *, n_max: int | None, resamples: int, seed: int) -> dict[str, Any]:
    """Everything the report says. `columns`: the score, and the gold score if there is one."""
    everything = [sample for group in reading.groups for sample in group.samples]
    usable = [[sample for sample in group.samples if not sample.failure] for group in reading.groups]
    best = [min(own, key=lambda sample: (-sample.numbers[0], sample.index)) for own in usable if own]
    generated = [sample for sample in everything if sample.response is not None]
    failed = reading.failures.total()
    return {
        "prompts": len(reading.groups),
        "samples": len(everything),
        "scorers": reading.scorers,
        "failed": {"samples": failed, "share": _share(failed, everything), **reading.failures},
        "best_of_n": _best_of_n(usable, columns, n_max, resamples, seed),
        "diversity": _diversity(reading.groups, seed),
        "length": _lengths(usable, best),
        "refusals": {
            "share": _share(sum(refuses(sample.response or "") for sample in generated), generated),
            "share_of_the_best": _share(sum(refuses(sample.response or "") for sample in best), best),
        },
        "cut_by_the_token_limit": _share(sum(sample.cut for sample in generated), generated),
    }


def _best_of_n(
    usable: Sequence[Sequence[Sample]], columns: Sequence[str], n_max: int | None, resamples: int, seed: int
) -> dict[str, Any]:
    """Over the prompts that have `n_max` samples: the same ones at every n."""
    size = n_max or common_size([len(own) for own in usable])
    kept = [own for own in usable if len(own) >= max(size, 1)]
    numbers = [in_order(*([s.numbers[place] for s in own] for place in range(len(columns)))) for own in kept]
    ordered = dict(zip(("score", "gold")[: len(columns)], zip(*numbers, strict=True), strict=False))
    curves = {name: curve(own, size) for name, own in ordered.items()}
    fits = {name: fit(own, size, resamples=resamples, seed=seed) for name, own in ordered.items()}
    points: list[dict[str, Any]] = [
        {"n": n, "kl_upper_bound": kl_upper_bound(n)}
        | {name: own[n - 1][0] for name, own in curves.items()}
        | {f"{name}_error": own[n - 1][1] for name, own in curves.items()}
        for n in range(1, size + 1 if kept else 1)
    ]
    return {
        "n_max": size,
        "prompts": len(kept),
        "prompts_with_fewer_samples": len(usable) - len(kept),
        "curve": points,
        "fit": {name: asdict(found) if found else None for name, found in fits.items()},
    }


def _diversity(groups: Sequence[Group], seed: int) -> dict[str, Any]:
    """Means over the prompts with several responses; at most `_DIVERSITY_PROMPTS` of them, drawn with the seed."""
    texts = [[words(s.response) for s in group.samples if s.response is not None] for group in groups]
    several = [own for own in texts if len(own) > 1]
    drawn = Random(seed).sample(several, min(len(several), _DIVERSITY_PROMPTS))
    found = {f"distinct_{n}": _mean([distinct(own, n) for own in drawn]) for n in (1, 2, 3)}
    return {"prompts": len(drawn), **found, "self_bleu_4": _mean([self_bleu(own) for own in drawn])}


def _lengths(usable: Sequence[Sequence[Sample]], best: Sequence[Sample]) -> dict[str, Any]:
    """Lengths in characters, and Pearson correlations of length and score."""
    pairs = [[(len(sample.response or ""), sample.numbers[0]) for sample in own] for own in usable]
    pooled = [pair for own in pairs for pair in own]
    return {
        "characters": quantiles([length for length, _ in pooled]),
        "characters_of_the_best": quantiles([len(sample.response or "") for sample in best]),
        "tokens": quantiles([sample.tokens for own in usable for sample in own if sample.tokens is not None]),
        "correlation_with_score": pearson(pooled),
        "correlation_with_score_within_prompts": _mean([pearson(own) for own in pairs]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _share(part: int, whole: Sequence[Any]) -> float | None:
    return part / len(whole) if whole else None


def lines(found: Any, name: str = "") -> Iterator[str]:
    """One line a number; of the curve, the powers of two and the end."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from lines(value, f"{name}.{key}" if name else key)
    elif isinstance(found, list):
        for point in found:
            if point["n"].bit_count() == 1 or point is found[-1]:
                yield "  ".join(f"{key} {_shown(value)}" for key, value in point.items() if value is not None)
    else:
        yield f"{name}: {_shown(found)}"


def page(found: Mapping[str, Any], title: str) -> str:
    """The report as one HTML file without scripts or links."""
    text = "\n".join(lines(found))
    return _PAGE.format(html.escape(title), _chart(found["best_of_n"]["curve"]), html.escape(text))


def _chart(points: Sequence[Mapping[str, Any]]) -> str:
    """Score and gold score, with a band of two standard errors, over sqrt(KL upper bound)."""
    names = [name for name in _COLOURS if points and name in points[0]]
    ends = [p[name] + side * (p[f"{name}_error"] or 0) for name in names for p in points for side in (-2, 2)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    right = math.sqrt(points[-1]["kl_upper_bound"]) if points else 0.0

    def at(point: Mapping[str, Any], value: float) -> tuple[float, float]:
        across = math.sqrt(point["kl_upper_bound"]) / (right or 1)
        up = (value - low) / ((high - low) or 1)
        return _MARGIN + across * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN)

    def way(name: str, side: int) -> list[str]:
        return ["{:.1f},{:.1f}".format(*at(p, p[name] + side * (p[f"{name}_error"] or 0))) for p in points]

    parts = []
    for place, name in enumerate(names):
        band, line, colour = " ".join(way(name, 2) + way(name, -2)[::-1]), " ".join(way(name, 0)), _COLOURS[name]
        parts.append(f'<polygon points="{band}" fill="{colour}" opacity=".15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_MARGIN + 80 * place}" y="30" fill="{colour}">{name}</text>')
    ticks = [(at(p, low)[0], _HEIGHT - _MARGIN + 18, f"n={p['n']}") for p in points if p["n"].bit_count() == 1]
    ticks += [(4, _HEIGHT - _MARGIN, f"{low:.4g}"), (4, _MARGIN, f"{high:.4g}")]
    ticks.append((_WIDTH / 3, _HEIGHT - 12, "sqrt(KL upper bound in nats)"))
    parts += [f'<text x="{x:.0f}" y="{y}">{text}</text>' for x, y, text in ticks]
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="best of n">{"".join(parts)}</svg>'


def _shown(value: Any) -> str:
    return "not computable" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
