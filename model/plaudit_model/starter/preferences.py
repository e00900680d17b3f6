"""Preference records whose better response is known by computation."""

from __future__ import annotations

from itertools import combinations
from random import Random

from ..records import Comparison, Message, Origin, Record
from .tasks import Task, candidates, quality, tasks

_MOST_RESPONSES = 4
# Two responses closer than this are not compared: which is better is then a matter of the formula, not of
# the text.
_SMALLEST_GAP = 0.15


def preference_records(n: int, seed: int) -> list[Record]:
    """`n` records with different prompts, two to four responses each, and a comparison for every two
    responses whose quality clearly differs. Deterministic; seeds from `tasks.HELD_OUT_SEEDS` on share no
    prompt with smaller ones.

    Raises ValueError as `tasks` does.
    """
    rng = Random(f"plaudit starter preferences {seed}")
    return [_record(task, line, seed, rng) for line, task in enumerate(tasks(n, seed), 1)]


def _record(task: Task, line: int, seed: int, rng: Random) -> Record:
    responses, comparisons = _compared(task, rng)
    return Record(
        id=f"starter-{seed}-{line}", prompt=(Message("user", task.prompt),), responses=responses,
        comparisons=comparisons, origin=Origin("starter", line), tags=(task.kind,),
    )  # fmt: skip


def _compared(task: Task, rng: Random) -> tuple[tuple[str, ...], tuple[Comparison, ...]]:
    """Drawn again in the rare case that all candidates are equally good."""
    while True:
        responses = tuple(candidates(task, rng)[:_MOST_RESPONSES])
        values = [quality(task, response) for response in responses]
        comparisons = tuple(
            Comparison(i, j, "first" if values[i] > values[j] else "second", source="synthetic")
            for i, j in combinations(range(len(responses)), 2)
            if abs(values[i] - values[j]) >= _SMALLEST_GAP
        )
        if comparisons:
            return responses, comparisons
