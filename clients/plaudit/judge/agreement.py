"""Whether a judge can be trusted: Cohen's kappa with people, and what its own answers say about it. Pure.

Judge and people are compared on the rows whose label a trainer would use: audited rows are a random share of those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .._row_files import digest, json_rows, located
from ..errors import InvalidInput
from .verdicts import OUTCOMES

Rating = tuple[str, str]
"""What the judge says of a comparison, and what a person says."""


@dataclass(frozen=True, slots=True)
class Kappa:
    """Cohen's kappa (1960) and its 95% interval by bootstrap over comparisons; None where it is not defined: one
    label alone was used by both. `confusion`: judge's label, then people's."""

    comparisons: int
    ratings: int
    agreement: float | None
    kappa: float | None
    low: float | None
    high: float | None
    confusion: Mapping[str, Mapping[str, int]]


def cohen_kappa(ratings: Sequence[Rating]) -> float | None:
    """(observed - expected) / (1 - expected) agreement; None where that is 0 / 0."""
    total = len(ratings)
    judge, people = (Counter(rating[side] for rating in ratings) for side in (0, 1))
    matches = sum(one == other for one, other in ratings)
    expected = sum(judge[name] * people[name] for name in judge)  # of total squared: in integers, so that 1 is exact
    return (matches * total - expected) / (total * total - expected) if expected < total * total else None


def kappa_of(comparisons: Sequence[Sequence[Rating]], *, resamples: int, seed: int) -> Kappa:
    """Kappa of several comparisons, each with the ratings it got; resamples in which it is not defined are left out."""
    ratings = [rating for own in comparisons for rating in own]
    random, draws = Random(seed), list[float]()
    for _ in range(resamples if ratings else 0):
        drawn = cohen_kappa([rating for own in random.choices(comparisons, k=len(comparisons)) for rating in own])
        draws += [] if drawn is None else [drawn]
    draws.sort()
    low, high = (draws[round(share * (len(draws) - 1))] if draws else None for share in (0.025, 0.975))
    names: tuple[str, ...] = OUTCOMES
    confusion = {name: {other: ratings.count((name, other)) for other in names} for name in names}
    agreement = sum(one == other for one, other in ratings) / len(ratings) if ratings else None
    return Kappa(len(comparisons), len(ratings), agreement, cohen_kappa(ratings), low, high, confusion)


def content_key(row: Mapping[str, Any]) -> str:
    """Which comparison a row is about, whoever labelled it."""
    return digest([row.get("prompt"), row.get("response_a"), row.get("response_b")])


def read_people(lines: Iterable[bytes]) -> tuple[dict[str, list[str]], int]:
    """What people say of each comparison, by `content_key`, and how many rows have no label yet. Raises InvalidInput
    for a label that is not a, b or tie."""
    found: dict[str, list[str]] = {}
    open_ = 0
    for _, where, row in json_rows(lines):
        said = row.get("label")
        with located(where):
            if said is not None and (not isinstance(said, str) or said.strip().lower() not in OUTCOMES):
                raise InvalidInput(f"the label must be a, b or tie, or null while nobody has given it; got {said!r}")
        open_ += said is None
        if said is not None:
            found.setdefault(content_key(row), []).append(said.strip().lower())
    return found, open_


def matched(rows: Iterable[Mapping[str, Any]], people: Mapping[str, Sequence[str]]) -> tuple[list[list[Rating]], int]:
    """The ratings of every comparison that both labelled, and how many of people's are of comparisons that were left
    to them."""
    found, left = [], 0
    for row in rows:
        own = people.get(content_key(row), ())
        if row["label"] is None:
            left += bool(own)
        elif own:
            found.append([(row["label"], other) for other in own])
    return found, left


def report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts, position bias and cost of a file of labels; None is "not computable".

    first_place_share  of the verdicts that prefer one response, how many prefer the one that was shown first: 0.5
                       without bias, since every comparison is shown in both orders
    consistent_share   of the comparisons, in how many both orders say the same
    """
    shown = Counter(opinion["shown"] for row in rows for opinion in row["opinions"])
    judged = [row for row in rows if row["verdict"] is not None]
    told, costs = ([row[name] for row in rows if row[name] is not None] for name in ("tokens", "cost"))
    return {
        "rows": len(rows),
        "labels": dict(Counter(row["label"] for row in rows if row["label"] is not None)),
        "queued": dict(Counter(reason for row in rows for reason in row["queued"])),
        "errors": dict(Counter(row["error"]["code"] for row in rows if "error" in row)),
        "confidence_from": dict(Counter(row["confidence_from"] for row in judged)),
        "first_place_share": _share(shown["a"], shown["a"] + shown["b"]),
        "consistent_share": _share(sum(row["consistent"] for row in judged), len(judged)),
        "tokens": {"prompt": sum(t[0] for t in told), "completion": sum(t[1] for t in told)} if told else None,
        "cost": sum(costs) if costs else None,
        "rows_without_tokens": len(rows) - len(told),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
