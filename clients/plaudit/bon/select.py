"""From scored samples to what a trainer reads: values, a rule, pairs, rows. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any, Literal

from ..errors import ConfigurationError
from .formats import WRITERS, Format, Picked, Task
from .rules import RULES, VOTES, Candidate, RuleOptions, raft_bar, ranked, uncertainty, value_of
from .scored import Group, Reading, Steps

Rejected = Literal["worst", "second", "random", "all"]


@dataclass(frozen=True, slots=True)
class SelectOptions:
    """How to choose and what to write. `columns`: the scores, several for `uncertainty`. `rejected`: which of the
    others a chosen response is paired with; `rso` pairs the accepted among themselves."""

    rule: str = "best"
    format: Format = "sft"
    task: Task = "sft"
    columns: tuple[str, ...] = ("score",)
    steps: Steps | None = None
    numbers: RuleOptions = RuleOptions()
    answer_regex: str | None = None
    rejected: Rejected = "worst"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format in ("sft", "dpo", "kto") and self.task != self.format:
            raise ConfigurationError(f"--format {self.format} is not for {self.task}")
        if (self.rule in VOTES) != (self.answer_regex is not None):
            raise ConfigurationError(f"--answer-regex is needed by {' and '.join(VOTES)}, and by no other rule")
        if (self.rule == "uncertainty") != (len(self.columns) > 1):
            raise ConfigurationError("several --score columns are needed by --rule uncertainty, and by no other rule")
        try:
            re.compile(self.answer_regex or "")
        except re.error as error:
            raise ConfigurationError(f"--answer-regex is no regular expression: {error}") from None


def select(reading: Reading, options: SelectOptions, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows for the trainer, in the order of the prompts. `counts` tells what became of prompts and samples."""
    candidates = [_candidates(group, options, counts) for group in reading.groups]
    numbers = options.numbers
    if options.rule == "raft":
        values = [value_of(candidate) for own in candidates for candidate in own]
        numbers = replace(numbers, bar=raft_bar(values, numbers.fraction))
    for group, own in zip(reading.groups, candidates, strict=True):
        random = Random(f"{options.seed}:{group.hash}")
        chosen = RULES[options.rule](own, numbers, random)
        if not chosen:
            counts["prompts without a choice: " + ("none reached the bar" if own else "no candidate")] += 1
            continue
        counts["prompts with a choice"] += 1
        counts["responses chosen"] += len(chosen)
        pairs = [] if options.task == "sft" else list(_pairs(own, chosen, options, random, counts))
        yield from WRITERS[options.format](Picked(group.prompt, group.raw, chosen, pairs), options.task)


def _candidates(group: Group, options: SelectOptions, counts: Counter[str]) -> list[Candidate]:
    """The samples that the rule may choose from; what is left out is counted."""
    found: dict[str | int, Candidate] = {}
    for index, sample in enumerate(group.samples):
        response, answer = sample.response, None
        if options.rule in VOTES and response is not None:
            answer = _answer(response, options.answer_regex or "")
        if response is None or (sample.failure and options.rule != "majority"):
            counts[f"samples left out: {sample.failure}"] += 1
        elif options.rule in VOTES and answer is None:
            counts["samples left out: no answer in it"] += 1
        elif response in found:
            counts["samples left out: same text as another"] += 1
        else:  # every vote counts, whatever its text; of equal texts to learn from, one is enough
            value = None if sample.failure else uncertainty(sample.numbers, options.numbers.penalty)
            found[response if answer is None else index] = Candidate(index, response, value, answer)
    return list(found.values())


def _answer(response: str, pattern: str) -> str | None:
    """The last match, its first group if it has one, without the blanks around it; None if that is empty."""
    matches = list(re.finditer(pattern, response))
    return (matches[-1][bool(matches[-1].re.groups)] or "").strip() or None if matches else None


def _pairs(
    candidates: Sequence[Candidate],
    chosen: Sequence[Candidate],
    options: SelectOptions,
    random: Random,
    counts: Counter[str],
) -> Iterator[tuple[Candidate, Candidate]]:
    """Chosen and rejected. No pair of equal values, unless it was voted: it would teach nothing."""
    if options.rule == "rso":
        # RSO's first-round ranking: the accepted, two by two in the order of acceptance, the better one first.
        drawn = [(pair[0], pair[1]) for pair in map(ranked, list(pairwise(chosen))[::2])]
    else:
        winners = {candidate.answer for candidate in chosen} - {None}
        others = [c for c in ranked(candidates) if c not in chosen and c.answer not in winners]
        some = others and [random.choice(others)]
        rejected = {"worst": others[-1:], "second": others[:1], "random": some, "all": others}[options.rejected]
        drawn = [(one, other) for one in chosen for other in rejected]
    counts["prompts without a pair: nothing to reject"] += not drawn
    for one, other in drawn:
        if one.answer is None and one.value == other.value:
            counts["pairs left out: equal values"] += 1
        else:
            counts["pairs"] += 1
            yield one, other
