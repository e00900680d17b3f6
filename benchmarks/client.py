"""What the client costs, and whether single calls reach the throughput of a batch.

    python benchmarks/client.py [--items 4096] [--rate 2000] [--runs 5]

Each engine is `stub_engine.py` in a process of its own. Each shape scores the same items; scores and their order are
checked against what the stub must give, and a shape below nine tenths of the batch route's throughput fails (exit 1).

  batch    one `score_items`            singles  one `score` per item, all at the same time (`AsyncClient`)
  threads  `score_items` of a `Client`  dying    two servers, one of which dies with a quarter of the items answered
  alone    singles that do not travel together: what collecting them is worth (not held to the batch's throughput)

Shapes are run in turn, and each is compared with the batch of its own round. One row per shape, with the spread of the
rounds, goes to results/client.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rows
from processes import free_port, serving
from stub_engine import score_of

from plaudit import AsyncClient, Client, RetryPolicy

ENOUGH = 0.9
STUB = Path(__file__).with_name("stub_engine.py")
PATIENT = RetryPolicy(retries=None)
Pairs = Sequence[tuple[str, str]]


async def batch(urls: list[str], pairs: Pairs) -> list[float | None]:
    async with AsyncClient(urls, retry=PATIENT) as client:
        return (await client.score_items(pairs)).scores


async def singles(urls: list[str], pairs: Pairs, **options: Any) -> list[float | None]:
    async with AsyncClient(urls, retry=PATIENT, **options) as client:
        return [result.score for result in await asyncio.gather(*(client.score(*pair) for pair in pairs))]


async def alone(urls: list[str], pairs: Pairs) -> list[float | None]:
    return await singles(urls, pairs, coalesce=1)


async def threads(urls: list[str], pairs: Pairs) -> list[float | None]:
    with Client(urls, retry=PATIENT) as client:
        return client.score_items(pairs).scores


SHAPES: dict[str, tuple[Callable[..., Any], int, bool]] = {
    "batch": (batch, 1, False),
    "singles": (singles, 1, False),
    "threads": (threads, 1, False),
    "batch-dying": (batch, 2, True),
    "singles-dying": (singles, 2, True),
    "alone": (alone, 1, False),
}
"""By name: the calls, the number of servers, and whether the last of them dies."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=2000.0, help="items per second that each stub gives")
    parser.add_argument("--runs", type=int, default=5, help="rounds of all shapes")
    arguments = parser.parse_args()
    pairs = [(f"prompt {n // 4} " + "x" * 60, f"response {n}") for n in range(arguments.items)]
    run(batch, pairs[:8], arguments.rate, 1, False)  # imports what there is to import
    rounds = [
        {name: run(calls, pairs, arguments.rate, servers, dies) for name, (calls, servers, dies) in SHAPES.items()}
        for _ in range(arguments.runs)
    ]
    shares = {name: [one["batch"][0] / one[name][0] for one in rounds] for name in SHAPES}
    for name, (_, servers, _) in SHAPES.items():
        rates = [len(pairs) / one[name][0] for one in rounds]
        costs = [one[name][1] / len(pairs) * 1e6 for one in rounds]
        rows.append(
            "client",
            {
                "shape": name,
                "items": len(pairs),
                "servers": servers,
                "engine_items_per_s": arguments.rate,
                **{f"items_per_s_{part}": round(value) for part, value in rows.spread(rates).items()},
                **{f"share_of_batch_{part}": round(value, 3) for part, value in rows.spread(shares[name]).items()},
                **{f"client_cpu_us_per_item_{part}": round(value, 1) for part, value in rows.spread(costs).items()},
                "wrong_or_misplaced": 0,  # `run` has ended the benchmark otherwise
                "runs": arguments.runs,
            },
        )
    low = [name for name, found in shares.items() if statistics.median(found) < ENOUGH and name != "alone"]
    if low:
        raise SystemExit(f"below {ENOUGH:.0%} of the batch route: {', '.join(low)}")


def run(calls: Callable[..., Any], pairs: Pairs, rate: float, servers: int, dies: bool) -> tuple[float, float]:
    """Wall-clock and CPU seconds of the client. Ends the benchmark if a score is wrong or out of place."""
    with ExitStack() as running:
        urls = []
        for number in range(servers):
            port = free_port()
            command = [sys.executable, str(STUB), str(port), "--rate", str(rate)]
            if dies and number == servers - 1:
                command += ["--die-after", str(len(pairs) // 4)]
            urls.append(running.enter_context(serving(command, port, ready="/info")))
        started, cpu = time.perf_counter(), time.process_time()
        scores = asyncio.run(calls(urls, pairs))
        spent = time.perf_counter() - started, time.process_time() - cpu
    if scores != [score_of(*pair) for pair in pairs]:
        raise SystemExit(f"{calls.__name__}: scores are wrong or out of place")
    return spent


if __name__ == "__main__":
    main()
