"""Scores through a network that resets, cuts, delays, repeats and swallows: how many are wrong, or in another's place.

    python benchmarks/lossy_network.py [--items 25000]

`tests/clients/lossy.py` stands between the client and `stub_engine.py`. Each way of calling scores so many items; every
score is compared with what the stub gives for that item. The benchmark fails (exit 1) if one differs, is missing, or is
another item's. One row per way of calling goes to results/lossy_network.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import rows
from processes import free_port, serving
from stub_engine import score_of

from plaudit import AsyncClient, Attempt, Client, RetryPolicy

BENCHMARKS = Path(__file__).resolve().parent
sys.path.append(str(BENCHMARKS.parent / "tests" / "clients"))

from lossy import LossyProxy  # noqa: E402 - a file of the tests

PATIENT = RetryPolicy(retries=None, base=0.001, cap=0.02)
FATES: Any = {"whole": 12, "refuse": 2, "reset": 2, "cut": 2, "delay": 2, "interim": 1}
FATES |= {"twice": 2, "late": 2, "swallow": 1}
LIMIT = 0.5
"""Seconds after which an attempt without an answer is made again: what is swallowed comes never."""
CALLS = ("singles", "groups", "list", "threads")
GROUP, LIST = 7, 20
"""Items of a call in `groups`, and of a request in the others: small, so that many requests meet a fate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=25_000, help="of each way of calling")
    arguments = parser.parse_args()
    for number, calls in enumerate(CALLS):
        measure(calls, arguments.items, seed=number)


def measure(calls: str, count: int, seed: int) -> None:
    draw = random.Random(seed)
    pairs = [(f"prompt {n // 4}" + "?" * draw.randrange(9), f"{n} " + "x" * draw.randrange(60)) for n in range(count)]
    expected = [score_of(*pair) for pair in pairs]
    attempts, port = Counter[bool](), free_port()
    command = [sys.executable, str(BENCHMARKS / "stub_engine.py"), str(port), "--rate", "1e9"]
    with serving([*command, "--max-items", str(LIST)], port, ready="/info"):
        proxy = LossyProxy(port, FATES, seed)
        started = time.perf_counter()
        try:
            options = {"on_attempt": lambda attempt: attempts.update([failed(attempt)])}
            got = score(proxy.url, pairs, calls, **options)
        finally:
            proxy.close()
    others = set(expected)
    differing = [found for found, right in zip(got, expected, strict=True) if found != right]
    row = {
        "calls": calls,
        "items": count,
        "missing": sum(found is None for found in got),
        "wrong": sum(found is not None and found not in others for found in differing),
        "misplaced": sum(found in others for found in differing),
        "attempts": attempts.total(),
        "failed_attempts": attempts[True],
        "fates": json.dumps(proxy.met, sort_keys=True),
        "seconds": round(time.perf_counter() - started, 1),
    }
    rows.append("lossy_network", row)
    if differing or not all(proxy.met[fate] for fate in FATES):
        raise SystemExit(f"{calls}: {len(differing)} scores are not those of their items")


def failed(attempt: Attempt) -> bool:
    return attempt.failure is not None


def score(url: str, pairs: list[tuple[str, str]], calls: str, **options: Any) -> list[float | None]:
    if calls != "threads":
        return asyncio.run(awaited(url, pairs, calls, **options))
    with Client(url, retry=PATIENT, timeout=None, attempt_timeout=LIMIT, **options) as client:
        return client.score_items(pairs).scores


async def awaited(url: str, pairs: list[tuple[str, str]], calls: str, **options: Any) -> list[float | None]:
    limits: Any = {"timeout": None, "attempt_timeout": LIMIT}
    async with AsyncClient(url, retry=PATIENT, coalesce=LIST, **limits, **options) as client:
        if calls == "singles":
            return [result.score for result in await asyncio.gather(*(client.score(*pair) for pair in pairs))]
        if calls == "list":
            return (await client.score_items(pairs)).scores
        groups = [pairs[start : start + GROUP] for start in range(0, len(pairs), GROUP)]
        return [s for scores in await asyncio.gather(*map(client.score_items, groups)) for s in scores.scores]


if __name__ == "__main__":
    main()
