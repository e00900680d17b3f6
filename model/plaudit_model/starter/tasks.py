"""The starter tasks: prompts with the data that their answers are checked against.

A fifth of all prompts, chosen by a hash of their text, is held out: seeds from `HELD_OUT_SEEDS` on draw only
these, smaller seeds never do. So whatever two seeds from the two ranges are taken, no prompt is in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, get_args

from . import arithmetic, conversion, form, knowledge, length, refusal
from .family import Family

Kind = Literal["arithmetic", "conversion", "format", "length", "refusal", "knowledge"]
Reference = arithmetic.Sum | conversion.Conversion | form.Form | length.Length | refusal.Request | knowledge.Question

FAMILIES: dict[Kind, Family[Any]] = {
    "arithmetic": arithmetic.FAMILY, "conversion": conversion.FAMILY, "format": form.FAMILY,
    "length": length.FAMILY, "refusal": refusal.FAMILY, "knowledge": knowledge.FAMILY,
}  # fmt: skip
HELD_OUT_SEEDS = 1_000_000
_HELD_OUT_PARTS = 5
_MOST_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt of one family; `reference` is what `quality` checks a response against."""

    kind: Kind
    prompt: str
    reference: Reference


def tasks(n: int, seed: int) -> list[Task]:
    """`n` tasks with `n` different prompts, the kinds in turn; the same for the same arguments, and the first
    `m` of them are `tasks(m, seed)`.

    Raises ValueError if the prompts of one family are used up: after about 13,000 tasks, or 3,300 that are held out.
    """
    rng = Random(f"plaudit starter tasks {seed}")
    seen: set[str] = set()
    kinds = get_args(Kind)
    return [_fresh(rng, kinds[i % len(kinds)], seed >= HELD_OUT_SEEDS, seen) for i in range(n)]


def candidates(task: Task, rng: Random) -> list[str]:
    """Responses of varying quality, without repetition, in random order."""
    answers = list(dict.fromkeys(FAMILIES[task.kind].candidates(task.reference, rng)))
    rng.shuffle(answers)
    return answers


def quality(task: Task, response: str) -> float:
    """How good the response is, in [0, 1]: a gold reward for any text. Pure; never raises."""
    return float(FAMILIES[task.kind].quality(task.reference, response))


def is_held_out(prompt: str) -> bool:
    """Whether only the seeds from `HELD_OUT_SEEDS` on draw this prompt."""
    return hashlib.sha256(prompt.encode()).digest()[0] % _HELD_OUT_PARTS == 0


def _fresh(rng: Random, kind: Kind, held_out: bool, seen: set[str]) -> Task:
    for prompt, reference in _draws(rng, kind):
        if is_held_out(prompt) is held_out and prompt not in seen:
            seen.add(prompt)
            return Task(kind, prompt, reference)
    raise ValueError(f"the {kind} prompts of this seed range are used up after {len(seen)} tasks; ask for fewer")


def _draws(rng: Random, kind: Kind) -> Iterator[tuple[str, Any]]:
    for _ in range(_MOST_DRAWS):
        yield FAMILIES[kind].draw(rng)
