"""Every failure that leaves the server, and the one table from failure to HTTP.

RequestError              fails a whole request; its code is a row of RULES
plaudit_model ItemError   one item cannot be scored; its codes are rows of RULES
engine_errors EngineError one item, or the admission of a request; its codes are rows of RULES

A failed item among several is `score: null` with the error beside it, and the request is a 200. What fails a
whole request is a RequestError, by the rules of `whole_failure`. Messages never repeat what the client sent.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from plaudit_model.errors import ItemError

from .engine_errors import EngineError, Overloaded


@dataclass(frozen=True, slots=True)
class Rule:
    """What a code means in HTTP. `retry_after` (s) is said of a retryable failure that brings no time itself."""

    status: int
    type: str
    retry_after: float | None = None

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.retry_after is not None


_TOO_LARGE = Rule(413, "invalid_request_error")

RULES: dict[str, Rule] = {
    # the envelope
    **dict.fromkeys(("invalid_http", "invalid_json"), Rule(400, "invalid_request_error")),
    **dict.fromkeys(
        ("invalid_request", "unknown_field", "invalid_shape", "missing_statistics", "ambiguous_model"),
        Rule(422, "invalid_request_error"),
    ),
    "unknown_model": Rule(404, "not_found_error"),
    "not_found": Rule(404, "not_found_error"),
    "method_not_allowed": Rule(405, "invalid_request_error"),
    "body_timeout": Rule(408, "timeout_error"),
    "too_many_items": _TOO_LARGE,
    "body_too_large": _TOO_LARGE,
    "unsupported_encoding": Rule(415, "invalid_request_error"),
    "foreign_page": Rule(403, "authentication_error"),
    "host_not_allowed": Rule(421, "invalid_request_error"),
    "headers_too_large": Rule(431, "invalid_request_error"),
    "unauthorized": Rule(401, "authentication_error"),
    # one item
    **dict.fromkeys(
        ("too_long", "invalid_unicode", "empty_input", "invalid_messages", "invalid_token_ids",
         "foreign_special_tokens", "rendered_text_refused", "template_error", "non_finite_score", "worker_crashed",
         "scoring_failed", "out_of_memory"), Rule(422, "item_error"),
    ),
    # the engine
    "too_large": _TOO_LARGE,
    "rate_limited": Rule(429, "overloaded_error", retry_after=1.0),
    "overloaded": Rule(503, "overloaded_error", retry_after=1.0),
    "draining": Rule(503, "overloaded_error", retry_after=5.0),
    "unavailable": Rule(503, "overloaded_error", retry_after=2.0),
    "asleep": Rule(503, "overloaded_error", retry_after=5.0),
    "worker_failed": Rule(503, "server_error"),
    "deadline_exceeded": Rule(504, "timeout_error", retry_after=0.0),
    "internal_error": Rule(500, "server_error"),
}  # fmt: skip
"""One row a code. `rate_limited` is reserved for quotas of one client; capacity is 503, which trainers retry."""

JITTER = 0.2
"""Retry-After is spread by this share, so that refused clients do not come back together."""


class RequestError(Exception):
    """A whole request fails. `param` is the path of the field at fault, in the server's own words."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.rule = RULES[code]
        self.status = self.rule.status
        self.code, self.message, self.param, self.headers = code, message, param, headers
        self.retry_after = self.rule.retry_after if retry_after is None else retry_after

    def body(self, request_id: str, draw: Callable[[], float] = random.random) -> tuple[dict[str, Any], dict[str, str]]:
        """The error's JSON and its headers. `draw` gives random numbers in [0, 1) for the jitter."""
        error: dict[str, Any] = {
            "code": self.code, "message": self.message, "type": self.rule.type, "param": self.param,
            "retryable": self.rule.retryable,
        }  # fmt: skip
        headers = dict(self.headers)
        if self.retry_after is not None:
            wait = self.retry_after * (1 + JITTER * (2 * draw() - 1))
            error["retry_after_ms"] = math.ceil(wait * 1000)
            headers["retry-after"] = str(math.ceil(wait))
        return {"error": {**error, "request_id": request_id}}, headers


def from_engine(error: EngineError, *, param: str | None = None) -> RequestError:
    """An engine's error as the failure of a whole request."""
    retry_after = error.retry_after if isinstance(error, Overloaded) else None
    return RequestError(error.code, str(error), param=param, retry_after=retry_after)


def from_item(error: ItemError | EngineError, *, param: str | None = None) -> RequestError:
    """An item's error as the failure of the request that holds it."""
    return (
        from_engine(error, param=param)
        if isinstance(error, EngineError)
        else RequestError(error.code, error.message, param=param)
    )


def item_json(error: ItemError | EngineError) -> dict[str, Any]:
    """An item's error as it stands beside `score: null`."""
    rule = RULES[error.code]
    return {"code": error.code, "message": str(error), "type": rule.type, "retryable": rule.retryable}


def whole_failure(errors: Iterable[ItemError | EngineError | None]) -> RequestError | None:
    """The failure of a request, given each item's error or None, if the request fails as a whole.

    It does when its only item failed, and when every item failed for one and the same retryable reason (their
    deadline, a drain): the client then retries the request, not 4,096 items.
    """
    found = list(errors)
    first = found[0] if found else None
    if first is None or None in found:
        return None
    alike = RULES[first.code].retryable and all(error is not None and error.code == first.code for error in found)
    return from_item(first) if len(found) == 1 or alike else None
