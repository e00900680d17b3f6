"""Turns of phrase shared by the families.

Good and bad answers are dressed by the same function with the same odds, so that neither length nor manner
says which one is right.
"""

from __future__ import annotations

from random import Random

# fmt: off
_OPENERS = (
    "", "", "", "Please help me. ", "Quick question. ", "Hi! ", "Hello! ", "A small thing. ",
    "One more question. ", "I need this for school. ", "My friend wants to know. ", "For a quiz. ",
)
_BEFORE = ("Sure. ", "Of course. ", "Good question. ", "Let me see. ", "Happy to help. ", "No problem. ")
_AFTER = (
    " I hope that helps.", " Let me know if you need anything else.", " Feel free to ask more.",
    " Have a nice day.", " Does that answer your question?",
)
# fmt: on


def opened(rng: Random, prompt: str) -> str:
    """The prompt with a random opening, or none."""
    return rng.choice(_OPENERS) + prompt


def dressed(rng: Random, answer: str) -> str:
    """The answer with a random courtesy before it, after it, both or neither."""
    before = rng.choice(_BEFORE) if rng.random() < 0.35 else ""
    after = rng.choice(_AFTER) if rng.random() < 0.35 else ""
    stop = "." if after and answer[-1:] not in ".!?" else ""
    return before + answer + stop + after


def listed(items: list[str]) -> str:
    """`a, b and c`."""
    return ", ".join(items[:-1]) + " and " + items[-1]
