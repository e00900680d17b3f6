"""Staying in a length: at most or at least so many words, or an exact number of sentences, about a topic."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from .family import Family
from .text import mentions, sentences, words
from .wording import opened

Rule = Literal["at_most", "at_least", "sentences"]

# fmt: off
_TOPICS = (
    "bread", "rain", "music", "trees", "trains", "winter", "coffee", "cities", "horses", "bicycles",
    "gardens", "books", "rivers", "kites", "bees", "chess", "windows", "bridges", "pottery", "tea",
    "swimming", "spring", "dancing", "maps", "lighthouses", "clocks", "cheese", "football", "hiking",
    "libraries",
)
_ASKED: dict[Rule, tuple[str, ...]] = {
    "at_most": ("Tell me about {topic} in at most {n} words.", "Use no more than {n} words: what about {topic}?",
                "Describe {topic}. Maximum {n} words."),
    "at_least": ("Tell me about {topic} in at least {n} words.", "Use {n} words or more: what about {topic}?",
                 "Describe {topic}. Minimum {n} words."),
    "sentences": ("Tell me about {topic} in exactly {n}.", "Describe {topic} in {n}, no more and no less.",
                  "Write {n} about {topic}."),
}
_SHORT = (
    "I like {topic}.", "{topic} can be fun.", "People enjoy {topic}.", "{topic} may bring joy to many.",
    "Think of {topic} often.", "{topic} will never get old.", "We all know {topic}.",
)
_LONG = (
    "For many people a good day begins and ends with {topic}.",
    "There is a long history behind {topic} in many countries.",
    "My family has always had a soft spot for {topic}.",
    "Some would rather have {topic} early in the morning.",
    "It takes time and patience to understand {topic} well.", "Children often learn about {topic} at school.",
    "You can find out more about {topic} at the museum.", "Not everybody likes {topic}, and that is fine.",
    "A good friend once told me a story about {topic}.", "With {topic} it is the small things that count.",
)
# fmt: on
_SPELLED = {2: "two sentences", 3: "three sentences", 4: "four sentences"}
_REPETITIVE = 0.35


@dataclass(frozen=True, slots=True)
class Length:
    """`n` words at most or at least, or exactly `n` sentences, that mention `topic`."""

    rule: Rule
    n: int
    topic: str


def draw(rng: Random) -> tuple[str, Length]:
    rule: Rule = rng.choice(("at_most", "at_least", "at_least", "sentences"))
    n = rng.choice({"at_most": (6, 8, 10, 12), "at_least": (18, 20, 25, 30), "sentences": (2, 3, 4)}[rule])
    task = Length(rule, n, rng.choice(_TOPICS))
    shown = _SPELLED[n] if rule == "sentences" else n
    return opened(rng, rng.choice(_ASKED[rule]).format(topic=task.topic, n=shown)), task


def quality(task: Length, response: str) -> float:
    """1 inside the length and on the topic. Outside, at most 0.6, falling with the distance; off the topic,
    or the same few words again and again, three tenths of that; 0 without a word."""
    found = words(response)
    if not found:
        return 0.0
    score = _fit(task, len(found), sentences(response))
    repetitive = len(found) > 12 and len(set(found)) < _REPETITIVE * len(found)
    if repetitive or not mentions(response, task.topic):
        score *= 0.3
    return score


def candidates(task: Length, rng: Random) -> list[str]:
    other = rng.choice([topic for topic in _TOPICS if topic != task.topic])
    right, right_again, wrong, wrong_again = _counts(task, rng)
    return [
        _sized(rng, task.rule, task.topic, right), _sized(rng, task.rule, other, right_again),
        _sized(rng, task.rule, task.topic, wrong), _sized(rng, task.rule, task.topic, wrong_again),
    ]  # fmt: skip


def _fit(task: Length, n_words: int, n_sentences: int) -> float:
    count = n_sentences if task.rule == "sentences" else n_words
    inside = {"at_most": count <= task.n, "at_least": count >= task.n, "sentences": count == task.n}[task.rule]
    if inside:
        return 1.0
    return max(0.0, 0.6 - 0.6 * abs(count - task.n) / task.n)


def _counts(task: Length, rng: Random) -> tuple[int, int, int, int]:
    """Two counts inside the length and two clearly outside."""
    if task.rule == "at_most":
        return task.n, task.n, 2 * task.n + rng.randint(0, 4), 3 * task.n
    if task.rule == "at_least":
        return task.n + 1, task.n + rng.randint(1, 10), task.n // 2, task.n // 3
    wrong = rng.sample([n for n in (1, 2, 3, 4, 5) if n != task.n], 2)
    return task.n, task.n, wrong[0], wrong[1]


def _sized(rng: Random, rule: Rule, topic: str, count: int) -> str:
    """Sentences about the topic: exactly `count` sentences; or words, the last sentence decides on which side
    of `count` they end (at most for a small count, at least otherwise)."""
    pool = rng.sample(_LONG, len(_LONG))
    if rule == "sentences":
        pool = [rng.choice((short, long)) for short, long in zip(rng.sample(_SHORT, 6), pool, strict=False)]
        return _text(pool[:count], topic)
    if count <= 14:
        return _text(_at_most(rng, count), topic)
    chosen: list[str] = []
    while sum(len(words(sentence)) for sentence in chosen) < count:
        chosen.append(pool[len(chosen) % len(pool)])
    return _text(chosen, topic)


def _at_most(rng: Random, count: int) -> list[str]:
    pool = rng.sample([*_SHORT, *_LONG], len(_SHORT) + len(_LONG))
    chosen: list[str] = []
    for sentence in pool:
        if sum(len(words(s)) for s in (*chosen, sentence)) <= count:
            chosen.append(sentence)
    return chosen


def _text(chosen: list[str], topic: str) -> str:
    filled = (sentence.format(topic=topic) for sentence in chosen)
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in filled)


FAMILY = Family(draw, quality, candidates)
