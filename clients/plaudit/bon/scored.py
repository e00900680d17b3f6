"""Scored samples, grouped by prompt: what `select` and `report` read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from .._checked import is_number
from .._items import check
from .._jsonl import ABOUT
from .._row_files import digest, json_rows, located
from ..errors import InvalidInput
from ..types import Prompt

Steps = Literal["min", "product", "last", "mean"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One response and its numbers, one for each column that was asked for; `failure` is the code of the reason why
    it cannot be used. `index` is its place among the samples of its prompt. `cut`: by the limit of tokens."""

    index: int
    response: str | None
    numbers: tuple[float, ...] = ()
    failure: str | None = None
    tokens: int | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt, in the order of their indices. `raw`: it was continued as text."""

    prompt: Prompt
    hash: str
    raw: bool
    samples: list[Sample] = field(default_factory=list)


@dataclass(slots=True)
class Reading:
    """What a file holds. `scorers` names what gave each column; `failures` counts by code."""

    groups: list[Group] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    scorers: dict[str, dict[str, str]] = field(default_factory=dict)


def read_scored(
    lines: Iterable[bytes], columns: Sequence[str], steps: Steps | None = None, *, needed: bool = True
) -> Reading:
    """The samples of a file with the numbers of `columns`, or of the `steps` of each sample put together. Without
    being `needed`, a column may be absent. A row with `responses` is as many samples, and has lists of numbers.

    Raises InvalidInput for a row that is no sample, a number that is none, a column that no row has, and a column
    that two revisions have scored: their numbers must not be compared.
    """
    reading, present, keys = Reading(), set[str](), set[str]()
    groups: dict[str, Group] = {}
    names = ("steps", *columns[1:]) if steps else tuple(columns)
    for _, where, line in json_rows(lines):
        with located(where):
            for row in _apart(line, names):
                prompt: Any = row.get("prompt")
                response, key = row.get("response"), row.get("key")
                check({"prompt": prompt, "response": "" if response is None else response})
                if key in keys:
                    raise InvalidInput(f"repeats the key {key}; `plaudit bon merge` leaves copies out")
                if not isinstance(sampling := row.get("sampling") or {}, dict):
                    raise InvalidInput("has a sampling that is no object")
                raw = bool(sampling.get("raw"))
                own = digest([prompt, raw])
                group = groups.setdefault(own, Group(prompt, own, raw))
                group.samples.append(_sample(row, names, steps, len(group.samples)))
                _same_scorers(reading.scorers, row, columns)
                reading.failures.update(filter(None, [group.samples[-1].failure]))
                present.update(row)
                keys.update([key] if key else [])
    if needed and groups and (absent := set(names) - present):
        raise InvalidInput(f"no row has the column {min(absent)!r}; `plaudit bon score` writes it, --score names it")
    for group in groups.values():
        group.samples.sort(key=lambda sample: sample.index)
    reading.groups = list(groups.values())
    return reading


def put_together(steps: Sequence[float], how: Steps) -> float:
    """One score from the scores of the steps. min and product: Lightman et al., 2305.20050; last: the score of the
    whole so far; mean. The product is one of probabilities: it needs scores between 0 and 1. Raises ValueError."""
    if not steps or (how == "product" and not all(0 <= score <= 1 for score in steps)):
        raise ValueError("steps need at least one score, and for a product scores between 0 and 1")
    values = {"min": min(steps), "product": math.prod(steps), "last": steps[-1], "mean": fmean(steps)}
    return values[how]


def _apart(row: Mapping[str, Any], names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """A row's samples: of one with `responses` each with its part of `scores`, as `plaudit score` writes them, or of a
    list that goes by the column's own name (`rewards`). Raises ValueError for lists that differ in length."""
    if "responses" not in row:
        yield row
        return
    check({"prompt": row.get("prompt"), "responses": row["responses"]})
    lists = {"response": row["responses"]}
    for name in names:
        error = name.removesuffix("score") + "error"
        found = {name: row.get(name, row.get(f"{name}s")), error: row.get(f"{error}s")}
        lists |= {key: value for key, value in found.items() if value is not None}
    shared = {key: value for key, value in row.items() if key not in (*lists, "responses", "key", "index")}
    yield from (shared | dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True))


def _sample(row: Mapping[str, Any], names: Sequence[str], steps: Steps | None, position: int) -> Sample:
    numbers = tuple(
        _number(row[name], steps if name == "steps" else None) for name in names if row.get(name) is not None
    )
    failure = None
    if len(numbers) < len(names) or row.get("response") is None:
        errors = [row.get("failure"), *(row.get(name.removesuffix("score") + "error") for name in names)]
        failure = next((str(error["code"]) for error in errors if error), "no_score")
    index = position if row.get("index") is None else int(row["index"])
    return Sample(index, row.get("response"), numbers, failure, row.get("tokens"), row.get("finish_reason") == "length")


def _number(value: Any, steps: Steps | None) -> float:
    if steps:
        return put_together([_number(step["score"] if isinstance(step, dict) else step, None) for step in value], steps)
    if not is_number(value):
        raise ValueError(f"a finite number is needed, got {value!r}")
    return float(value)


def _same_scorers(scorers: dict[str, dict[str, str]], row: Mapping[str, Any], columns: Sequence[str]) -> None:
    for name in columns:
        about = row.get(name.removesuffix("score") + ABOUT) or {}
        found = {part: about[part] for part in ("model", "revision", "numerics", "overlong") if part in about}
        if found and scorers.setdefault(name, found) != found:
            raise InvalidInput(f"{name!r} is a score of {found}, but that of the rows before is one of {scorers[name]}")
