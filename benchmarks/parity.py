"""Server scores = offline scores = plain transformers, one by one, on real conversations.

Conversations of hh_rlhf/*/half_a are scored by eager fp32 transformers one at a time, by the model in this process,
and by a running server in every way that clients send them. Records the largest difference and the order flips.

    PLAUDIT_SHARED_DATA=... python benchmarks/parity.py --conversations 1000
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import inputs
import numpy as np
import rows
from numpy.typing import NDArray
from processes import free_port, plaudit_command, serving
from shapes import write_decoder_25m

from plaudit_model.oracle import PlainModel, agreement
from plaudit_model.records import Conversation
from plaudit_model.reward_model import RewardModel
from plaudit_training.sources import ReadOptions, load

Scores = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=1000)
    arguments = parser.parse_args()
    inputs.check("minilm", "hh_rlhf")
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (
            ("Qwen3-shaped 25M", write_decoder_25m(Path(folder) / "decoder-25m")),
            ("MiniLM, fresh head", write_minilm(Path(folder) / "minilm")),
        ):
            measure(name, model, arguments.conversations)


def measure(name: str, directory: Path, count: int) -> None:
    model = RewardModel.load(directory, dtype="float32")
    conversations = real_conversations(model, count)
    reference = PlainModel(directory).score(conversations)[:, 0]
    encoded = [model.encoder.encode(prompt, response) for prompt, response in conversations]
    record(name, "offline", model.score_encoded(encoded)[:, 0], reference)
    port = free_port()
    with serving(plaudit_command(directory, port, "--dtype", "float32", "--cache-mb", "0"), port) as url:
        for way, send in WAYS.items():
            record(name, f"served {way}", asyncio.run(send(url, conversations)), reference)
        if model.contract.template.kind == "chat":
            record(name, "served /get_reward", asyncio.run(get_reward(url, model, conversations)), reference)


def record(name: str, way: str, ours: Scores, reference: Scores) -> None:
    result = agreement(ours, reference, "float32")
    rows.append(
        "parity",
        {
            "model": name,
            "way": way,
            "n": result.n,
            "max_difference": f"{result.max_difference:.2e}",
            "tolerance": f"{result.tolerance:.2e}",
            "flips": result.flips,
            "kendall_tau": f"{result.kendall_tau:.7f}",
            "holds": result.holds,
        },
    )
    if not result.holds:
        raise SystemExit(f"{name}, {way}: the scores disagree")


def real_conversations(model: RewardModel, count: int) -> list[Conversation]:
    """Conversations that fit the model, drawn from every subset alike."""
    files = sorted((inputs.DATA / "hh_rlhf").glob("*/half_a.jsonl.gz"))
    records, _ = load([str(path) for path in files], ReadOptions(format="hh-rlhf"))
    fitting = [
        (record.prompt, response)
        for record in records
        for response in record.responses
        if sum(len(m.content) for m in record.prompt) + len(response) < 1.5 * model.contract.max_length
    ]
    return random.Random(0).sample(fitting, count)


def item(conversation: Conversation) -> dict[str, Any]:
    prompt, response = conversation
    return {"prompt": [{"role": m.role, "content": m.content} for m in prompt], "response": response}


async def post(http: Any, url: str, body: dict[str, Any]) -> list[float]:
    answer = await http.post(f"{url}/score", json=body)
    answer.raise_for_status()
    return [float(score) for score in answer.json()["scores"]]


async def one_by_one(url: str, conversations: Sequence[Conversation]) -> Scores:
    async with httpx2.AsyncClient(timeout=600) as http:
        return np.array([(await post(http, url, item(c)))[0] for c in conversations], dtype=np.float32)


async def in_pairs(url: str, conversations: Sequence[Conversation]) -> Scores:
    return await in_lists(url, conversations, 2)


async def in_lists(url: str, conversations: Sequence[Conversation], size: int = 250) -> Scores:
    scores: list[float] = []
    async with httpx2.AsyncClient(timeout=600) as http:
        for start in range(0, len(conversations), size):
            scores += await post(http, url, {"items": [item(c) for c in conversations[start : start + size]]})
    return np.array(scores, dtype=np.float32)


async def in_groups(url: str, conversations: Sequence[Conversation]) -> Scores:
    """All responses to one prompt in one `responses` list."""
    by_prompt: dict[Any, list[int]] = {}
    for index, (prompt, _) in enumerate(conversations):
        by_prompt.setdefault(prompt, []).append(index)
    scores = np.zeros(len(conversations), dtype=np.float32)
    async with httpx2.AsyncClient(timeout=600) as http:
        for members in by_prompt.values():
            prompt = item(conversations[members[0]])["prompt"]
            body = {"prompt": prompt, "responses": [conversations[i][1] for i in members]}
            scores[members] = await post(http, url, body)
    return scores


async def shuffled(url: str, conversations: Sequence[Conversation]) -> Scores:
    order = random.Random(1).sample(range(len(conversations)), len(conversations))
    scores = np.zeros(len(conversations), dtype=np.float32)
    scores[order] = await in_lists(url, [conversations[i] for i in order])
    return scores


async def concurrently(url: str, conversations: Sequence[Conversation]) -> Scores:
    """Single items, 64 in flight."""
    slots = asyncio.Semaphore(64)
    async with httpx2.AsyncClient(timeout=600) as http:

        async def one(conversation: Conversation) -> float:
            async with slots:
                return (await post(http, url, item(conversation)))[0]

        return np.array(await asyncio.gather(*(one(c) for c in conversations)), dtype=np.float32)


async def get_reward(url: str, model: RewardModel, conversations: Sequence[Conversation]) -> Scores:
    """OpenRLHF's route: the text as the trainer would render it."""
    texts = [
        model.encoder.decode(model.encoder.encode(prompt, response).ids.tolist()) for prompt, response in conversations
    ]
    async with httpx2.AsyncClient(timeout=600) as http:
        answer = await http.post(f"{url}/get_reward", json={"query": texts})
    answer.raise_for_status()
    return np.array(answer.json()["rewards"], dtype=np.float32)


WAYS: dict[str, Callable[[str, Sequence[Conversation]], Awaitable[Scores]]] = {
    "one by one": one_by_one,
    "in pairs": in_pairs,
    "in lists of 250": in_lists,
    "in groups": in_groups,
    "shuffled": shuffled,
    "64 in flight": concurrently,
}


def write_minilm(directory: Path) -> Path:
    model = RewardModel.from_base(inputs.minilm(), seed=0)
    model.save(directory, model.contract)
    return directory


if __name__ == "__main__":
    main()
