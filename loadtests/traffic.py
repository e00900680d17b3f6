"""What the load is made of: prompts, responses and when they arrive. Pure functions of a seed; no clock, no sockets.

Word counts follow log-normal distributions fitted to the helpful-base and harmless-base pairs of HH-RLHF
(Bai et al., arXiv:2204.05862): prompts (the whole conversation) have a median of 52 words and a log standard
deviation of 1.13, responses 23 and 1.01.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

_WORDS = (
    "the", "of", "and", "to", "a", "in", "that", "it", "is", "was", "for", "on", "are", "as", "with", "they", "be",
    "at", "this", "have", "from", "or", "had", "by", "but", "what", "some", "we", "can", "out", "other", "were",
    "all", "there", "when", "up", "use", "your", "how", "said", "an", "each", "she", "which", "do", "their", "time",
    "if", "will", "way", "about", "many", "then", "them", "write", "would", "like", "so", "these", "her", "long",
    "make", "thing", "see", "him", "two", "has", "look", "more", "day", "could", "go", "come", "did", "number",
    "sound", "no", "most", "people", "my", "over", "know", "water", "than", "call", "first", "who", "may", "down",
    "side", "been", "now", "find", "any", "new", "work", "part", "take", "get", "place", "made", "live", "where",
    "after", "back", "little", "only", "round", "man", "year", "came", "show", "every", "good", "me", "give", "our",
    "under", "name", "very", "through", "just", "form", "sentence", "great", "think", "say", "help", "low", "line",
    "differ", "turn", "cause", "much", "mean", "before", "move", "right", "boy", "old",
)  # fmt: skip


@dataclass(frozen=True)
class Lengths:
    """Word counts: log-normal with this median and log standard deviation, cut to 1..`most`."""

    median: float
    log_std: float
    most: int

    def draw(self, rng: Random) -> int:
        return max(1, min(self.most, round(rng.lognormvariate(math.log(self.median), self.log_std))))


@dataclass(frozen=True)
class TrafficSettings:
    """`pool` prompts come again and again, a `repeat_share` of the time; all other prompts come once.

    The same (prompt, response) of the pool arrives alone, in lists and among n responses, from several users: its
    scores may then differ by `tolerance`, which is 0 for a server in exact mode.
    """

    seed: int = 1
    pool: int = 50
    repeat_share: float = 0.2
    most_prompt_words: int = 600
    most_response_words: int = 400
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.repeat_share <= 1 and self.pool >= 1 and self.tolerance >= 0):
            raise ValueError("repeat_share must be in [0, 1], pool at least 1, tolerance at least 0")


@dataclass(frozen=True)
class Rollouts:
    """A prompt and sampled responses to it. `key` names the prompt; `recurs` says that it comes again."""

    key: str
    recurs: bool
    prompt: str
    responses: tuple[str, ...]


def rollouts(settings: TrafficSettings, user: int, n: int) -> Iterator[Rollouts]:
    """An endless stream of prompts with `n` responses each: the same for the same arguments.

    The j-th response to a prompt of the pool does not depend on `user` nor on `n`.
    """
    rng = Random(f"{settings.seed} user {user}")
    count = 0
    while True:
        recurs = rng.random() < settings.repeat_share
        key = f"pool {rng.randrange(settings.pool)}" if recurs else f"user {user} {count}"
        count += 1
        responses = tuple(_text(settings, f"{key} response {j}", _response(settings)) for j in range(n))
        yield Rollouts(key, recurs, _text(settings, key, _prompt(settings)), responses)


def finish_times(responses: Sequence[str], words_per_second: float) -> list[float]:
    """Seconds after the first moment at which each response is complete, if all are generated side by side."""
    return [len(response.split()) / words_per_second for response in responses]


def _prompt(settings: TrafficSettings) -> Lengths:
    return Lengths(52.0, 1.13, settings.most_prompt_words)


def _response(settings: TrafficSettings) -> Lengths:
    return Lengths(23.0, 1.01, settings.most_response_words)


def _text(settings: TrafficSettings, key: str, lengths: Lengths) -> str:
    rng = Random(f"{settings.seed} {key}")
    return " ".join(rng.choices(_WORDS, k=lengths.draw(rng))).capitalize() + "."
