"""The examples of the pages run as they stand, against a server at the address that they name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import AsyncClient, Client
from plaudit.adapters.trl import Reward

if TYPE_CHECKING:
    from conftest import WireServer

PAGES = [Path(__file__).resolve().parents[2] / "docs" / name for name in ("trainers.md", "serving.md")]
BLOCKS = [
    block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]
ADDRESS = "http://127.0.0.1:8000"
CHAT = [{"role": "user", "content": "hi"}]


def example(name: str, url: str, address: str = ADDRESS) -> dict[str, Any]:
    """What the example that begins with `# name` defines, with `url` for the address in it."""
    (code,) = [block for block in BLOCKS if block.startswith(f"# {name}\n")]
    scope: dict[str, Any] = {}
    exec(compile(code.replace(address, url), name, "exec"), scope)
    return scope


def close(scope: dict[str, Any]) -> None:
    if isinstance(scope.get("client"), Client):
        scope["client"].close()


@pytest.mark.parametrize("block", BLOCKS)
def test_every_example_is_python(block: str) -> None:
    compile(block, "a page", "exec")


def test_rejection_sampling(server: WireServer) -> None:
    best = example("rejection sampling", server.url)["best"]

    async def run() -> list[Any]:
        return [found async for found in best(["p", "q"], lambda prompt: ["a", "POISON", "long one"])]

    score = server.score_of("p", "long one")
    assert asyncio.run(run()) == [("p", 2, score), ("q", 2, score)]


def test_ms_swift(server: WireServer) -> None:
    plugin = example("ms-swift", server.url)["Plaudit"]()
    messages = [CHAT, [*CHAT, {"role": "assistant", "content": "b"}]]
    assert plugin(["a", "b"], messages=messages) == [server.score_of(CHAT, "a"), server.score_of(CHAT, "b")]
    assert isinstance(plugin.reward, Reward)
    plugin.reward.scorer.close()


def test_areal_nemo_rl_and_trlx(server: WireServer) -> None:
    scope = example("AReaL", server.url)
    assert scope["reward_fn"]("p", "a", [1], [2], answer="4") == server.score_of("p", "a")
    close(scope)
    scope = example("NeMo-RL", server.url)
    log = [*CHAT, {"role": "assistant", "content": "a", "token_ids": [1]}]
    assert scope["rewards"]([log]) == [server.score_of(CHAT, "a")]
    close(scope)
    scope = example("trlX", server.url)
    assert scope["reward_fn"](["pa"], ["p"], ["a"], tokenizer=None) == [server.score_of("p", "a")]
    assert scope["queries_to_scores"](["pa"]) == [server.score_of("", "pa")]
    close(scope)


def test_verifiers(server: WireServer) -> None:
    scope = example("verifiers", server.url)
    assert isinstance(scope["client"], AsyncClient)

    async def run() -> float:
        async with scope["client"]:
            answer = SimpleNamespace(last_reply="a")
            prompts = ("hi", [SimpleNamespace(role="user", content="hi", name=None)])
            tasks = [SimpleNamespace(data=SimpleNamespace(prompt=prompt)) for prompt in prompts]
            found = [await scope["plaudit"](task, answer) for task in tasks]
            assert found[0] == server.score_of("hi", "a")
            return float(found[1])

    assert asyncio.run(run()) == server.score_of(CHAT, "a")


def test_calling_a_server(served_url: Callable[[str], str]) -> None:
    url = served_url("qwen3")
    scope = example("the client", url)
    identity = scope["client"].info().identity
    close(scope)
    assert len(scope["rewards"]) == 2
    pinned = "/m/first@69bd3a7cc98b8dc0/score"
    ask = example("plain HTTP", f"{url}/m/{identity.model}@{identity.revision}/score", ADDRESS + pinned)["scores"]
    assert ask(scope["prompt"], scope["responses"]) == scope["rewards"]
    other = example("plain HTTP", f"{url}/m/{identity.model}@0123456789abcdef/score", ADDRESS + pinned)["scores"]
    with pytest.raises(RuntimeError, match="unknown_model"):
        other(scope["prompt"], scope["responses"])


def test_plain_http_waits_for_a_server_and_not_for_ever(server: WireServer) -> None:
    ask = example("plain HTTP", server.url, ADDRESS + "/m/first@69bd3a7cc98b8dc0")["scores"]
    busy = {"code": "overloaded", "message": "full", "retryable": True, "retry_after_ms": 20}
    server.fail({"status": 503, "body": {"error": busy}}, {"body": {"scores": [0.5, None]}})
    assert ask("p", ["a", "b"]) == [0.5, None]
    server.fail(*[{"status": 503, "body": {"error": busy}}] * 99)
    with pytest.raises(TimeoutError, match="no scores"):
        ask("p", ["a", "b"], patience=0.1)
    assert 2 < len(server.seen) < 99
