"""Statistics of texts: diversity, length, refusals, and how they go with the score. Pure, standard library."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import StatisticsError, correlation, fmean

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|\w+|[^\w\s]")
_OPENING = 200
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am)(?: so| very)? sorry,? (?:but )?(?:i|as)\b|i apologi[sz]e,? but"
    r"|i(?: can(?:no|')t| can not| won't| will not|(?:'m| am) (?:not able|unable) to)"
    r" (?:help|assist|provide|comply|fulfill|do that|answer|engage|create|generate|write|support|give|discuss|share)"
    r"|(?:i|we) must (?:decline|refuse)|as an ai(?: language)?(?: model| assistant)?,? i (?:can(?:no|')t|am not|won't)"
    r"|it (?:is|would be) (?:not |in)appropriate (?:for me )?to|against my (?:programming|guidelines|principles))",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """Words and punctuation marks in lower case; Chinese and Japanese characters one by one."""
    return _WORD.findall(text.lower())


def refuses(text: str) -> bool:
    """Whether the first 200 characters hold one of a few English phrases of refusal ("I'm sorry, but I", "I cannot
    help", "as an AI, I can't", ...). Made to compare one file with another: of the refusals that people labelled in
    XSTest it finds about a third, those with a phrase, and hardly anything else."""
    return _REFUSAL.search(text[:_OPENING].replace("\u2019", "'")) is not None


def distinct(texts: Iterable[Sequence[str]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of several texts (Li et al., 1510.03055); None without n-grams."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[Sequence[str]], longest: int = 4) -> float | None:
    """The mean BLEU of each text against the others (Zhu et al., 1802.01886), n-grams up to `longest`, an order
    without a match counted as a tenth of one; 1 if all are equal, None for fewer than two texts with words."""
    texts = [text for text in texts if text]
    if len(texts) < 2:
        return None
    counts = [[Counter(_grams(text, n)) for text in texts] for n in range(1, longest + 1)]
    tops = [_two_highest(order) for order in counts]
    return fmean(_bleu(texts, place, counts, tops) for place in range(len(texts)))


def pearson(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation of pairs; None where one side does not vary."""
    try:
        return correlation([x for x, _ in pairs], [y for _, y in pairs])
    except StatisticsError:
        return None


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, minimum, median, 90th percentile and maximum; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    at = {"min": 0.0, "p50": 0.5, "p90": 0.9, "max": 1.0}
    return {"mean": fmean(values), **{name: ordered[round(q * (len(ordered) - 1))] for name, q in at.items()}}


def _grams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def _two_highest(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """The two highest counts of each n-gram in any text: the second is what counts against the text of the first."""
    tops: dict[tuple[str, ...], tuple[int, int]] = {}
    for own in counts:
        for gram, count in own.items():
            first, second = tops.get(gram, (0, 0))
            tops[gram] = (count, first) if count > first else (first, max(second, count))
    return tops


def _bleu(
    texts: Sequence[Sequence[str]],
    place: int,
    counts: Sequence[Sequence[Counter[tuple[str, ...]]]],
    tops: Sequence[dict[tuple[str, ...], tuple[int, int]]],
) -> float:
    logs = []
    for order, top in zip(counts, tops, strict=True):
        own = order[place]
        if total := own.total():
            # Where this text itself has the highest count, the others' highest is the second.
            matched = sum(min(count, top[gram][count == top[gram][0]]) for gram, count in own.items())
            logs.append(math.log((matched or 0.1) / total))
    length = len(texts[place])
    others = (len(text) for index, text in enumerate(texts) if index != place)
    closest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(min(0.0, 1 - closest / length) + fmean(logs))
