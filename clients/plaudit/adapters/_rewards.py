"""What every adapter does around a call: how its client is set up, and what is made of the scores."""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from .._async_client import AsyncClient
from .._retry import RetryPolicy
from .._settings import environment_timeout
from ..errors import InvalidInput, Unavailable
from ..types import Identity, Item, Message, Prompt, ScoreResult, Scores, ServerInfo

log = logging.getLogger("plaudit")


def trainer(**own: Any) -> dict[str, Any]:
    """How a trainer's client is set up unless told otherwise: one revision for the whole run, and patience."""
    patience = {"retry": RetryPolicy(retries=None), "timeout": environment_timeout()}
    return {"pin": True, "priority": "batch", **patience, **own}


@functools.cache
def async_client(url: str | None) -> AsyncClient:
    """One for all calls of a trainer's process."""
    return AsyncClient(url, **trainer())


class Ledger:
    """What one reward function has seen: which model answered, and whether the trainer's lengths fit it.

    `max_length`: the tokens of the trainer's longest prompt and response together, None if it is not known.
    """

    def __init__(self, name: str, max_length: int | None = None) -> None:
        self.name = name
        self.max_length = max_length
        self.compared = max_length is None
        self.identity: Identity | None = None
        self.changes = 0

    def compare(self, info: ServerInfo) -> None:
        """Warn, once, if the trainer may send more tokens than the served model reads."""
        if self.compared:
            return
        self.compared = True
        reads = longest(info)
        if self.max_length is not None and reads is not None and self.max_length > reads:
            log.warning(
                "%s: the trainer's prompts and responses have up to %d tokens, but %s reads at most %d: longer ones "
                "get no score (or are cut, with overlong='truncate_prompt'); lower the trainer's lengths, or serve "
                "a model that reads more",
                *(self.name, self.max_length, info.identity.model, reads),
            )

    def settle(self, scores: Scores) -> Scores:
        """The scores, with a word in the log on what is missing or has changed. Raises Unavailable if it may yet
        be scored: a step without a server is no step."""
        if error := scores.unfinished:
            raise Unavailable(f"{self.name}: {error.code}: {error.message}", code=error.code)
        if scores.failed and (error := scores.failed[0].error):
            some = f"{len(scores.failed)} of {len(scores)}"
            log.warning("%s: %s responses have no score, the first: %s: %s", self.name, some, error.code, error.message)
        if scores.identity is not None:
            if self.identity not in (None, scores.identity):
                self.changes += 1
                log.warning("%s: the reward model is now %s, before %s", self.name, scores.identity, self.identity)
            self.identity = scores.identity
        return scores

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Of one call, by name. `failed` and `truncated` are shares of the responses, `tokens` and `std` (what the
        members of an ensemble dispute) means over those that were scored."""
        done = [result for result in scores if result.score is not None]
        values = {
            "failed": (len(scores) - len(done)) / max(1, len(scores)),
            "truncated": sum(result.truncated is not None for result in done) / max(1, len(scores)),
            "revision_changes": float(self.changes),
        }
        tokens = [result.tokens for result in done if result.tokens is not None]
        disputed = [result.extra["std"] for result in done if "std" in result.extra]
        values |= {"tokens": statistics.fmean(tokens)} if tokens else {}
        values |= {"std": statistics.fmean(disputed)} if disputed else {}
        return {f"{self.name}/{key}": value for key, value in values.items()}


@functools.cache
def ledger_of(name: str, url: str | None, max_length: int | None) -> Ledger:
    """One for all calls of a trainer's process."""
    return Ledger(name, max_length)


def longest(info: ServerInfo) -> int | None:
    """The tokens that the served model reads of an item; None if the server does not say."""
    models = [m for m in info.details.get("models") or () if m.get("revision") == info.identity.revision]
    length = (models[0] if models else info.details).get("max_length")
    return length if isinstance(length, int) else None


def grouped(items: list[Item]) -> list[Item]:
    """Neighbours that answer the same prompt as one item each: it travels, and is computed, once."""
    together: list[Item] = []
    for prompt, group in groupby(items, _shared_prompt):
        members: list[Any] = list(group)
        if prompt is not None and len(members) > 1:
            members = [{"prompt": prompt, "responses": [member["response"] for member in members]}]
        together += members
    return together


def logs(result: ScoreResult) -> dict[str, float]:
    """What trainers log of one response: the same keys always, and numbers only. Raises ItemFailed if it has no score:
    not every trainer has a way to say that one is missing."""
    tokens = math.nan if result.tokens is None else float(result.tokens)
    return {"score": float(result), "tokens": tokens, "truncated": float(result.truncated is not None)}


def conversation(prompt: Any) -> Prompt:
    """A prompt as trainers keep it in tables (a text, or messages in any sequence) as the client takes it."""
    return prompt if isinstance(prompt, str) else [message(turn) for turn in prompt]


def message(turn: Mapping[str, Any]) -> Message:
    """Role and text of a turn. Raises InvalidInput if it says more than that: a score would silently leave it out."""
    content = turn.get("content")
    if isinstance(content, (list, tuple)) and all(part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    more = sorted(key for key, value in turn.items() if value and key not in ("role", "content"))
    if more or not isinstance(content, str):
        what = f"the fields {more}" if more else f"content of type {type(content).__name__}"
        raise InvalidInput(f"a turn of the role {turn.get('role')!r} has {what}, which a score would leave out")
    return Message(role=turn["role"], content=content)


def _shared_prompt(item: Item) -> Any:
    return item["prompt"] if isinstance(item, Mapping) and item.keys() == {"prompt", "response"} else None
