"""The wire format: requests out, answers in, every answer checked. No sockets, no clock.

An answer is used as a whole or not at all: a list of another length, a result in another place, a number that
is not finite, a null without an error, or an error beside a number is `ResponseInvalid`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

from . import _checked as checked
from ._items import Chunk, Limits, Place, encode
from ._retry import Failure
from .types import Comparison, Identity, ItemError, ScoreResult, Scores, ServerInfo, Timing, Truncation, Usage

ENVELOPE_BYTES = 4096
"""Kept free in a body for everything that is not an item."""

LONGEST_DEADLINE_MS = 24 * 60 * 60 * 1000
"""The wire's limit."""

_RESULT_FIELDS = frozenset(
    ("index", "item_index", "response_index", "score", "tokens", "truncated", "cached", "attributes", "error")
)


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. `fields` is the inside of the JSON object, without the deadline: that is added when the
    request is sent, because it is the time left by then. `items`: how much work it is, for choosing a server."""

    method: str
    path: str
    fields: bytes | None = None
    items: int = 1

    def body(self, seconds_left: float | None) -> bytes | None:
        """The body, with the `deadline_ms` that is left. Without a deadline it is the longest there is: a server
        that is told nothing sets one of its own."""
        if self.fields is None:
            return None
        left = LONGEST_DEADLINE_MS if seconds_left is None else min(int(seconds_left * 1000), LONGEST_DEADLINE_MS)
        return b'{%b,"deadline_ms":%d}' % (self.fields, max(1, left))


@dataclass(frozen=True, slots=True)
class Reply:
    """One complete HTTP response. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def object_fields(values: Mapping[str, Any]) -> bytes:
    """The inside of a JSON object: `"key":value` pairs without the braces."""
    return encode(dict(values))[1:-1]


def score_request(chunk: Chunk, options: bytes) -> Request:
    """`POST /score` for the items of one chunk."""
    fields = b'"items":[' + chunk.items_json + b"]"
    return Request("POST", "/score", fields + b"," + options if options else fields, len(chunk.places))


def failure_of(reply: Reply) -> Failure | None:
    """The failure that a reply reports, None for a 200. A body that is not ours (a proxy's) is no obstacle."""
    if reply.status == 200:
        return None
    error = _error_object(reply.body)
    request_id = error.get("request_id") or reply.headers.get("x-request-id")
    moved = f"it sends on to {reply.headers.get('location', 'nowhere')!r}" if 300 <= reply.status < 400 else None
    said = moved or error.get("message") or reply.body[:200].decode(errors="replace").strip()
    return Failure(
        kind="status",
        status=reply.status,
        message=str(said or "no reason given"),
        code=checked.optional_text(error.get("code")),
        param=checked.optional_text(error.get("param")),
        type=checked.optional_text(error.get("type")),
        retryable=error["retryable"] if isinstance(error.get("retryable"), bool) else None,
        retry_after=_retry_after(error, reply.headers),
        request_id=checked.optional_text(request_id),
    )


def unfinished(scores: Scores) -> Failure | None:
    """The failure of an answer in which an item may yet get a score. What has one comes from the server's cache
    when the request is repeated."""
    error = scores.unfinished
    return None if error is None else Failure("status", error.message, status=503, code=error.code, retryable=True)


def parse_scores(reply: Reply, places: Sequence[Place]) -> Scores:
    """The checked results of one `/score` request. Raises ResponseInvalid."""
    answer = checked.object_of(_json(reply), "the answer")
    parsed = parse_results(checked.list_of(answer, "results"), places)
    scores = checked.list_of(answer, "scores")
    if len(scores) != len(places):
        checked.invalid(f"{len(places)} items were sent and {len(scores)} scores came back")
    for position, (result, score) in enumerate(zip(parsed, scores, strict=True)):
        if score != result.score:
            checked.invalid(f"scores[{position}] is {score!r} but the result there says {result.score!r}")
    return Scores(
        parsed,
        parse_identity(answer),
        transform=str(answer.get("transform", "none")),
        request_ids=_request_ids(answer),
        usage=_usage(answer.get("usage")),
        timing=_timing(answer.get("timing")),
    )


def parse_results(results: Sequence[Any], places: Sequence[Place]) -> tuple[ScoreResult, ...]:
    """The checked `results` of an answer, one for each place. Raises ResponseInvalid."""
    if len(results) != len(places):
        checked.invalid(f"{len(places)} items were sent and {len(results)} results came back")
    return tuple(map(_result, range(len(places)), results, places))


def parse_identity(answer: Mapping[str, Any]) -> Identity:
    """Model, revision and numerics of an answer. Raises ResponseInvalid."""
    return Identity(checked.text(answer, "model"), checked.text(answer, "revision"), checked.text(answer, "numerics"))


def parse_comparison(reply: Reply) -> Comparison:
    """The checked answer of `/compare`. Raises ResponseInvalid."""
    answer = checked.object_of(_json(reply), "the answer")
    tie = answer.get("tie_probability")
    return Comparison(
        probability=checked.probability(answer.get("probability"), "probability"),
        margin=checked.finite(answer.get("margin"), "margin"),
        identity=parse_identity(answer),
        tie_probability=None if tie is None else checked.probability(tie, "tie_probability"),
        request_id=checked.optional_text(answer.get("request_id")),
    )


def parse_info(reply: Reply, model: str | None = None) -> ServerInfo:
    """The checked answer of `/info`, with the identity of `model` if that is one of several. Raises
    ResponseInvalid."""
    answer = checked.object_of(_json(reply), "the answer")
    limits = checked.object_of(answer.get("limits"), "limits")
    models = answer.get("models") or ()
    served = next((entry for entry in models if isinstance(entry, dict) and entry.get("model") == model), answer)
    items, size = (checked.positive(limits.get(name), f"limits.{name}") for name in ("max_items", "max_body_bytes"))
    return ServerInfo(parse_identity(served), items, size, details=answer)


def parse_models(reply: Reply) -> tuple[str, ...]:
    """The ids that `/v1/models` lists. Raises ResponseInvalid."""
    models = checked.list_of(checked.object_of(_json(reply), "the answer"), "data")
    return tuple(checked.text(checked.object_of(model, "data[..]"), "id") for model in models)


def limits_of(info: ServerInfo) -> Limits:
    """What the items of one request may be, from what a whole request may be."""
    return Limits(info.max_items, max(1, info.max_body_bytes - ENVELOPE_BYTES))


def _result(position: int, value: Any, place: Place) -> ScoreResult:
    where = f"results[{position}]"
    result = checked.object_of(value, where)
    if result.get("index") != position:
        checked.invalid(f"{where} carries index {result.get('index')!r}: the results are out of order")
    error = _item_error(result.get("error"), where)
    score = result.get("score")
    if (score is None) != (error is not None):
        both = f"the score {score!r} and the error {result.get('error')!r}"
        checked.invalid(f"{where} has {both}; exactly one must be there")
    tokens = result.get("tokens")
    return ScoreResult(
        score=None if score is None else checked.finite(score, f"{where}.score"),
        index=place.index,
        item_index=place.item_index,
        response_index=place.response_index,
        tokens=None if tokens is None else checked.count(tokens, f"{where}.tokens"),
        truncated=_truncation(result.get("truncated"), where),
        cached=bool(result.get("cached", False)),
        attributes=_attributes(result.get("attributes"), where),
        error=error,
        extra={key: value for key, value in result.items() if key not in _RESULT_FIELDS},
    )


def _item_error(value: Any, where: str) -> ItemError | None:
    if value is None:
        return None
    error = checked.object_of(value, f"{where}.error")
    return ItemError(checked.text(error, "code"), str(error.get("message", "")), error.get("retryable") is True)


def _truncation(value: Any, where: str) -> Truncation | None:
    if value is None:
        return None
    cut = checked.object_of(value, f"{where}.truncated")
    return Truncation(checked.text(cut, "side"), checked.count(cut.get("tokens"), f"{where}.truncated.tokens"))


def _attributes(value: Any, where: str) -> Mapping[str, float] | None:
    if value is None:
        return None
    heads = checked.object_of(value, f"{where}.attributes")
    return {name: checked.finite(number, f"{where}.attributes.{name}") for name, number in heads.items()}


def _request_ids(answer: Mapping[str, Any]) -> tuple[str, ...]:
    request_id = checked.optional_text(answer.get("request_id"))
    return () if request_id is None else (request_id,)


def _usage(value: Any) -> Usage:
    given = {} if value is None else checked.object_of(value, "usage")
    return Usage(**{name: checked.count(given.get(name) or 0, f"usage.{name}") for name in Usage.__dataclass_fields__})


def _timing(value: Any) -> Timing:
    given = {} if value is None else checked.object_of(value, "timing")
    return Timing(
        **{name: checked.finite(given.get(name) or 0.0, f"timing.{name}") for name in Timing.__dataclass_fields__}
    )


def _json(reply: Reply) -> Any:
    def refuse(constant: str) -> NoReturn:
        checked.invalid(f"it holds {constant}, which is no number")

    try:
        return json.loads(reply.body, parse_constant=refuse)
    except (ValueError, RecursionError):
        start = reply.body[:80].decode(errors="replace")
        checked.invalid(f"it is not JSON but starts with {start!r}; is this a plaudit server?")


def _error_object(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = answer.get("error") if isinstance(answer, dict) else None
    return error if isinstance(error, dict) else {}


def _retry_after(error: Mapping[str, Any], headers: Mapping[str, str]) -> float | None:
    """Seconds, from `retry_after_ms` or the Retry-After header (seconds, or a date read against `Date`)."""
    milliseconds = error.get("retry_after_ms")
    if isinstance(milliseconds, (int, float)) and math.isfinite(milliseconds):
        return max(0.0, milliseconds / 1000)
    header = headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - parsedate_to_datetime(headers["date"])).total_seconds()
        except (ValueError, TypeError, KeyError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
