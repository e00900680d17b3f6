"""Items: which shapes exist, their JSON, and how a long list is cut into requests. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidInput
from .types import Item

SHAPES: tuple[frozenset[str], ...] = (
    frozenset({"prompt", "response"}), frozenset({"prompt", "responses"}), frozenset({"messages"}), frozenset({"text"}),
    frozenset({"input_ids"}), frozenset({"input_ids", "prompt_tokens"}),
)  # fmt: skip
SHAPES_TEXT = (
    '{"prompt", "response"}, {"prompt", "responses": [..]}, {"messages": [..]}, {"text"} or '
    '{"input_ids", "prompt_tokens"?}'
)
_COMPACT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
KEYS = frozenset().union(*SHAPES)


@dataclass(frozen=True, slots=True)
class Limits:
    """The most items and bytes of one request."""

    items: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One item as JSON: `parts` are scored one by one, `head` and `tail` are written once around them."""

    parts: tuple[bytes, ...]
    head: bytes = b""
    tail: bytes = b""
    flat: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """Where a score belongs: `index` counts the flattened input, `response_index` the item's `responses`."""

    index: int
    item_index: int
    response_index: int | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The items of one request: the inside of its JSON list, and the place of each score it will bring."""

    items_json: bytes
    places: tuple[Place, ...]


def check(item: Mapping[str, Any]) -> None:
    """Raise InvalidInput unless `item` has exactly one native shape and the right types in it."""
    if frozenset(item) not in SHAPES:
        raise InvalidInput(f"has the fields {sorted(item)}; an item is one of {SHAPES_TEXT}")
    for key, value in item.items():
        fits, wanted = _TYPES[key]
        if not fits(value):
            several = "; for several, score_responses or rank" if key == "response" and isinstance(value, list) else ""
            raise InvalidInput(f"{key!r} must be {wanted}, got {_described(value)}{several}")
    if "messages" in item and (not item["messages"] or item["messages"][-1]["role"] != "assistant"):
        raise InvalidInput("'messages' must end with the assistant's turn, which is what is scored")


def pieces(items: Iterable[Item]) -> list[Piece]:
    """The JSON of every item. Raises InvalidInput, naming the item, for one that cannot be sent."""
    found = []
    for index, item in enumerate(items):
        try:
            found.append(_piece(_mapping(item)))
        except InvalidInput as error:
            raise InvalidInput(f"item {index} {error}") from None
    return found


def plan_chunks(pieces: Iterable[Piece], limits: Limits) -> list[Chunk]:
    """Cut the items into requests of at most `limits`, keeping their order.

    The responses of one prompt are spread over several requests only if they do not fit into one. A single
    response that is larger than `limits.bytes` travels alone: the server says that it is too large.
    """
    cutter = _Cutter(limits)
    for item_index, piece in enumerate(pieces):
        cutter.add(item_index, piece)
    return cutter.finish()


def encode(value: Any) -> bytes:
    """Compact UTF-8 JSON. A lone surrogate is sent as an escape, so that the server can name the item."""
    try:
        return _COMPACT.encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"is not JSON: {error}; pass plain strings, lists and numbers") from None


@dataclass(slots=True)
class _Cutter:
    limits: Limits
    chunks: list[Chunk] = field(default_factory=list)
    groups: list[bytes] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    size: int = 0
    index: int = 0

    def add(self, item_index: int, piece: Piece) -> None:
        frame = len(piece.head) + len(piece.tail) + 1
        parts: list[bytes] = []
        for number, part in enumerate(piece.parts):
            needed = len(part) + 1 + (0 if parts else frame)
            if self.places and not self._fits(needed):
                self._group(piece, parts)
                self._close()
                parts, needed = [], len(part) + 1 + frame
            parts.append(part)
            self.size += needed
            self.places.append(Place(self.index, item_index, None if piece.flat else number))
            self.index += 1
        self._group(piece, parts)

    def finish(self) -> list[Chunk]:
        if self.places:
            self._close()
        return self.chunks

    def _fits(self, needed: int) -> bool:
        return len(self.places) < self.limits.items and self.size + needed <= self.limits.bytes

    def _group(self, piece: Piece, parts: Sequence[bytes]) -> None:
        if parts:
            self.groups.append(piece.head + b",".join(parts) + piece.tail)

    def _close(self) -> None:
        self.chunks.append(Chunk(b",".join(self.groups), tuple(self.places)))
        self.groups, self.places, self.size = [], [], 0


def _mapping(item: Item) -> Mapping[str, Any]:
    if isinstance(item, tuple):
        if len(item) != 2:
            raise InvalidInput(f"is a tuple of {len(item)}; a tuple is a pair (prompt, response)")
        return {"prompt": item[0], "response": item[1]}
    if not isinstance(item, Mapping):
        raise InvalidInput(f"is {_described(item)}; an item is one of {SHAPES_TEXT}")
    return item


def _piece(item: Mapping[str, Any]) -> Piece:
    check(item)
    if "responses" not in item:
        return Piece((encode(dict(item)),))
    head = b'{"prompt":' + encode(item["prompt"]) + b',"responses":['
    return Piece(tuple(map(encode, item["responses"])), head, b"]}", flat=False)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _is_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(turn, Mapping) and turn.keys() == {"role", "content"} and all(map(_is_text, turn.values()))
        for turn in value
    )


def _is_prompt(value: Any) -> bool:
    return _is_text(value) or _is_messages(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_count, value))


_MESSAGES_TEXT = 'a list of messages {"role", "content"}, both of them texts'
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_prompt, f"a text or {_MESSAGES_TEXT}"),
    "response": (_is_text, "a text"),
    "responses": (_is_texts, "a list of texts"),
    "messages": (_is_messages, _MESSAGES_TEXT),
    "text": (_is_text, "a text"),
    "input_ids": (_is_ids, "a list of token ids"),
    "prompt_tokens": (_is_count, "a number of tokens"),
}


def _described(value: Any) -> str:
    return "null" if value is None else type(value).__name__
