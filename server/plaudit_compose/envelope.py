"""From the bytes of a body to candidates. A bad envelope is a RequestError."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plaudit._items import check
from plaudit.errors import InvalidInput
from plaudit.rewards.compose import Candidate
from plaudit_server.envelope import decode
from plaudit_server.errors import RequestError
from plaudit_server.settings import MAX_ITEMS

SHAPES = (
    '{"prompt", "response", "reference"?}, {"prompt", "responses": [..], "reference"?}, {"messages": [..], '
    '"reference"?}, or {"items": [..]} with items of those shapes; `label` is `reference` in other words'
)
OPTIONS = frozenset({"overlong", "model", "priority", "include", "deadline_ms", "transform"})
"""What a plaudit server's client may send. `overlong` goes on to the models, which are always asked with the
priority `batch`; every answer has its attributes."""

_TOKEN = re.compile(r"[<\[][^<>\[\]\s]{0,64}[>\]]")
_ADDED = re.compile(r"</?s>|.*(?:pad|bos|begin|startof|eos|eot|end|cls|unk|gmask|sop)", re.IGNORECASE)
"""Tokens for the beginning and the end of text, and for padding. What opens a turn is the prompt's own."""


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request. `places`: item and response of each candidate. `single`: {"prompt", "response"}."""

    candidates: Sequence[Candidate]
    places: Sequence[tuple[int, int | None]]
    options: Mapping[str, Any]
    single: bool


def read_score(body: bytes) -> Call:
    """`POST /score`. Raises RequestError."""
    value = _object(body)
    options = {key: value.pop(key) for key in OPTIONS & value.keys()}
    if options.get("transform", "none") != "none":
        raise RequestError("missing_statistics", "composed rewards have no transform", param="transform")
    items = value["items"] if value.keys() == {"items"} else [value]
    if not isinstance(items, list):
        raise RequestError("invalid_shape", f"items must be a list; known here: {SHAPES}", param="items")
    candidates: list[Candidate] = []
    places: list[tuple[int, int | None]] = []
    for index, item in enumerate(items):
        for place, candidate in enumerate(_candidates(item, index)):
            candidates.append(candidate)
            places.append((index, place if "responses" in item else None))
    _bounded(candidates)
    return Call(candidates, places, options, "response" in value)


def read_reward(body: bytes, ends: Sequence[str]) -> list[Candidate]:
    """OpenRLHF's `POST /get_reward`: `query` is the prompt and the response in the policy's template, `prompts` says
    where the response begins, `labels` are the references. Raises RequestError."""
    value = _object(body)
    queries = value.get("query")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RequestError(
            "invalid_shape", 'known here: {"query": [..], "prompts": [..], "labels": [..]}', param="query"
        )
    prompts, labels = (_beside(value, name, len(queries)) for name in ("prompts", "labels"))
    _bounded(queries)
    return [
        Candidate({"text": query}, response_in(query, prompt, ends), label)
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]


def response_in(query: str, prompt: Any, ends: Sequence[str]) -> str | None:
    """What follows the prompt in a query, without the template's ends. None unless the query begins with it, as it
    was rendered, after no more than what a tokenizer adds (`_ADDED`): a prompt's text alone may stand in the template,
    too, as `user` does, and what follows it there is no response."""
    place = query.find(prompt) if isinstance(prompt, str) and prompt else -1
    if place < 0 or _TOKEN.sub(lambda token: "" if _ADDED.match(token[0]) else token[0], query[:place]).strip():
        return None
    response = query[place + len(prompt) :].rstrip()
    while end := next((end for end in ends if response.endswith(end)), None):
        response = response.removesuffix(end).rstrip()
    return response


def _candidates(item: Any, index: int) -> list[Candidate]:
    where = f"items[{index}]"
    if not isinstance(item, dict):
        raise RequestError("invalid_shape", f"{where} is no object; known here: {SHAPES}", param=where)
    named = [name for name in ("reference", "label") if name in item]
    reference = item[named[0]] if named else None
    bare = {key: value for key, value in item.items() if key not in named[:1]}
    try:
        check(bare)
    except InvalidInput as error:
        raise RequestError("invalid_shape", f"{where} {error}; known here: {SHAPES}", param=where) from None
    if "messages" in bare:
        return [Candidate(bare, bare["messages"][-1]["content"], reference)]
    if "responses" not in bare:
        return [Candidate(bare, bare.get("response"), reference)]
    pairs = ({"prompt": bare["prompt"], "response": response} for response in bare["responses"])
    return [Candidate(pair, pair["response"], reference) for pair in pairs]


def _object(body: bytes) -> dict[str, Any]:
    value = decode(body)
    if not isinstance(value, dict):
        raise RequestError("invalid_shape", f"the body is no object; known here: {SHAPES}")
    return value


def _beside(value: Mapping[str, Any], name: str, size: int) -> list[Any]:
    found = value.get(name)
    if found is None:
        return [None] * size
    if not isinstance(found, list) or len(found) != size:
        raise RequestError("invalid_request", f"{name} must be a list as long as query", param=name)
    return found


def _bounded(values: Sequence[Any]) -> None:
    if len(values) > MAX_ITEMS:
        raise RequestError("too_many_items", f"a request takes at most {MAX_ITEMS} items; send several")
