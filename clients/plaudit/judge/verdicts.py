"""From what a judge says to a label: reading one answer, and putting the answers of both orders together. Pure.

An answer gives a distribution over (A, B, tie): from the log-probabilities of the token that states the verdict where
the endpoint gives them (as in G-Eval, Liu et al., 2303.16634), else all of it on the verdict. Judges favour a place
(Wang et al., 2305.17926), so every comparison is judged in both orders. Answers of one order are averaged; the two
orders, in terms of the responses, are then put together: their geometric mean where both have log-probabilities, in
which a constant advantage of one place, added to the logits, cancels; else their mean. Two orders that contradict each
other without log-probabilities are a tie of confidence 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["a", "b", "tie"]
Order = Literal["ab", "ba"]
Shares = tuple[float, float, float]
"""Of response A, of response B, of a tie."""

OUTCOMES: tuple[Verdict, ...] = ("a", "b", "tie")
FLOOR = 1e-6
"""The share of an outcome that is not among the likeliest tokens."""
EQUAL = 1e-9

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_VERDICT = re.compile(r"^\W*verdict\W*[:=][\s*_`\[(\"']*(a|b|tie)\b[\s*_`\])\"'.]*$", re.IGNORECASE | re.MULTILINE)
_PRINCIPLES = re.compile(r"^\W*principles\W*[:=](.*)$", re.IGNORECASE | re.MULTILINE)


class Unreadable(Exception):
    """An answer without a verdict; the message says why."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """One answer, in terms of the responses as they stand in the row, in whichever order they were shown. `shown`: the
    outcome as the judge saw it. `soft`: from log-probabilities."""

    order: Order
    verdict: Verdict
    shown: Verdict
    shares: Shares
    soft: bool
    rationale: str
    principles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the opinions come to. `consistent`: both orders prefer the same."""

    verdict: Verdict
    confidence: float
    shares: Shares
    soft: bool
    consistent: bool


def read_opinion(choice: Mapping[str, Any], order: Order, known: Sequence[str], *, must_name: bool) -> Opinion:
    """The opinion in one choice of a chat completion. `must_name`: the line of principles has to be there. Raises
    Unreadable."""
    text = (choice.get("message") or {}).get("content")
    if not isinstance(text, str):
        raise Unreadable("the answer holds no text")
    if choice.get("finish_reason") == "length":
        raise Unreadable("the answer was cut: raise --max-tokens")
    said = _THINKING.sub(lambda thought: " " * len(thought[0]), text)  # places in the text stay what they are
    found, named = list(_VERDICT.finditer(said)), list(_PRINCIPLES.finditer(said))
    if not found or found[-1].end() < len(said.rstrip()):
        raise Unreadable("the answer does not end with `Verdict: A`, `B` or `tie`")
    if must_name and not named:
        raise Unreadable("the answer has no line `Principles:`, and some of them are about safety")
    match = found[-1]
    shown: Verdict = match[1].lower()  # type: ignore[assignment]
    words = re.split(r"[\s,;]+", named[-1][1].casefold()) if named else []
    principles = tuple(name for name in known if name.casefold() in {word.strip("*_`.[]()\"'") for word in words})
    soft = token_shares(choice.get("logprobs"), text, match.start(1))
    shares = soft or tuple(float(outcome == shown) for outcome in OUTCOMES)
    a, b, tie = shares
    rationale = said[: named[-1].start() if named else match.start()].strip()
    swapped: Verdict = {"a": "b", "b": "a"}.get(shown, shown) if order == "ba" else shown  # type: ignore[assignment]
    own = (b, a, tie) if order == "ba" else (a, b, tie)
    return Opinion(order, swapped, shown, own, soft is not None, rationale, principles)


def token_shares(logprobs: Any, text: str, place: int) -> Shares | None:
    """The probabilities of A, B and tie as the token at character `place` of the text, evened out to 1; None where the
    log-probabilities are absent or do not belong to this text."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        return None
    try:
        pieces = [bytes(entry["bytes"]) if entry.get("bytes") else entry["token"].encode() for entry in content]
        start = b"".join(pieces).rfind(text.encode())
        wanted = start + len(text[:place].encode())
        for entry, piece in zip(content, pieces, strict=True):
            if wanted < len(piece) and start >= 0:
                return _shares(entry, wanted)
            wanted -= len(piece)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return None


def judge(opinions: Sequence[Opinion]) -> Judgement:
    """The opinions of both orders put together. Raises Unreadable if one order has none."""
    by_order = [[opinion for opinion in opinions if opinion.order == order] for order in ("ab", "ba")]
    if not all(by_order):
        raise Unreadable("an order has no readable verdict")
    means = [
        [math.fsum(column) / len(own) for column in zip(*(o.shares for o in own), strict=True)] for own in by_order
    ]
    soft = all(opinion.soft for opinion in opinions)
    pairs = list(zip(*means, strict=True))
    joined = [math.sqrt(max(x, FLOOR) * max(y, FLOOR)) if soft else (x + y) / 2 for x, y in pairs]
    a, b, tie = (value / math.fsum(joined) for value in joined)
    verdict = _best((a, b, tie))
    confidence = dict(zip(OUTCOMES, (a, b, tie), strict=True))[verdict]
    consistent = _best(means[0]) == _best(means[1])
    return Judgement(verdict, confidence, (a, b, tie), soft, consistent)


def _best(shares: Sequence[float]) -> Verdict:
    """The likeliest outcome. A and B alike are a tie."""
    a, b, tie = shares
    if abs(a - b) <= EQUAL or tie >= max(a, b):
        return "tie"
    return "a" if a > b else "b"


def _shares(entry: Mapping[str, Any], place: int) -> Shares:
    """From the alternatives to one token, in which the verdict begins at byte `place`."""
    lead = entry["token"].encode()[:place].decode()
    options = {top["token"]: float(top["logprob"]) for top in [*(entry.get("top_logprobs") or ()), entry]}
    found = dict.fromkeys(OUTCOMES, 0.0)
    for token, logprob in options.items():
        word = token.removeprefix(lead).strip(" *_`[(\"'").lower() if token.startswith(lead) else ""
        outcome: Verdict | None = word if word in ("a", "b") else "tie" if word and "tie".startswith(word) else None  # type: ignore[assignment]
        if outcome:
            found[outcome] += math.exp(logprob)
    total = math.fsum(found.values())
    if not total > 0:
        raise ValueError("no alternative is a verdict")
    a, b, tie = (value / total for value in found.values())
    return a, b, tie
