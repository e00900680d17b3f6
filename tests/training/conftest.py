"""Preference data that a tiny model can learn, and examples made from it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import pytest

from plaudit_model.records import Comparison, Message, Origin, Record

Toy = Callable[[int, int], list[Record]]

_WORDS = ["red", "green", "blue", "tree", "house", "water", "stone", "wind", "fire", "light"]


def _toy_record(number: int, draw: random.Random) -> Record:
    """Two to four responses; of two, the one with more `indeed` in it is better."""
    prompt = " ".join(draw.choices(_WORDS, k=draw.randint(5, 30))) + "?"
    grades = draw.sample(range(4), draw.choice((2, 2, 2, 3, 4)))
    responses = tuple(" ".join([*draw.choices(_WORDS, k=draw.randint(1, 9)), *["indeed"] * grade]) for grade in grades)
    comparisons = tuple(
        Comparison(i, j, "first" if grades[i] > grades[j] else "second")
        for i in range(len(grades)) for j in range(i)
    )  # fmt: skip
    return Record(f"toy-{number}", (Message("user", prompt),), responses, comparisons, Origin("toy", number + 1))


@pytest.fixture(scope="session")
def toy() -> Toy:
    """`toy(n, seed)` is n records that a tiny model learns in seconds."""

    def make(n: int, seed: int) -> list[Record]:
        draw = random.Random(seed)
        return [_toy_record(number, draw) for number in range(n)]

    return make


@pytest.fixture(scope="session")
def as_jsonl() -> Callable[[Sequence[Record]], str]:
    """Records as the lines of a TRL preference file, one comparison a line."""

    def write(records: Sequence[Record]) -> str:
        lines = []
        for record in records:
            for c in record.comparisons:
                chosen, rejected = (c.first, c.second) if c.outcome == "first" else (c.second, c.first)
                row = {"prompt": record.prompt[0].content, "chosen": record.responses[chosen],
                       "rejected": record.responses[rejected]}  # fmt: skip
                lines.append(json.dumps(row))
        return "\n".join(lines) + "\n"

    return write
