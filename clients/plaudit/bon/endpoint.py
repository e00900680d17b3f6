"""Samples from behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, TGI, hosted ones.

`/v1/chat/completions`, or `/v1/completions` for raw prompts. Retries, Retry-After and the deadline are those of the
SDK's own requests. A server that ignores `n` is asked again for what is missing. Each request has a seed of its own,
made from the keys of its samples, so that a server that honours it gives the same samples again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import _checked as checked
from .._endpoint import Endpoint, choices_of
from ..types import Prompt
from .samples import Generated, Sampling


class EndpointPolicy:
    """A policy behind `url`, with or without its `/v1`. The key comes from the environment alone."""

    def __init__(self, url: str, model: str, how: Sampling, *, concurrency: int, **limits: float) -> None:
        self._endpoint = Endpoint(url, concurrency=concurrency, **limits)
        self._options: dict[str, Any] = {"model": model, "temperature": how.temperature, "top_p": how.top_p}
        self._options["max_tokens"] = how.max_new_tokens
        self._raw = how.raw
        self.name, self.ahead = model, concurrency

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

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
        fields = {**self._options, **asked, "n": n, "seed": seed}
        return self._endpoint.ask(path, fields, lambda answer: _parse(answer, n))


def _parse(answer: Mapping[str, Any], n: int) -> list[Generated]:
    """The choices of an answer, checked. Raises ResponseInvalid."""
    choices = choices_of(answer, n)
    tokens = (answer.get("usage") or {}).get("completion_tokens") if len(choices) == 1 else None
    return [_generated(choice, tokens) for choice in choices]


def _generated(choice: Mapping[str, Any], tokens: int | None) -> Generated:
    text = choice["message"].get("content") if "message" in choice else choice.get("text")
    reason = checked.optional_text(choice.get("finish_reason"))
    if text is None:
        return Generated(None, reason, failure={"code": "no_content", "message": "the choice holds no text"})
    return Generated(checked.text({"text": text}, "text"), reason, tokens)
