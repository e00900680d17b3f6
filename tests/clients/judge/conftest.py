"""`plaudit judge` as it is typed, and an OpenAI-compatible server that judges by a script."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import cli

if TYPE_CHECKING:
    from conftest import WireServer

ENTRIES = {"judge": EntryPoint("judge", "plaudit.judge.cli:app", cli.GROUP)}
CONSTITUTION = """
guideline_version = "2026-03"

[[principles]]
id = "helpful"
text = "The better response helps more."

[[principles]]
id = "harmless"
text = "The better response does no harm."
weight = 3
safety = true

[price]
prompt = 2.0
completion = 10.0
"""


@pytest.fixture
def judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`judge(*args)` is (exit code, standard output, standard error), beside a constitution."""
    monkeypatch.chdir(tmp_path)
    Path("constitution.toml").write_text(CONSTITUTION)

    def call(*args: str) -> tuple[int, str, str]:
        code = cli.run(("judge", *args), ENTRIES)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def said(verdict: str, principles: str = "helpful", why: str = "It says more.") -> str:
    return f"{why}\nPrinciples: {principles}\nVerdict: {verdict}"


def choice(text: str, odds: dict[str, float] | None = None, index: int = 0) -> dict[str, Any]:
    """A choice; with the log-probabilities of its last token, and of others in its place."""
    made: dict[str, Any] = {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if odds is not None:
        cut = text.rindex(" ")
        top = [{"token": token, "logprob": math.log(p)} for token, p in odds.items()]
        last = {"token": text[cut:], "logprob": math.log(odds[text[cut:]]), "bytes": list(text[cut:].encode())}
        first = {"token": text[:cut], "logprob": -0.1, "bytes": list(text[:cut].encode()), "top_logprobs": []}
        made["logprobs"] = {"content": [first, {**last, "top_logprobs": top}]}
    return made


@pytest.fixture
def endpoint(server: WireServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[WireServer]:
    """`server.judges(prompt, a, b)` gives the choice for a comparison as it is shown; by default the longer wins."""

    def longer(_prompt: str, a: str, b: str) -> dict[str, Any]:
        return choice(said("A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"))

    server.judges = longer  # type: ignore[attr-defined]
    server.usage = {"prompt_tokens": 100, "completion_tokens": 20}  # type: ignore[attr-defined]

    def answer(seen: Any) -> tuple[int, Any]:
        asked = seen.body["messages"][-1]["content"]
        texts = re.findall(r"<text-[0-9a-f]{12}>\n(.*?)\n</text-[0-9a-f]{12}>", asked, re.DOTALL)
        assert len(texts) == 3 and seen.path == "/v1/chat/completions"
        if "LONG" in texts[0]:
            return 400, {"error": {"message": "too many tokens", "code": "context_length_exceeded"}}
        made = [{**server.judges(*texts), "index": i} for i in range(seen.body["n"])]  # type: ignore[attr-defined]
        return 200, {"choices": made, "usage": server.usage}  # type: ignore[attr-defined]

    monkeypatch.setattr(server, "_answer", answer)
    yield server


@pytest.fixture
def rows() -> Callable[[str], list[dict[str, Any]]]:
    return lambda name: [json.loads(line) for line in Path(name).read_text().splitlines()]


@pytest.fixture
def pairs() -> Callable[..., str]:
    """`pairs(n)` writes n comparisons, of which the odd ones have the longer response in second place."""

    def write(n: int, **more: Any) -> str:
        texts = [("a longer answer", "short") if i % 2 == 0 else ("short", "a longer answer") for i in range(n)]
        made = [{"id": f"p{i}", "prompt": f"q {i}", "response_a": a, "response_b": b} for i, (a, b) in enumerate(texts)]
        Path("pairs.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in made))
        return "pairs.jsonl"

    return write
