"""The examples of docs/trainers.md run as they stand, against a server at the address that they name."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import AsyncClient, Client
from plaudit.adapters.trl import Reward

if TYPE_CHECKING:
    from conftest import WireServer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
CHAT = [{"role": "user", "content": "hi"}]


def example(name: str, url: str) -> dict[str, Any]:
    """What the example that begins with `# name` defines."""
    (code,) = [block for block in BLOCKS if block.startswith(f"# {name}\n")]
    scope: dict[str, Any] = {}
    exec(compile(code.replace("http://127.0.0.1:8000", url), name, "exec"), scope)
    return scope


def close(scope: dict[str, Any]) -> None:
    if isinstance(scope.get("client"), Client):
        scope["client"].close()


@pytest.mark.parametrize("block", BLOCKS)
def test_every_example_is_python(block: str) -> None:
    compile(block, "trainers.md", "exec")


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
            return float(await scope["plaudit_reward"](CHAT, [{"role": "assistant", "content": "a"}], answer="4"))

    assert asyncio.run(run()) == server.score_of(CHAT, "a")
