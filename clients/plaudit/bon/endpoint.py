"""Samples from behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, TGI, hosted ones.

`/v1/chat/completions`, or `/v1/completions` for raw prompts. Retries, Retry-After and the deadline are those of the
SDK's own requests. A server that ignores `n` is asked again for what is missing. Each request has a seed of its own,
made from the keys of its samples, so that a server that honours it gives the same samples again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _checked as checked
from .._client import Client
from .._settings import ENDPOINT_KEY_VARIABLE, endpoint_key
from .._wire import Reply, Request, object_fields
from ..errors import Unauthorized
from ..types import Prompt
from .samples import Generated, Sampling


@dataclass(frozen=True, slots=True)
class Completion(Request):
    """A request whose body is sent as it is: `deadline_ms` is unknown to these servers."""

    def body(self, seconds_left: float | None) -> bytes | None:
        return None if self.fields is None else b"{%b}" % self.fields


class EndpointPolicy:
    """A policy behind `url`, with or without its `/v1`. The key comes from the environment alone."""

    def __init__(self, url: str, model: str, how: Sampling, *, timeout: float | None, concurrency: int) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        self._client = Client(base, api_key=endpoint_key(), timeout=timeout, concurrency=concurrency)
        self._options: dict[str, Any] = {"model": model, "temperature": how.temperature, "top_p": how.top_p}
        self._options["max_tokens"] = how.max_new_tokens
        self._raw = how.raw
        self.name, self.ahead = model, concurrency

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def sample(self, prompt: Prompt, keys: Sequence[str]) -> list[Generated]:
        """One `Generated` for each key. Raises Refused, Unavailable, ResponseInvalid."""
        made: list[Generated] = []
        while len(made) < len(keys):
            made += self._ask(prompt, len(keys) - len(made), seed=int(keys[len(made)][:8], 16) >> 1)
        return made

    def _ask(self, prompt: Prompt, n: int, seed: int) -> list[Generated]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        asked = {"prompt": prompt} if self._raw else {"messages": messages}
        path = "/v1/completions" if self._raw else "/v1/chat/completions"
        request = Completion("POST", path, object_fields({**self._options, **asked, "n": n, "seed": seed}))
        try:
            return self._client._run(self._client._core._ask(request, lambda reply: _parse(reply, n)))
        except Unauthorized as error:
            why = f"{self._client.settings.base_url} does not take the key: {error.reason}"
            raise Unauthorized(f"{why}; set {ENDPOINT_KEY_VARIABLE}", url=error.url, status=error.status) from None


def _parse(reply: Reply, n: int) -> list[Generated]:
    """The choices of an answer, checked. Raises ResponseInvalid."""
    try:
        answer = checked.object_of(json.loads(reply.body), "the answer")
    except ValueError:
        checked.invalid("it is not JSON; is this an OpenAI-compatible endpoint?")
    choices = [checked.object_of(choice, "choices[..]") for choice in checked.list_of(answer, "choices")]
    if not 1 <= len(choices) <= n:
        checked.invalid(f"{n} choices were asked for and {len(choices)} came back")
    tokens = (answer.get("usage") or {}).get("completion_tokens") if len(choices) == 1 else None
    return [_generated(choice, tokens) for choice in sorted(choices, key=lambda choice: choice.get("index") or 0)]


def _generated(choice: Mapping[str, Any], tokens: int | None) -> Generated:
    text = choice["message"].get("content") if "message" in choice else choice.get("text")
    reason = checked.optional_text(choice.get("finish_reason"))
    if text is None:
        return Generated(None, reason, failure={"code": "no_content", "message": "the choice holds no text"})
    return Generated(checked.text({"text": text}, "text"), reason, tokens)
