"""How long texts are, and whether the preferred one is the longer: the same counts in characters or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plaudit_model.records import Comparison


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Nearest-rank percentiles of lengths: each is a length that occurs."""

    p50: int
    p90: int
    p99: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Percentiles | None:
        """None of nothing."""
        if not lengths:
            return None
        ordered = sorted(lengths)
        p50, p90, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99, ordered[-1])

    def __str__(self) -> str:
        return f"p50 {self.p50:,}, p90 {self.p90:,}, p99 {self.p99:,}, longest {self.longest:,}"


@dataclass(slots=True)
class LongerWins:
    """Comparisons with a winner, by whether it is the longer response."""

    longer: int = 0
    shorter: int = 0
    equal: int = 0

    def add(self, comparison: Comparison, lengths: Sequence[int]) -> None:
        """`lengths` are those of the record's responses. A tie counts nowhere."""
        first, second = lengths[comparison.first], lengths[comparison.second]
        if comparison.outcome == "tie":
            return
        self.equal += first == second
        self.longer += (first > second) == (comparison.outcome == "first") and first != second
        self.shorter += (first > second) != (comparison.outcome == "first") and first != second

    @property
    def share(self) -> float | None:
        """Of the comparisons whose lengths differ, those that the longer response won; None if there are none."""
        differing = self.longer + self.shorter
        return self.longer / differing if differing else None

    def __str__(self) -> str:
        if self.share is None:
            return "not computable: no winner differs in length from the loser"
        return f"the longer response won {self.share:.1%} of {self.longer + self.shorter:,} comparisons"
