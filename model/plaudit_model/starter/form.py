"""Following a format: the same words as JSON, bullets, a numbered list, capitals, one line, or one word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from .family import Family
from .text import words
from .wording import listed, opened

Style = Literal["json", "bullets", "numbers", "capitals", "commas", "word"]

# fmt: off
_WORDS = (
    "apple", "river", "stone", "garden", "window", "candle", "bridge", "forest", "pencil", "basket", "mirror",
    "ladder", "blanket", "kettle", "hammer", "island", "meadow", "harbour", "lantern", "pillow", "rocket",
    "saddle", "teapot", "violin", "wallet", "yellow", "zebra", "tiger", "salmon", "pepper", "orange",
    "mountain", "lemon", "kitten", "jacket", "honey", "grape", "falcon", "eagle", "donkey", "copper",
    "butter", "anchor", "button", "camera", "desert",
)
_ASKED: dict[Style, tuple[str, ...]] = {
    "json": ("Write {items} as a JSON list.", "Give me a JSON array of these words: {items}.",
             "Answer only with a JSON list that holds {items}."),
    "bullets": ("Write {items} as a bullet list.", "Make a bullet list of these words: {items}.",
                "Put {items} into bullet points, nothing else."),
    "numbers": ("Write {items} as a numbered list.", "Number these words from one on: {items}.",
                "Make a numbered list of {items}, nothing else."),
    "capitals": ("Write {items} in capital letters.", "Repeat these words in upper case: {items}.",
                 "Shout {items}: capital letters only."),
    "commas": ("Write {items} on one line, separated by commas.", "Join these words with commas: {items}.",
               "Give me {items} as one comma-separated line in lower case."),
    "word": ("Answer in one word: which comes first, {items}?", "In a single word, name the first of {items}.",
             "Only one word, please: the first of {items}."),
}
_CHATTER = (
    "Here is what you asked for:\n", "Sure, here you go:\n", "Of course! This should do it:\n",
    "Certainly. I have prepared the answer for you:\n", "Okay:\n",
)
# fmt: on
_BULLET = re.compile(r"[-*•]\s+(.*)")
_NUMBERED = re.compile(r"([0-9]{1,3})[.)]\s+(.*)")


@dataclass(frozen=True, slots=True)
class Form:
    """The words in lower case, in order, and how they are to be written."""

    style: Style
    items: tuple[str, ...]

    @property
    def expected(self) -> tuple[str, ...]:
        return self.items[:1] if self.style == "word" else self.items


def draw(rng: Random) -> tuple[str, Form]:
    style = rng.choice(get_args(Style))
    items = rng.sample(_WORDS, rng.randint(3, 5))
    return opened(rng, rng.choice(_ASKED[style]).format(items=listed(items))), Form(style, tuple(items))


def quality(form: Form, response: str) -> float:
    """1 for the words in the form and nothing else; 0.6 at most with other text around them, 0.2 at most in
    another form. Each level falls with the share of words that are missing or too many."""
    text = response.strip()
    strict = _READERS[form.style](text)
    if strict is not None:
        return 0.2 + 0.8 * _overlap(form.expected, strict)
    inside = _inside(form.style, text)
    if inside is not None:
        return 0.2 + 0.4 * _overlap(form.expected, inside)
    return 0.2 * _overlap(form.expected, words(text))


def candidates(form: Form, rng: Random) -> list[str]:
    write = _WRITERS[form.style]
    good = write(form.expected)
    other = rng.choice([style for style in get_args(Style) if style not in (form.style, "word")])
    spoiled = _spoiled(rng, form)
    answers = [good, write(spoiled), _WRITERS[other](form.items)]
    return [*answers, rng.choice(_CHATTER) + good if rng.random() < 0.3 else _WRITERS[other](spoiled)]


def _spoiled(rng: Random, form: Form) -> tuple[str, ...]:
    """The expected words with one dropped, two added, or two replaced by others."""
    items = list(form.expected)
    strange = rng.sample([word for word in _WORDS if word not in form.items], 2)
    choice = rng.choice(("drop", "add", "replace") if len(items) > 1 else ("add", "replace"))
    if choice == "drop":
        items.pop(rng.randrange(len(items)))
    elif choice == "add":
        items.extend(strange)
    else:
        items[: len(strange)] = strange[: len(items)]
    return tuple(items)


def _overlap(expected: tuple[str, ...], found: list[str]) -> float:
    """1 when the words are the expected ones in order, less a tenth in another order; Jaccard otherwise."""
    if found == list(expected):
        return 1.0
    union = set(expected) | set(found)
    share = len(set(expected) & set(found)) / len(union)
    return min(0.9, share * min(1.0, len(expected) / max(1, len(found))))


def _read_json(text: str) -> list[str] | None:
    try:
        data = json.loads(text.removeprefix("```json").removeprefix("```").removesuffix("```"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        return None
    return [item.lower() for item in data]


def _read_bullets(text: str) -> list[str] | None:
    found = [_BULLET.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    return [item[1].strip().lower() for item in found if item] if found and all(found) else None


def _read_numbers(text: str) -> list[str] | None:
    found = [_NUMBERED.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    if not found or any(item is None or int(item[1]) != n for n, item in enumerate(found, 1)):
        return None
    return [item[2].strip().lower() for item in found if item]


def _read_capitals(text: str) -> list[str] | None:
    return words(text.replace(" AND ", " ")) if text.isupper() and text.count("\n") == 0 else None


def _read_commas(text: str) -> list[str] | None:
    parts = (text[:1].lower() + text[1:]).rstrip(".").split(",")
    return [part.strip() for part in parts] if len(parts) > 1 and all(len(words(p)) == 1 for p in parts) else None


def _read_word(text: str) -> list[str] | None:
    return words(text) if len(text.split()) == 1 and len(words(text)) == 1 else None


_READERS: dict[Style, Callable[[str], list[str] | None]] = {
    "json": _read_json, "bullets": _read_bullets, "numbers": _read_numbers,
    "capitals": _read_capitals, "commas": _read_commas, "word": _read_word,
}  # fmt: skip
_WRITERS: dict[Style, Callable[[tuple[str, ...]], str]] = {
    "json": lambda items: json.dumps(list(items)),
    "bullets": lambda items: "\n".join(f"- {item}" for item in items),
    "numbers": lambda items: "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1)),
    "capitals": lambda items: ", ".join(items).upper(),
    "commas": ", ".join,
    "word": " ".join,
}


def _inside(style: Style, text: str) -> list[str] | None:
    """The items of a list in the right form with other text around it, or None."""
    if style == "json":
        start, end = text.find("["), text.rfind("]")
        return _read_json(text[start : end + 1]) if 0 <= start < end else None
    if style in ("bullets", "numbers"):
        pattern = _BULLET if style == "bullets" else _NUMBERED
        return _READERS[style]("\n".join(line for line in text.splitlines() if pattern.fullmatch(line.strip())))
    lines = [found for line in text.splitlines() if (found := _READERS[style](line.strip())) is not None]
    return lines[0] if len(lines) == 1 else None


FAMILY = Family(draw, quality, candidates)
