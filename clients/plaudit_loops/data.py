"""Rows of JSONL files, and the order they are taken in.

A prompt is a text or a list of messages {"role", "content"}. Nothing is dropped without a count; what cannot be read
is an error with its line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plaudit import InvalidInput, Prompt
from plaudit._jsonl import open_input
from plaudit._row_files import json_rows, located
from plaudit_model import starter as tasks

from . import starter
from .policy import Policy


@dataclass(frozen=True)
class Row:
    """A prompt with responses: one to imitate, a chosen and a rejected one, or none."""

    prompt: Prompt
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Encoded:
    """A row as token ids. `responses` end with the end token."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]


def prompt_rows(files: Sequence[str], starter_prompts: int, seed: int) -> list[Row]:
    """Prompts to sample responses to. Messages may end with an assistant's turn, which is left out."""
    made = lambda: (Row(task.prompt, ()) for task in tasks.tasks(starter_prompts, seed))  # noqa: E731
    return _all(files, made, lambda row: Row(_split(row, needs_response=False)[0], ()))


def sft_rows(files: Sequence[str], starter_records: int, seed: int) -> list[Row]:
    """Prompts with a response to imitate."""
    made = lambda: (Row(prompt, (answer,)) for prompt, answer in starter.answers(starter_records, seed))  # noqa: E731
    return _all(files, made, lambda row: Row(*_split(row, needs_response=True)))


def pair_rows(files: Sequence[str]) -> list[Row]:
    """Prompts with a chosen and a rejected response."""
    return _all(files, None, lambda row: Row(_prompt(row), (_response(row, "chosen"), _response(row, "rejected"))))


def encode(rows: Sequence[Row], policy: Policy, *, max_length: int) -> tuple[list[Encoded], int]:
    """The rows as token ids, and how many were left out for their length. Raises InvalidInput if none is left."""
    encoded = []
    for row in rows:
        ids = tuple(policy.encode_prompt(row.prompt))
        responses = tuple(tuple(policy.encode_response(text)) for text in row.responses)
        if len(ids) + max((len(r) for r in responses), default=0) <= max_length:
            encoded.append(Encoded(row.prompt, ids, responses))
    if not encoded:
        raise InvalidInput(f"none of the {len(rows)} rows has at most {max_length} tokens; raise the limit")
    return encoded, len(rows) - len(encoded)


def fingerprint(rows: Sequence[Encoded]) -> str:
    """sha256 of the token ids, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.prompt_ids, row.responses)).encode())
    return digest.hexdigest()


def members(count: int, size: int, seed: int, step: int) -> list[int]:
    """The rows of step `step`: consecutive slices of one permutation after another (the last slice of one may begin
    the next). A pure function, so a resumed run needs no memory of it."""
    found: list[int] = []
    position = step * size
    while len(found) < size:
        epoch, offset = divmod(position + len(found), count)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        found += [int(i) for i in order[offset : offset + size - len(found)]]
    return found


def _all(
    files: Sequence[str], made: Callable[[], Iterator[Row]] | None, read: Callable[[Mapping[str, Any]], Row]
) -> list[Row]:
    rows = [row for name in files for row in (made() if made and name == starter.NAME else _read(name, read))]
    if not rows:
        raise InvalidInput("there are no rows to train on: name a JSONL file" + (" or `starter`" if made else ""))
    return rows


def _read(path: str, read: Callable[[Mapping[str, Any]], Row]) -> Iterator[Row]:
    with located(path), open_input(path) as lines:
        for _, where, value in json_rows(lines):
            with located(where):
                json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text that a tokenizer takes
                row = read(value)
            yield row


def _split(row: Mapping[str, Any], *, needs_response: bool) -> tuple[Prompt, tuple[str, ...]]:
    if "messages" in row:
        turns = _messages(row["messages"], "messages")
        has_response = turns[-1]["role"] == "assistant"
        if has_response and len(turns) == 1:
            raise InvalidInput("'messages' hold a response and nothing that it answers")
        if needs_response and not has_response:
            raise InvalidInput("'messages' must end with the assistant's turn, which is what is learned")
        return (turns[:-1], (turns[-1]["content"],)) if has_response else (turns, ())
    if not needs_response:
        return _prompt(row), ()
    return _prompt(row), (_response(row, "response" if "response" in row else "completion"),)


def _prompt(row: Mapping[str, Any]) -> Prompt:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if prompt is None:
        raise InvalidInput(f"has no 'prompt'; its fields are {sorted(row)}")
    return _messages(prompt, "prompt")


def _response(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, list):
        turns = _messages(value, name)
        if len(turns) != 1:
            raise InvalidInput(
                f"{name!r} has {len(turns)} messages; a response is one, what comes before is the prompt"
            )
        value = turns[0]["content"]
    if not isinstance(value, str):
        raise InvalidInput(f"has no {name!r} that is a text or messages; its fields are {sorted(row)}")
    return value


def _messages(value: Any, name: str) -> list[Any]:
    turns = value if isinstance(value, list) and value else [None]
    texts = [m.get(key) if isinstance(m, dict) else None for m in turns for key in ("role", "content")]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidInput(f"{name!r} must be a text or a list of messages with role and content, both texts")
    return [{"role": m["role"], "content": m["content"]} for m in value]
