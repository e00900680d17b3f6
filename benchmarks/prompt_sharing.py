"""One prompt, many responses, over HTTP: plaudit beside a padded transformers server on the same machine.

A 25M-parameter Qwen3-shaped decoder with random weights, prompts of 120 tokens, 16 responses of 60. The servers
answer the same request in turn, so each ratio is paired; the median and p20..p80 of the rounds are recorded.

    python benchmarks/prompt_sharing.py --rounds 30
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import rows
from processes import free_port, plaudit_command, serving
from shapes import text_of, write_decoder_25m

from plaudit_model.encode import Encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--response-tokens", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_decoder_25m(Path(folder) / "decoder-25m")
        requests = make_requests(Encoder.open(model), arguments)
        for ours, theirs in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
            compare(model, ours, theirs, requests, arguments)
        storm(model, requests)


def make_requests(encoder: Encoder, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "prompt": text_of(encoder, arguments.prompt_tokens - 8, rng),  # the template takes the rest
            "responses": [text_of(encoder, arguments.response_tokens - 2, rng) for _ in range(arguments.responses)],
        }
        for _ in range(arguments.rounds + 2)
    ]


def compare(model: Path, ours: str, theirs: str, requests: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Alternate the two servers over the requests; the first two warm both up."""
    here, there = free_port(), free_port()
    padded = Path(__file__).with_name("padded_server.py")
    peer = [__import__("sys").executable, str(padded), str(model), "--port", str(there), "--dtype", theirs]
    peer += ["--threads", str(arguments.threads)]
    mine = plaudit_command(model, here, "--dtype", ours, "--threads", str(arguments.threads))
    ratios, our_rate, their_rate, tokens = [], [], [], 0
    with serving(mine, here) as url, serving(peer, there) as peer_url, httpx2.Client(timeout=120) as http:
        for index, request in enumerate(requests):
            our_seconds, answer = timed(http, url, request)
            their_seconds, plain = timed(http, peer_url, request)
            if ours == theirs == "float32":
                check(answer["scores"], plain["scores"])
            if index >= 2:
                ratios.append(their_seconds / our_seconds)
                our_rate.append(len(request["responses"]) / our_seconds)
                their_rate.append(len(request["responses"]) / their_seconds)
                tokens += answer["usage"]["total_tokens"]
    logical = tokens / len(ratios) / arguments.responses
    rows.append(
        "prompt_sharing",
        {
            "load": f"1 prompt x {arguments.responses} responses, {logical:.0f} tokens an item",
            "ours": ours,
            "padded": theirs,
            "ours_items_s": rows.spread(our_rate)["p50"],
            "padded_items_s": rows.spread(their_rate)["p50"],
            **{f"ratio_{name}": value for name, value in rows.spread(ratios).items()},
            "rounds": len(ratios),
        },
    )


def storm(model: Path, requests: list[dict[str, Any]]) -> None:
    """Tokens computed for one grouped call, and for the same items as single POSTs within a batching window."""
    import asyncio

    port = free_port()
    with serving(plaudit_command(model, port), port) as url:
        for request in requests[:5]:
            before = computed(url)
            with httpx2.Client(timeout=120) as http:
                grouped_answer = timed(http, url, {**request, "prompt": request["prompt"] + " first"})[1]
            grouped = computed(url) - before
            asyncio.run(singles(url, request))
            single = computed(url) - before - grouped
            rows.append(
                "single_posts",
                {
                    "responses": len(request["responses"]),
                    "logical_tokens": grouped_answer["usage"]["total_tokens"],
                    "grouped_computed": int(grouped),
                    "singles_computed": int(single),
                    "ratio": round(single / grouped, 3),
                },
            )


async def singles(url: str, request: dict[str, Any]) -> None:
    import asyncio

    async with httpx2.AsyncClient(timeout=120) as http:
        bodies = [{"prompt": request["prompt"] + " second", "response": text} for text in request["responses"]]
        answers = await asyncio.gather(*(http.post(f"{url}/score", json=body) for body in bodies))
    for answer in answers:
        answer.raise_for_status()


def computed(url: str) -> float:
    """The counter of tokens that went through the model."""
    text = httpx2.get(f"{url}/metrics").text
    lines = [
        line for line in text.splitlines() if line.startswith("plaudit_tokens_total{") and 'kind="computed"' in line
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def timed(http: Any, url: str, request: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    start = time.perf_counter()
    answer = http.post(f"{url}/score", json=request)
    seconds = time.perf_counter() - start
    answer.raise_for_status()
    return seconds, answer.json()


def check(ours: list[float], theirs: list[float]) -> None:
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if worst > 1e-4:
        raise SystemExit(f"the servers disagree by {worst}: the comparison would mean nothing")


if __name__ == "__main__":
    main()
