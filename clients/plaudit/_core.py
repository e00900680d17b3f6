"""What a client does, as plans (see `_plan.py`): no sockets, no clock, no threads."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

from . import _wire as wire
from ._endpoints import Endpoints
from ._items import Chunk, Limits, Piece, Place, check, pieces, plan_chunks
from ._plan import Gather, Plan, Send, Sleep, exchange, log, outcome_failure, raise_for
from ._retry import GiveUp
from ._settings import Settings
from ._wire import Reply, Request
from .errors import BadRequest, InvalidInput, ItemFailed, NotFound, PlauditError, RevisionChanged, TimedOut, Unavailable
from .types import Comparison, Item, ItemError, Prompt, Ranking, ScoreResult, Scores, ServerInfo, Timing, Usage

T = TypeVar("T")

UNASKED = Limits(items=64, bytes=256 * 1024)
"""A list within these limits is sent without asking for the server's: every server takes that much."""

ALONE = Place(0, 0, None)
"""The place of a single response: its caller knows of no others."""

PARTS = 8
"""A long list is cut into so many parts for each of several servers: one that dies takes little with it."""

READY_PAUSES = (0.1, 2.0)
"""First and longest pause between two questions for readiness, in seconds."""

SCORE_OPTIONS = ("model", "overlong", "transform", "priority", "include")
COMPARE_OPTIONS = ("model", "overlong", "priority")

CHANCE = random.SystemRandom()
"""Not the global generator: that is the trainer's, seeded alike on all ranks, and must not see that a server hiccuped.
"""


class Core:
    """The plans of one client. `draw` gives random numbers in [0, 1) for the retry pauses."""

    def __init__(self, settings: Settings, draw: Callable[[], float] = CHANCE.random) -> None:
        self.settings = settings
        self._draw = draw
        self._limits: Limits | None = None
        self.endpoints = Endpoints(settings.urls, settings.revision, settings.pin)

    def score(self, prompt: Prompt, response: str) -> Plan[ScoreResult]:
        return (yield from self.score_item({"prompt": prompt, "response": response}))

    def score_item(self, item: Item) -> Plan[ScoreResult]:
        if isinstance(item, Mapping) and "responses" in item:
            raise InvalidInput("the item has several responses: score_items takes it")
        return (yield from self.score_items([item]))[0]

    def score_responses(self, prompt: Prompt, responses: Sequence[str]) -> Plan[Scores]:
        if isinstance(responses, str):
            raise InvalidInput("responses must be a list of texts, got one text: its letters are no responses")
        return (yield from self.score_items([{"prompt": prompt, "responses": list(responses)}]))

    def score_items(self, items: Iterable[Item]) -> Plan[Scores]:
        encoded = pieces(items)
        deadline = yield from self._deadline()
        chunks = yield from self._chunks(encoded, deadline)
        return self.settled((yield from self._score_chunks(chunks, deadline)))

    def score_apart(self, encoded: Sequence[Piece], deadline: float | None) -> Plan[list[Scores | PlauditError]]:
        """Single responses of several callers in as few requests as they fit into: what became of each. A request
        that is refused as a whole is repeated item by item, so that nobody fails for another's item."""
        chunks = plan_chunks(encoded, self._limits or UNASKED)
        own = (Chunk(chunk.items_json, (ALONE,) * len(chunk.places)) for chunk in chunks)
        answers = (yield Gather(tuple(self._outcome(chunk, deadline) for chunk in own), deadline)).value
        outcomes: list[Scores | PlauditError] = []
        for chunk, answer in zip(chunks, answers, strict=True):
            if isinstance(answer, BadRequest) and len(chunk.places) > 1:
                alone = (plan_chunks([encoded[place.item_index]], UNASKED)[0] for place in chunk.places)
                outcomes += (yield Gather(tuple(self._outcome(one, deadline) for one in alone), deadline)).value
            elif isinstance(answer, Scores):
                outcomes += (replace(answer, results=(result,)) for result in answer)
            else:
                outcomes += (copy.copy(answer) for _ in chunk.places)
        return outcomes

    def settled(self, scores: Scores) -> Scores:
        """The scores, unless some are missing and the client was told to raise."""
        if scores.failed and self.settings.on_error == "raise":
            self._raise_failed(scores)
        return scores

    def rank(self, prompt: Prompt, responses: Sequence[str], top_n: int | None) -> Plan[Ranking]:
        if top_n is not None and top_n < 1:
            raise InvalidInput(f"top_n must be at least 1, got {top_n}")
        return ranking((yield from self.score_responses(prompt, responses)), top_n)

    def compare(self, prompt: Prompt, response_a: str, response_b: str) -> Plan[Comparison]:
        check({"prompt": prompt, "responses": [response_a, response_b]})
        pair = {"prompt": prompt, "response_a": response_a, "response_b": response_b}
        request = Request("POST", "/compare", wire.object_fields(pair | self._options(COMPARE_OPTIONS)))
        return (yield from self._ask(request, wire.parse_comparison))

    def info(self) -> Plan[ServerInfo]:
        return (yield from self._ask(Request("GET", "/info"), self._parse_info))

    def models(self) -> Plan[tuple[str, ...]]:
        return (yield from self._ask(Request("GET", "/v1/models"), wire.parse_models))

    def wait_until_ready(self, timeout: float | None) -> Plan[None]:
        request, url = Request("GET", "/readyz"), self.settings.base_url
        started = (yield Sleep(0)).now
        pause, longest = READY_PAUSES
        said = set[tuple[str, str]]()
        for base in itertools.cycle(self.settings.urls):
            heard = yield Send(base, request, self.settings.connect_timeout)
            failure, now = outcome_failure(heard.value, self.settings.connect_timeout), heard.now
            if failure is None:
                return
            if failure.status in (401, 403, 404, *range(300, 400)):
                raise_for(failure, GiveUp("refused"), base + request.path, 1, now - started)
            if (base, failure.message) not in said:
                log.warning("waiting for %s: %s", base, failure.message)
                said.add((base, failure.message))
            left = math.inf if timeout is None else started + timeout - now
            if left <= 0:
                raise TimedOut(
                    f"{url} is not ready after {now - started:.1f} s: {failure.message}; look at the server's log, "
                    "or wait longer",
                    url=url,
                    code=failure.code,
                )
            if base == self.settings.urls[-1]:
                yield Sleep(min(pause, left))
                pause = min(2 * pause, longest)

    def _ask(self, request: Request, parse: Callable[[Reply], T]) -> Plan[T]:
        deadline = yield from self._deadline()
        return (yield from self._ask_until(deadline, request, parse))

    def _ask_until(self, deadline: float | None, request: Request, parse: Callable[[Reply], T]) -> Plan[T]:
        heard = yield Gather((self._exchange(request, deadline, parse),), deadline)
        answer: T = heard.value[0]
        return answer

    def _deadline(self) -> Plan[float | None]:
        if self.settings.timeout is None:
            return None
        return (yield Sleep(0)).now + self.settings.timeout

    def _exchange(self, request: Request, deadline: float | None, *how: Any) -> Plan[Any]:
        return exchange(self.settings, self.endpoints, self._draw, request, deadline, *how)

    def _chunks(self, encoded: Sequence[Piece], deadline: float | None) -> Plan[list[Chunk]]:
        """The items cut into requests; among several servers a long list is cut so that each gets a few parts."""
        chunks = plan_chunks(encoded, UNASKED)
        if len(chunks) == 1 or not chunks:
            return chunks
        limits, servers = (yield from self._server_limits(deadline)), len(self.settings.urls)
        if servers > 1:
            share = -(-sum(len(piece.parts) for piece in encoded) // (PARTS * servers))
            limits = replace(limits, items=min(limits.items, max(UNASKED.items, share)))
        return plan_chunks(encoded, limits)

    def _outcome(self, chunk: Chunk, deadline: float | None) -> Plan[Scores | PlauditError]:
        try:
            return (yield from self._score_chunk(chunk, deadline))
        except PlauditError as error:
            return error

    def _server_limits(self, deadline: float | None) -> Plan[Limits]:
        if self._limits is None:
            info = yield from self._ask_until(deadline, Request("GET", "/info"), self._parse_info)
            self._limits = wire.limits_of(info)
        return self._limits

    def _score_chunks(self, chunks: Sequence[Chunk], deadline: float | None) -> Plan[Scores]:
        """All chunks from one revision. A swap in the middle of a list costs one repetition, not an error."""
        for _ in range(2):
            heard = yield Gather(tuple(self._score_chunk(chunk, deadline) for chunk in chunks), deadline)
            identities = {part.identity for part in heard.value if part.identity is not None}
            if len(identities) <= 1:
                return _joined(heard.value)
        names = " and ".join(sorted(map(str, identities)))
        raise RevisionChanged(
            f"{self.settings.base_url} answered parts of one list as {names}; score it again, and if several servers "
            "share this URL, give them the same model and numerics",
            url=self.settings.base_url,
        )

    def _score_chunk(self, chunk: Chunk, deadline: float | None) -> Plan[Scores]:
        request = wire.score_request(chunk, wire.object_fields(self._options(SCORE_OPTIONS)))
        parse = partial(wire.parse_scores, places=chunk.places)
        try:
            scores: Scores = yield from self._exchange(request, deadline, parse, wire.unfinished)
        except Unavailable as error:
            if self.settings.on_error == "raise":
                raise
            why = ItemError(error.code or "unavailable", str(error), retryable=True)
            return _unscored(chunk, why, error.request_id)
        except BadRequest as error:
            if len(chunk.places) > 1 or not (error.type == "item_error" or error.status == 413):
                raise  # a body with one item alone gets the item's error, or its size, as its own
            return _unscored(chunk, ItemError(error.code or "refused", error.reason), error.request_id)
        except NotFound as error:
            if self.settings.revision is None or error.code != "unknown_model":
                raise
            raise RevisionChanged(f"the pinned revision is not served: {error}", url=error.url) from error
        return scores

    def _options(self, names: Sequence[str]) -> dict[str, object]:
        """The options that go into a body. A pinned revision is part of the model's name, if it has one."""
        options = {name: getattr(self.settings, name) for name in names}
        if self.settings.model and self.settings.revision:
            options["model"] = f"{self.settings.model}@{self.settings.revision}"
        return {name: value for name, value in options.items() if value not in (None, ())}

    def _parse_info(self, reply: Reply) -> ServerInfo:
        return wire.parse_info(reply, self.settings.model)

    def _raise_failed(self, scores: Scores) -> NoReturn:
        first = scores.failed[0]
        assert first.error is not None
        raise ItemFailed(
            f"{len(scores.failed)} of {len(scores)} items have no score; the first is item {first.index}: "
            f"{first.error.code}: {first.error.message} (on_error='none' gives None for such items)",
            url=self.settings.base_url,
            request_id=scores.request_id,
            code=first.error.code,
            index=first.index,
            scores=scores,
        )


def ranking(scores: Scores, top_n: int | None = None) -> Ranking:
    """The scores sorted, best first; equal ones in the order of the input."""
    ranked = sorted((r for r in scores if r.score is not None), key=lambda result: -float(result))
    return Ranking(tuple(ranked[:top_n]), scores.failed, scores.identity)


def _unscored(chunk: Chunk, error: ItemError, request_id: str | None) -> Scores:
    results = tuple(ScoreResult(None, p.index, p.item_index, p.response_index, error=error) for p in chunk.places)
    return Scores(results, request_ids=() if request_id is None else (request_id,))


def _joined(parts: Sequence[Scores]) -> Scores:
    scored = [part for part in parts if part.identity is not None]
    return Scores(
        tuple(result for part in parts for result in part.results),
        identity=scored[0].identity if scored else None,
        transform=scored[0].transform if scored else "none",
        request_ids=tuple(request_id for part in parts for request_id in part.request_ids),
        usage=Usage(*(sum(getattr(part.usage, f.name) for part in parts) for f in fields(Usage))),
        timing=Timing(*(sum(getattr(part.timing, f.name) for part in parts) for f in fields(Timing))),
    )
