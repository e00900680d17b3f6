"""Trainers against a real server: what they send over the wire, and the adapters in the way they are called."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from plaudit import Client
from plaudit.adapters import openrlhf, slime, verl
from plaudit.adapters._rewards import async_client, ledger_of, longest
from plaudit.adapters.trl import AsyncReward, Reward

QUESTION = [{"role": "user", "content": "What is 2+2?"}]
ANSWERS = ["4", "It is 4.", "5", "", "four " * 40]
RENDERED = [
    f"<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>" for answer in ANSWERS
]
"""As trainers decode them: a policy ends with the end of its turn, and not with the line break behind it."""


@pytest.fixture(scope="module")
def url(served_url: Callable[[str], str]) -> str:
    return served_url("qwen3")


@pytest.fixture(scope="module")
def scores(url: str) -> list[float]:
    """Each answer's score, asked for alone."""
    with Client(url) as client:
        return [float(client.score(QUESTION, answer)) for answer in ANSWERS]


@pytest.fixture
def client_url(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PLAUDIT_URL", url)
    return url


def test_openrlhf_needs_no_adapter(url: str, scores: list[float]) -> None:
    """Requests as OpenRLHF 0.11.2 (`openrlhf/utils/agent.py`) and its older `remote_rm_utils.py` send them."""
    with httpx2.Client(base_url=url) as http:

        def ask(query: list[str], labels: list[Any]) -> Any:
            answer = http.post("/get_reward", json={"query": query, "prompts": ["What is 2+2?"], "labels": labels})
            assert answer.status_code == 200
            return answer.json()

        for query, score in zip(RENDERED, scores, strict=True):
            answer = ask([query], [None])
            assert answer["rewards"] == answer["scores"] == [score]
            assert all(len(values) == 1 and isinstance(values[0], int) for values in answer["extra_logs"].values())
        assert ask(RENDERED, ["4", "", None, 4, {}])["rewards"] == scores
        assert ask([], [])["rewards"] == []


@pytest.mark.usefixtures("client_url")
def test_openrlhf_function_file(scores: list[float]) -> None:
    openrlhf._client.cache_clear()
    given = openrlhf.reward_func(RENDERED, ["What is 2+2?"] * 5, [None] * 5)
    openrlhf._client().close()
    assert given["rewards"] == given["scores"] == scores and min(given["extra_logs"]["tokens"]) > 0
    json.dumps(given, allow_nan=False)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "conversational"])
def test_trl(url: str, scores: list[float], plain: bool) -> None:
    prompts = [QUESTION[0]["content"] if plain else QUESTION] * 5
    completions = ANSWERS if plain else [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    columns = {"prompts": prompts, "completions": completions, "completion_ids": [[1]] * 5, "trainer_state": None}
    blocking = Reward(url, max_length=10)
    assert blocking(**columns) == scores  # type: ignore[arg-type]
    blocking.scorer.close()

    async def run() -> list[float | None]:
        reward = AsyncReward(url)
        async with reward.scorer:
            return await reward(**columns)  # type: ignore[arg-type]

    assert asyncio.run(run()) == scores


def test_verl_and_slime(client_url: str, scores: list[float]) -> None:
    for cached in (verl._client, async_client, ledger_of):
        cached.cache_clear()
    args = SimpleNamespace(rm_url=client_url, reward_key="score", rollout_max_response_len=10**9)
    rendered = SimpleNamespace(rm_url=client_url, apply_chat_template=True)
    samples = [SimpleNamespace(prompt=QUESTION, response=answer) for answer in ANSWERS]
    start = RENDERED[3].removesuffix("<|im_end|>")
    texts = [SimpleNamespace(prompt=start, response=text.removeprefix(start)) for text in RENDERED]

    async def run() -> Any:
        found = await asyncio.gather(*(verl.compute_score("d", a, "4", {"prompt": QUESTION}) for a in ANSWERS))
        single = await asyncio.gather(*(slime.reward(args, sample) for sample in samples))
        whole = await slime.reward(rendered, texts)
        for url in (None, client_url):
            await async_client(url).aclose()
        return [[result["score"] for result in results] for results in (found, single)] + [whole]

    assert asyncio.run(run()) == [scores] * 3
    assert verl.compute_score_sync("d", ANSWERS[0], None, {"prompt": QUESTION})["score"] == scores[0]
    verl._client(None).close()


def test_the_models_length_is_known(url: str) -> None:
    with Client(url) as client:
        assert longest(client.info()) == client.info().details["max_length"] > 0
