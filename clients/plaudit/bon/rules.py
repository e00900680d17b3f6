"""Which responses are chosen. Pure: candidates in, candidates out, best first; equal values keep their order.

A rule sees only candidates that have a value (the votes: only those with an answer). What is random is drawn from a
generator that belongs to the prompt, so that a choice depends neither on the other prompts nor on their order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean, pstdev
from typing import Literal

from ..errors import ConfigurationError, InvalidInput

VoteWeight = Literal["sigmoid", "score"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response, its value (None: it has none, which only a majority vote allows) and its extracted answer. `index`
    is its place among the samples of its prompt, another for each."""

    index: int
    response: str
    value: float | None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class RuleOptions:
    """What the rules can be told; `bar` is for `raft`, from all prompts (`raft_bar`)."""

    k: int = 4
    threshold: float = 0.0
    fraction: float = 0.2
    beta: float = 0.5
    penalty: float = 0.5
    vote_weight: VoteWeight = "sigmoid"
    bar: float | None = None

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.beta, self.penalty, self.threshold)))
        if not (finite and self.k >= 1 and self.beta > 0 and 0 < self.fraction <= 1):
            raise ConfigurationError("k must be at least 1, beta above 0, 0 < fraction <= 1, and all numbers finite")


Chosen = list[Candidate]
Rule = Callable[[Sequence[Candidate], RuleOptions, Random], Chosen]


def value_of(candidate: Candidate) -> float:
    """The value; smaller than any other where there is none."""
    return -math.inf if candidate.value is None else candidate.value


def ranked(candidates: Sequence[Candidate]) -> Chosen:
    """Highest value first, equal ones in the order of their indices."""
    return sorted(candidates, key=lambda candidate: (-value_of(candidate), candidate.index))


def best(candidates: Sequence[Candidate], options: RuleOptions, random: Random) -> Chosen:
    """Best-of-n: the response with the highest score (Stiennon et al., 2009.01325; Nakano et al., 2112.09332).
    Algorithm 1 of RAFT (Dong et al., 2304.06767) trains on these."""
    return ranked(candidates)[:1]


def topk(candidates: Sequence[Candidate], options: RuleOptions, random: Random) -> Chosen:
    """The k best of each prompt, as in the rejection sampling of Llama 2 (Touvron et al., 2307.09288) for k = 1."""
    return ranked(candidates)[: options.k]


def threshold(candidates: Sequence[Candidate], options: RuleOptions, random: Random) -> Chosen:
    """Every response with at least the threshold: ReST's improve step (Gulcehre et al., 2308.08998)."""
    return [candidate for candidate in ranked(candidates) if value_of(candidate) >= options.threshold]


def raft(candidates: Sequence[Candidate], options: RuleOptions, random: Random) -> Chosen:
    """The best fraction of all responses to all prompts: the global ranking of RAFT (Dong et al., 2304.06767).
    Scores of different prompts are compared; `best` is RAFT's ranking within each prompt."""
    assert options.bar is not None
    return [candidate for candidate in ranked(candidates) if value_of(candidate) >= options.bar]


def raft_bar(values: Sequence[float], fraction: float) -> float:
    """The value that the best fraction of `values` (at least one of them) reaches. Equal values stand or fall
    together: more than the fraction can reach it."""
    kept = max(1, math.floor(fraction * len(values) + 1e-9))
    return sorted(values, reverse=True)[kept - 1] if values else math.inf


def rso(candidates: Sequence[Candidate], options: RuleOptions, random: Random) -> Chosen:
    """Statistical rejection sampling (Liu et al., RSO, 2309.06657, Algorithm 1): go through the candidates that are
    left and accept each with probability exp((value - highest value left) / beta), until k are accepted or none is
    left. beta towards 0 gives the k best, towards infinity k at random. In the order of acceptance."""
    left, accepted = ranked(candidates), Chosen()
    while left and len(accepted) < options.k:
        highest = max(map(value_of, left))
        random.shuffle(left)
        for candidate in list(left):
            if random.random() < math.exp((value_of(candidate) - highest) / options.beta):
                accepted.append(candidate)
                left.remove(candidate)
                if len(accepted) == options.k:
                    break
    return accepted


def uncertainty(values: Sequence[float], penalty: float) -> float:
    """Mean - penalty x standard deviation over the scores of several reward models (of one: its score), which must
    share a scale: a lower confidence bound, in the place of the objective of Coste et al., 2310.02743, who subtract
    the variance. The deviation is that of these models (ddof 0). The rule of that name takes the best by this."""
    return fmean(values) - penalty * pstdev(values)


def majority(candidates: Sequence[Candidate], options: RuleOptions, random: Random) -> Chosen:
    """Self-consistency (Wang et al., 2203.11171): the most frequent answer; of the responses that give it, the one
    with the highest value. Of equally frequent answers the one that came first."""
    return _elected(candidates, lambda candidate: 1.0)


def weighted(candidates: Sequence[Candidate], options: RuleOptions, random: Random) -> Chosen:
    """The answer with the largest sum of rewards (weighted best-of-n: Li et al., 2206.02336; Uesato et al.,
    2211.14275), with sigmoid(score) for logits, or the score itself where it is a probability. Raises InvalidInput
    for a negative weight: a vote must not count against the answer that it is for."""
    if options.vote_weight == "score" and any(value_of(candidate) < 0 for candidate in candidates):
        raise InvalidInput("a vote weighs less than 0; vote with --vote-weight sigmoid")
    squash = _sigmoid if options.vote_weight == "sigmoid" else float
    return _elected(candidates, lambda candidate: squash(value_of(candidate)))


RULES: Mapping[str, Rule] = {
    **{rule.__name__: rule for rule in (best, topk, threshold, raft, rso, majority, weighted)},
    "uncertainty": best,
}
VOTES = ("majority", "weighted")


def _elected(candidates: Sequence[Candidate], weight: Callable[[Candidate], float]) -> Chosen:
    votes: defaultdict[str | None, list[float]] = defaultdict(list)
    for candidate in sorted(candidates, key=lambda candidate: candidate.index):
        votes[candidate.answer].append(weight(candidate))
    winner = max(votes, key=lambda answer: math.fsum(votes[answer]), default=None)  # the first of equal ones
    return ranked([candidate for candidate in candidates if candidate.answer == winner])[:1]


def _sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
