"""Server scores = offline scores = plain transformers one by one, on real conversations, however they are sent."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from plaudit import AsyncClient, Client
from plaudit_model.oracle import PlainModel, agreement
from plaudit_model.records import Conversation
from plaudit_model.reward_model import RewardModel
from plaudit_training.sources import ReadOptions, load

COUNT = 100
Items = Sequence[dict[str, Any]]


@pytest.fixture(scope="module")
def conversations(shared_data: Path) -> list[Conversation]:
    """Real conversations of both subsets, pairs kept together; the longest are left out for time."""
    files = [str(path) for path in sorted((shared_data / "hh_rlhf").glob("*/half_a.jsonl.gz"))]
    records, _ = load(files, ReadOptions(format="hh-rlhf"))
    short = [r for r in records if sum(len(m.content) for m in r.prompt) + max(map(len, r.responses)) < 400]
    chosen = random.Random(0).sample(short, COUNT // 2)
    return [(record.prompt, response) for record in chosen for response in record.responses]


@pytest.fixture(scope="module", params=["qwen3", "bert"])
def scored(
    request: pytest.FixtureRequest, reward_model_dir: Callable[[str], Path], serve: Callable[..., Any],
    conversations: list[Conversation],
) -> tuple[str, NDArray[np.float32], NDArray[np.float32], RewardModel]:  # fmt: skip
    """Address of a server, the reference scores, the offline scores, the model."""
    directory = reward_model_dir(request.param)
    model = RewardModel.load(directory)
    encoded = [model.encoder.encode(prompt, response) for prompt, response in conversations]
    reference = PlainModel(directory).score(conversations)[:, 0]
    return serve(directory, "--cache-mb", "0").url, reference, model.score_encoded(encoded)[:, 0], model


def items_of(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": m.role, "content": m.content} for m in prompt], "response": response}
        for prompt, response in conversations
    ]


def one_by_one(url: str, items: Items) -> list[float]:
    with Client(url) as client:
        return [float(client.score(item["prompt"], item["response"])) for item in items]


def in_pairs(url: str, items: Items) -> list[float]:
    with Client(url) as client:
        pairs = [items[i : i + 2] for i in range(0, len(items), 2)]
        return [
            float(s)
            for a, b in pairs
            for s in client.score_responses(a["prompt"], [a["response"], b["response"]]).scores
        ]


def at_once(url: str, items: Items) -> list[float]:
    with Client(url) as client:
        return [float(s) for s in client.score_items(items).scores]


def shuffled(url: str, items: Items) -> list[float]:
    order = random.Random(1).sample(range(len(items)), len(items))
    back = dict(zip(order, at_once(url, [items[i] for i in order]), strict=True))
    return [back[i] for i in range(len(items))]


def concurrently(url: str, items: Items) -> list[float]:
    async def send() -> list[float]:
        async with AsyncClient(url) as client:
            results = await asyncio.gather(*(client.score(item["prompt"], item["response"]) for item in items))
        return [float(result) for result in results]

    return asyncio.run(send())


Scored = tuple[str, NDArray[np.float32], NDArray[np.float32], RewardModel]


def test_offline_scores_are_those_of_plain_transformers(scored: Scored) -> None:
    _, reference, offline, _ = scored
    result = agreement(offline, reference, "float32")
    assert result.n == COUNT and result.std > 0.01
    assert result.holds, result


@pytest.mark.parametrize("send", [one_by_one, in_pairs, at_once, shuffled, concurrently])
def test_served_scores_are_the_offline_bits(
    scored: Scored, conversations: list[Conversation], send: Callable[[str, Items], list[float]]
) -> None:
    url, reference, offline, _ = scored
    served = np.array(send(url, items_of(conversations)), dtype=np.float32)
    assert np.array_equal(served, offline), "exact mode: the same bits in any company"
    assert agreement(served, reference, "float32").holds


def test_get_reward_gives_the_same_scores(scored: Scored, conversations: list[Conversation]) -> None:
    """A chat model reads the rendered conversation as it reads its messages; a pair model reads a text alone."""
    import httpx2

    url, _, offline, model = scored
    if model.contract.template.kind == "chat":
        texts = [model.encoder.decode(model.encoder.encode(p, r).ids.tolist()) for p, r in conversations]
    else:
        texts = [response for _, response in conversations]
        offline = model.score_encoded([model.encoder.encode_text(text) for text in texts])[:, 0]
    answer = httpx2.post(f"{url}/get_reward", json={"query": texts}, timeout=120)
    assert np.array_equal(np.array(answer.json()["rewards"], dtype=np.float32), offline)
