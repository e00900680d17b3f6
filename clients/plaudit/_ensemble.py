"""Several reward models as one: each item scored by all members, their scores combined.

A single model's mistakes are what a policy learns to exploit; members that disagree show where (Coste et al., "Reward
model ensembles help mitigate overoptimization", 2310.02743). Members should share a scale: serve them with
`transform="normalized"` unless they were trained alike.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ._bulk import in_order
from .errors import ConfigurationError
from .types import Identity, Item, ScoreResult, Scores, Timing, Usage

Combine = Literal["mean", "mean-std", "min"]


@dataclass(frozen=True, slots=True)
class Combination:
    """How members' scores become one.

    mean      their mean                 mean-std  mean - penalty * std, so that what they dispute is worth less
    min       the worst of them (worst-case optimisation)

    `std` is the population's (divided by the number of members), in the unit of the scores.
    """

    how: Combine = "mean"
    penalty: float = 0.5

    def __post_init__(self) -> None:
        if self.how not in get_args(Combine):
            raise ConfigurationError(f"how must be one of {', '.join(get_args(Combine))}, got {self.how!r}")
        if not self.penalty >= 0:
            raise ConfigurationError(f"penalty must not be negative, got {self.penalty}")

    def __call__(self, scores: Sequence[float]) -> float:
        if self.how == "min":
            return min(scores)
        mean = statistics.fmean(scores)
        return mean - self.penalty * statistics.pstdev(scores, mean) if self.how == "mean-std" else mean


def combined(members: Sequence[Scores], rule: Combination) -> Scores:
    """One list of scores from the members' lists for the same items. `extra` of a result holds `members` and `std`;
    an item that one member could not score has no score, and that member's error."""
    transforms = {member.transform for member in members if member.identity is not None}
    if len(transforms) > 1:
        raise ConfigurationError(f"the members answer with different transforms: {', '.join(sorted(transforms))}")
    identities = [member.identity for member in members if member.identity is not None]
    return Scores(
        tuple(_result(results, rule) for results in zip(*members, strict=True)),
        _identity(identities, rule) if len(identities) == len(members) else None,
        transform=next(iter(transforms), "none"),
        request_ids=tuple(request_id for member in members for request_id in member.request_ids),
        usage=Usage(*(sum(getattr(member.usage, f.name) for member in members) for f in fields(Usage))),
        timing=Timing(*(max(getattr(member.timing, f.name) for member in members) for f in fields(Timing))),
    )


class _Ensemble:
    """What both ensembles are: members that are asked, and the rule."""

    def __init__(self, members: Sequence[Any], how: Combine = "mean", penalty: float = 0.5) -> None:
        self.members = tuple(members)
        self.rule = Combination(how, penalty)
        if not self.members:
            raise ConfigurationError("an ensemble needs a member")


class Ensemble(_Ensemble):
    """Several `Client`s as one. `Ensemble([a, b, c], "mean-std")` or, for models that one server has,
    `Ensemble([client.with_options(model=name) for name in client.models()])`. See `Combination` for the rules."""

    def score_items(self, items: Iterable[Item]) -> Scores:
        """The combined scores of items of any native shape, all members asked at the same time."""
        listed = list(items)
        asked = in_order(self.members, lambda member: member.score_items(listed), len(self.members))
        return combined([scores for _, scores in asked], self.rule)


class AsyncEnsemble(_Ensemble):
    """`Ensemble` over `AsyncClient`s."""

    async def score_items(self, items: Iterable[Item]) -> Scores:
        """The combined scores of items of any native shape, all members asked at the same time."""
        listed = list(items)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(member.score_items(listed)) for member in self.members]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return combined([task.result() for task in tasks], self.rule)


def _result(results: tuple[ScoreResult, ...], rule: Combination) -> ScoreResult:
    if failed := next((result for result in results if result.score is None), None):
        return failed
    scores = [float(result) for result in results]
    extra = {"members": scores, "std": statistics.pstdev(scores)}
    return replace(results[0], score=rule(scores), attributes=None, extra=extra)


def _identity(parts: Sequence[Identity], rule: Combination) -> Identity:
    """Changes when any member does."""
    how = f"{rule.how}*{rule.penalty}" if rule.how == "mean-std" else rule.how
    model, revision, numerics = (
        "+".join(getattr(part, name) for part in parts) for name in ("model", "revision", "numerics")
    )
    return Identity(f"{how}({model})", revision, numerics)
