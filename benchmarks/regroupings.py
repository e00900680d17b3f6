"""A score is a function of its item: how many bits move when items are scored in other company.

Items are scored alone, then again and again in random subsets and orders, with random token budgets, prompts shared
or written out for each response, and after the model was loaded anew: in this process, and by servers that are
started anew, in concurrent requests, computed or from the cache of scores. Every score is compared bit for bit with
that of the item alone. One regrouping is one item scored in one company.

    python benchmarks/regroupings.py --count 100000 --served 10000
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rows
from numpy.typing import NDArray
from processes import free_port, plaudit_command, serving
from shapes import write_decoder_25m

from plaudit_model.encode import Encoded
from plaudit_model.reward_model import RewardModel
from plaudit_model.starter import directory as starter_directory

if TYPE_CHECKING:  # the part in this process runs without an HTTP client
    import httpx2

PROMPTS, RELOADS = 24, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--served", type=int, default=10_000, help="regroupings over HTTP; 0: none")
    parser.add_argument("--models", nargs="+", choices=["starter", "decoder", "minilm"], default=["starter"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    import inputs
    from parity import write_minilm

    inputs.check(*arguments.models)

    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            directory = {
                "starter": starter_directory,
                "decoder": lambda: write_decoder_25m(Path(folder) / "decoder"),
                "minilm": lambda: write_minilm(Path(folder) / "minilm"),
            }[name]()
            for dtype in arguments.dtypes:
                measure(name, directory, dtype, arguments.count, arguments.served)


def measure(name: str, directory: Path, dtype: str, count: int, served: int) -> None:
    generator = np.random.default_rng(0)
    model = RewardModel.load(directory, dtype=dtype, mode="exact")
    items = random_items(model, generator)
    alone = np.concatenate([model.score_encoded([item]) for item in items])
    load = functools.partial(RewardModel.load, directory, dtype=dtype, mode="exact")
    done, changed = regroup(load, items, alone, count, generator)
    record(name, model, "in process", done, 0, changed)
    if not served:
        return
    done, cached, changed = asyncio.run(regroup_served(directory, dtype, items, alone[:, 0], served, generator))
    record(name, model, "served", done, cached, changed)


def record(name: str, model: RewardModel, way: str, done: int, cached: int, changed: int) -> None:
    counts = {"regroupings": done, "from_cache": cached, "reloads": RELOADS, "changed": changed}
    rows.append("regroupings", {"model": name, "dtype": model.dtype, "way": way, **counts, "numerics": model.numerics})
    if changed:
        raise SystemExit(f"{name}, {model.dtype}: {changed} scores moved with their company")


def regroup(
    load: Callable[[], RewardModel],
    items: list[Encoded],
    alone: NDArray[np.float32],
    count: int,
    generator: np.random.Generator,
) -> tuple[int, int]:
    """Scores given in this process, and how many were not those of the item alone."""
    done = changed = 0
    for part in range(RELOADS):
        model = load()
        while done < count * (part + 1) / RELOADS:
            chosen = generator.permutation(len(items))[: int(generator.integers(1, len(items) + 1))]
            share = 0.7 if model.shares_prompt else 1.0  # to an encoder the boundary is part of the item
            company = [items[i] if generator.random() < share else unshared(items[i]) for i in chosen]
            scores = model.score_encoded(company, token_budget=int(2 ** generator.uniform(8, 13)))
            changed += int((scores.view(np.int32) != alone[chosen].view(np.int32)).any(1).sum())
            done += len(chosen)
    return done, changed


async def regroup_served(
    directory: Path,
    dtype: str,
    items: list[Encoded],
    alone: NDArray[np.float32],
    count: int,
    generator: np.random.Generator,
) -> tuple[int, int, int]:
    """The same over HTTP: scores given, how many of them came from the cache, how many changed."""
    import httpx2

    done = cached = changed = 0
    for part in range(RELOADS):
        port = free_port()
        with serving(plaudit_command(directory, port, "--dtype", dtype), port) as url:
            async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
                while done < count * (part + 1) / RELOADS:
                    companies = [generator.permutation(len(items))[: generator.integers(1, 33)] for _ in range(8)]
                    answers = await asyncio.gather(*(post(client, [items[i] for i in one]) for one in companies))
                    for chosen, results in zip(companies, answers, strict=True):
                        scores = np.array([result["score"] for result in results], dtype=np.float32)
                        changed += int((scores.view(np.int32) != alone[chosen].view(np.int32)).sum())
                        cached += sum(result["cached"] for result in results)
                        done += len(chosen)
    return done, cached, changed


async def post(client: httpx2.AsyncClient, company: list[Encoded]) -> list[dict[str, object]]:
    items = [{"input_ids": item.ids.tolist(), "prompt_tokens": item.prompt_tokens} for item in company]
    answer = await client.post("/score", json={"items": items})
    answer.raise_for_status()
    results: list[dict[str, object]] = answer.json()["results"]
    return results


def random_items(
    model: RewardModel, generator: np.random.Generator, *, prompt: int = 120, response: int = 70
) -> list[Encoded]:
    """One to eight responses to each prompt; fewer tokens than these, from one to several blocks."""

    def tokens(low: int, high: int) -> NDArray[np.int32]:
        return generator.integers(5, 400, int(generator.integers(low, high)), dtype=np.int32)

    items = []
    for _ in range(PROMPTS):
        shared = tokens(0, prompt)
        for _ in range(int(generator.integers(1, 9))):
            items.append(Encoded(np.concatenate([shared, tokens(1, response)]), len(shared)))
    return items


def unshared(item: Encoded) -> Encoded:
    """The same tokens without a boundary: a decoder's item whose prompt is not shared."""
    return Encoded(item.ids, 0)


if __name__ == "__main__":
    main()
