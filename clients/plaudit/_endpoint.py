"""Any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, TGI, hosted ones.

Retries, Retry-After and the deadline are those of the SDK's own requests. The key comes from the environment alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from . import _checked as checked
from ._client import Client
from ._retry import RetryPolicy
from ._settings import ENDPOINT_KEY_VARIABLE, endpoint_key
from ._wire import Reply, Request, object_fields
from .errors import Unauthorized

T = TypeVar("T")

ENDLESS = 3600.0
"""Seconds after which an endpoint without an answer is taken for silent, if the call itself has no limit."""


@dataclass(frozen=True, slots=True)
class Completion(Request):
    """A request whose body is sent as it is: `deadline_ms` is unknown to these servers."""

    def body(self, seconds_left: float | None) -> bytes | None:
        return None if self.fields is None else b"{%b}" % self.fields


class Endpoint:
    """The endpoint at `url`, with or without its `/v1`."""

    def __init__(self, url: str, *, timeout: float, attempt_timeout: float, concurrency: int) -> None:
        """`timeout` 0 means no limit. With `attempt_timeout` 0 an attempt may take all of it, an hour where there is no
        limit: an answer may be long, and one that is cut off is made again from its beginning."""
        patient = attempt_timeout or timeout or ENDLESS
        limits: dict[str, Any] = {"timeout": timeout or None, "attempt_timeout": patient}
        base = url.rstrip("/").removesuffix("/v1")
        self._client = Client(base, api_key=endpoint_key(), concurrency=concurrency, **limits)

        self._patient = self._client.with_options(retry=RetryPolicy(retries=None))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, path: str, fields: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], T]) -> T:
        """`parse` of the answer's JSON object. Raises Refused, Unavailable, ResponseInvalid."""
        request = Completion("POST", path, object_fields(fields))
        try:
            answer = self._client._run(self._client._core._ask(request, lambda reply: parse(_object(reply))))
        except Unauthorized as error:
            why = f"{self._client.settings.base_url} does not take the key: {error.reason}"
            raise Unauthorized(f"{why}; set {ENDPOINT_KEY_VARIABLE}", url=error.url, status=error.status) from None
        self._client = self._patient  # it is there: from now on, for all of `timeout`
        return answer


def choices_of(answer: Mapping[str, Any], n: int) -> list[Mapping[str, Any]]:
    """The choices of an answer, by index: at least one, at most `n`. Raises ResponseInvalid."""
    choices = [checked.object_of(choice, "choices[..]") for choice in checked.list_of(answer, "choices")]
    if not 1 <= len(choices) <= n:
        checked.invalid(f"{n} choices were asked for and {len(choices)} came back")
    return sorted(choices, key=lambda choice: choice.get("index") or 0)


def _object(reply: Reply) -> Mapping[str, Any]:
    try:
        return checked.object_of(json.loads(reply.body), "the answer")
    except ValueError:
        checked.invalid("it is not JSON; is this an OpenAI-compatible endpoint?")
