"""Three loads of real conversations over HTTP: plaudit beside the servers that people run today, on one machine.

Conversations of hh_rlhf/*/half_a, ragged as they are. `group`: a prompt and 16 responses (its own two and those of
the conversations that follow) in one request. `pairs`: a prompt and its two responses, 8 requests in flight.
`storm`: single items, 64 in flight. In each round both servers get the same requests, one server after the other, so
each ratio is paired; p20, p50 and p80 of the rounds are recorded. `computing` is the share of the time in which our
worker computed; the rest was lost to HTTP, tokenising and batching. The score cache is off.

Peers that have an environment of their own are named by their python: --infinity DIR/bin/python (infinity-emb 0.0.78),
--sentence-transformers DIR/bin/python. Without them they are left out. --ours-onnx adds our server over exports to
ONNX Runtime, in fp32 and int8; --onnx-padded adds the padded server over the same graphs as a peer.

    PLAUDIT_SHARED_DATA=... python benchmarks/http_loads.py --rounds 8
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import inputs
import numpy as np
import rows
from parity import write_minilm
from processes import free_port, peak_memory, plaudit_command, serving
from shapes import write_decoder_25m

from plaudit_model.encode import Encoder
from plaudit_model.errors import ItemError
from plaudit_model.onnx_export import ExportOptions, export_onnx
from plaudit_training.sources import ReadOptions, load

RESPONSES = 16


@dataclass(frozen=True)
class Item:
    """A prompt and its two responses."""

    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """Requests of one round, and how many of them are in flight."""

    name: str
    in_flight: int
    items_a_request: int
    requests: int


LOADS = (Load("group", 1, RESPONSES, 6), Load("pairs", 8, 2, 48), Load("storm", 64, 1, 192))


LARGEST_DIFFERENCE = {"int8": 0.5, "bfloat16": 1e-1, "float32": 1e-4}
"""Of two servers' scores of one item, by the coarser dtype; int8 of random weights is far from fp32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=["decoder", "minilm"], default=["decoder", "minilm"])
    parser.add_argument("--loads", nargs="+", choices=[load.name for load in LOADS], default=[x.name for x in LOADS])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="+", help="only these, by the beginning of their names")
    parser.add_argument("--mode", choices=["exact", "fast"], default="exact")
    parser.add_argument("--ours-onnx", action="store_true")
    parser.add_argument("--onnx-padded", action="store_true")
    parser.add_argument("--infinity", type=Path)
    parser.add_argument("--sentence-transformers", type=Path)
    arguments = parser.parse_args()
    inputs.check(*arguments.models, "hh_rlhf", *["onnxruntime"] * (arguments.ours_onnx or arguments.onnx_padded))
    makers = {"decoder": write_decoder_25m, "minilm": write_minilm}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            model = makers[name](Path(folder) / name)
            graphs = exports(model) if arguments.ours_onnx or arguments.onnx_padded else {}
            for dtype in arguments.dtypes:
                compare(name, Ours(model, "torch", dtype), graphs, arguments)
            for dtype in graphs if arguments.ours_onnx else ():
                compare(name, Ours(graphs[dtype], "onnx", dtype), graphs, arguments)


def exports(model: Path) -> dict[str, Path]:
    """The model as graphs of ONNX Runtime. Its weights are random, so how far int8 drifts means nothing here."""
    made = {dtype: model.with_name(f"{model.name}-{dtype}") for dtype in ("float32", "int8")}
    export_onnx(model, made["float32"], ExportOptions("float32"), [])
    export_onnx(made["float32"], made["int8"], ExportOptions("int8", allow_drift=True), [])
    return made


@dataclass(frozen=True)
class Ours:
    """What our server serves."""

    model: Path
    backend: str
    dtype: str

    @property
    def name(self) -> str:
        return self.dtype if self.backend == "torch" else f"onnx {self.dtype}"


def compare(name: str, ours: Ours, graphs: dict[str, Path], arguments: argparse.Namespace) -> None:
    """Our server against each peer, load by load. One peer runs at a time; ours runs all the while."""
    port = free_port()
    options = ["--dtype", ours.dtype, "--mode", arguments.mode, "--threads", str(arguments.threads), "--cache-mb", "0"]
    with serving(plaudit_command(ours.model, port, *options), port) as url:
        for peer in peers(name, ours, graphs, arguments):
            with serving(peer.command, peer.port, ready=peer.ready) as theirs:
                for chosen in (x for x in LOADS if x.name in arguments.loads):
                    one_load(chosen, name, ours, url, theirs, peer, arguments)


@dataclass(frozen=True)
class Peer:
    """A server to compare with: how it is started, where it says that it is ready, what it is sent."""

    name: str
    command: list[str]
    port: int
    ready: str = "/readyz"
    route: str = "/score"

    def body(self, item: Item) -> dict[str, Any]:
        if self.route == "/rerank":
            return {"query": item.prompt, "documents": list(item.responses), "model": "peer"}
        return {"prompt": item.prompt, "responses": list(item.responses)}


def peers(name: str, ours: Ours, graphs: dict[str, Path], arguments: argparse.Namespace) -> Iterator[Peer]:
    """The servers that this model is compared with."""
    here, model = Path(__file__).parent, ours.model
    wanted = arguments.peers or [""]
    for theirs in ("float32", "bfloat16") if ours.dtype == "bfloat16" else ("float32",):
        port = free_port()
        command = [sys.executable, str(here / "padded_server.py"), str(model), "--dtype", theirs]
        yield from _if(wanted, Peer(f"padded transformers {theirs}", [*command, *_common(port, arguments)], port))
    for theirs in graphs if arguments.onnx_padded else ():
        port = free_port()
        command = [sys.executable, str(here / "padded_server.py"), str(graphs[theirs]), "--backend", "onnx"]
        yield from _if(wanted, Peer(f"padded onnxruntime {theirs}", [*command, *_common(port, arguments)], port))
    if name != "minilm":
        return
    if arguments.sentence_transformers:
        port = free_port()
        command = [str(arguments.sentence_transformers), str(here / "cross_encoder_server.py"), str(model)]
        yield from _if(wanted, Peer("sentence-transformers float32", [*command, *_common(port, arguments)], port))
    if arguments.infinity:
        port = free_port()
        command = [str(arguments.infinity.with_name("infinity_emb")), "v2", "--model-id", str(model)]
        command += ["--served-model-name", "peer", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
        command += ["--no-bettertransformer", "--batch-size", "32"]
        yield from _if(wanted, Peer("infinity-emb float32", command, port, "/health", "/rerank"))


def _common(port: int, arguments: argparse.Namespace) -> list[str]:
    return ["--port", str(port), "--threads", str(arguments.threads)]


def _if(wanted: Sequence[str], peer: Peer) -> Iterator[Peer]:
    if any(peer.name.startswith(beginning) for beginning in wanted):
        yield peer


def one_load(
    chosen: Load, name: str, mine: Ours, ours: str, theirs: str, peer: Peer, arguments: argparse.Namespace
) -> None:
    """Alternate the servers over the rounds; the first round warms both up."""
    stream = requests_of(chosen, Encoder.open(mine.model))
    require_agreement(ours, theirs, peer, next(stream), mine.dtype)
    ratios, our_rate, their_rate, busy = [], [], [], []
    for number in range(arguments.rounds + 1):
        batch = list(itertools.islice(stream, chosen.requests))
        bodies = [{"prompt": item.prompt, "responses": list(item.responses)} for item in batch]
        computed = compute_seconds(ours)
        our_seconds = asyncio.run(send(ours + "/score", bodies, chosen.in_flight))
        computed = compute_seconds(ours) - computed
        their_seconds = asyncio.run(send(theirs + peer.route, [peer.body(item) for item in batch], chosen.in_flight))
        if number:
            ratios.append(their_seconds / our_seconds)
            busy.append(computed / our_seconds)
            our_rate.append(chosen.items_a_request * chosen.requests / our_seconds)
            their_rate.append(chosen.items_a_request * chosen.requests / their_seconds)
    rows.append(
        "http_loads",
        {
            "load": chosen.name,
            "model": name,
            "ours": f"{mine.name} {arguments.mode}",
            "peer": peer.name,
            "ours_items_s": rows.spread(our_rate)["p50"],
            "peer_items_s": rows.spread(their_rate)["p50"],
            **{f"ratio_{part}": value for part, value in rows.spread(ratios).items()},
            "computing_p50": rows.spread(busy)["p50"],
            "ours_peak_mib": peak_memory(ours),
            "peer_peak_mib": peak_memory(theirs),
            "rounds": len(ratios),
        },
    )


def require_agreement(ours: str, theirs: str, peer: Peer, item: Item, dtype: str) -> None:
    """Stop unless both servers give the same scores: else their rates would not be of the same work."""
    mine = httpx2.post(ours + "/score", json={"prompt": item.prompt, "responses": item.responses}, timeout=300).json()
    answer = httpx2.post(theirs + peer.route, json=peer.body(item), timeout=300).json()
    scores = np.array(mine["scores"])
    if peer.route == "/rerank":  # sorted, and after a sigmoid
        results = sorted(answer["results"], key=lambda result: result["index"])
        found, scores = np.array([result["relevance_score"] for result in results]), 1 / (1 + np.exp(-scores))
    else:
        found = np.array(answer["scores"])
    worst = float(np.abs(found - scores).max())
    coarsest = next((each for each in LARGEST_DIFFERENCE if each == dtype or each in peer.name), "float32")
    if not worst <= LARGEST_DIFFERENCE[coarsest]:
        raise SystemExit(f"{peer.name} disagrees by {worst}: the comparison would mean nothing")


def compute_seconds(url: str) -> float:
    """How long the worker has computed so far. What is left of the wall time is HTTP, tokenising and batching."""
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("plaudit_batch_seconds_sum"))


async def send(url: str, bodies: Sequence[dict[str, Any]], in_flight: int) -> float:
    """Seconds until every body is answered, `in_flight` at a time."""
    waiting = iter(bodies)
    limits = httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx2.AsyncClient(timeout=300, limits=limits) as http:

        async def work() -> None:
            for body in waiting:
                answer = await http.post(url, json=body)
                answer.raise_for_status()

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        return time.perf_counter() - start


def requests_of(chosen: Load, encoder: Encoder) -> Iterator[Item]:
    """Requests of a load, without end; items that are too long for the model are left out."""
    conversations = [item for item in real_items() if fits(encoder, item)]
    pool = itertools.cycle([response for item in conversations for response in item.responses])
    for item in itertools.cycle(conversations):
        if chosen.name == "group":
            others = list(itertools.islice(pool, RESPONSES - len(item.responses)))
            candidate = Item(item.prompt, (*item.responses, *others))
            if fits(encoder, candidate):
                yield candidate
        elif chosen.name == "pairs":
            yield item
        else:
            yield from (Item(item.prompt, (response,)) for response in item.responses)


def fits(encoder: Encoder, item: Item) -> bool:
    try:
        return all(encoder.encode(item.prompt, response) is not None for response in item.responses)
    except ItemError:
        return False


def real_items() -> list[Item]:
    """Conversations of every half_a, one from each file in turn."""
    files = sorted((inputs.DATA / "hh_rlhf").glob("*/half_a*"))
    each = [load([str(path)], ReadOptions(format="hh-rlhf", max_bad_rows=10**6))[0][:400] for path in files]
    items = []
    for record in (r for group in itertools.zip_longest(*each) for r in group if r is not None):
        prompt = "\n\n".join(f"{message.role}: {message.content}" for message in record.prompt)
        items.append(Item(prompt, tuple(record.responses)))
    return items


if __name__ == "__main__":
    main()
