"""Compute threads of the worker: one or two, pinned or not, waiting actively or passively, under HTTP load.

All servers run, and one after another gets the same requests in each round; the order turns with the round. The load is
real conversations (as in http_loads.py). Each row has a setting's items a second and, round by round, its ratio to
`--threads 1` alone; `cpu_s` is the CPU time of the whole server a round, front and worker.

    PLAUDIT_SHARED_DATA=... python benchmarks/threads.py --rounds 8
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import inputs
import rows
from http_loads import LOADS, Load, requests_of, send
from parity import write_minilm
from processes import cpu_seconds, free_port, plaudit_command, serving
from shapes import write_decoder_25m

from plaudit_model.encode import Encoder

WAITS = ("active", "passive", "OpenMP's")


@dataclass(frozen=True)
class Setting:
    """One way to run the worker."""

    threads: int
    pinned: bool
    wait: str

    @property
    def options(self) -> list[str]:
        chosen = ["--threads", str(self.threads), "--cache-mb", "0"]
        if self.pinned:
            chosen += ["--cpus", ",".join(map(str, sorted(os.sched_getaffinity(0))[-self.threads :]))]
        return chosen if self.wait == "OpenMP's" else [*chosen, "--wait", self.wait]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=["decoder", "minilm"], default=["decoder", "minilm"])
    parser.add_argument("--loads", nargs="+", choices=[load.name for load in LOADS], default=[x.name for x in LOADS])
    parser.add_argument("--waits", nargs="+", choices=WAITS, default=list(WAITS))
    arguments = parser.parse_args()
    inputs.check(*arguments.models, "hh_rlhf")
    makers = {"decoder": write_decoder_25m, "minilm": write_minilm}
    settings = [
        Setting(threads, pinned, wait)
        for threads in arguments.threads
        for pinned in (False, True)
        for wait in (arguments.waits if threads > 1 else ["OpenMP's"])  # one thread waits for nobody
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            compare(name, makers[name](Path(folder) / name), settings, arguments)


def compare(name: str, model: Path, settings: list[Setting], arguments: argparse.Namespace) -> None:
    with contextlib.ExitStack() as servers:
        urls = {}
        for setting in settings:
            port = free_port()
            urls[setting] = servers.enter_context(serving(plaudit_command(model, port, *setting.options), port))
        for load in (load for load in LOADS if load.name in arguments.loads):
            one_load(name, model, load, urls, arguments.rounds)


def one_load(name: str, model: Path, load: Load, urls: dict[Setting, str], rounds: int) -> None:
    """The first round warms everyone up."""
    stream = requests_of(load, Encoder.open(model))
    seconds: dict[Setting, list[float]] = {setting: [] for setting in urls}
    spent: dict[Setting, list[float]] = {setting: [] for setting in urls}
    order = list(urls)
    for _ in range(rounds + 1):
        batch = [
            {"prompt": item.prompt, "responses": list(item.responses)}
            for item in itertools.islice(stream, load.requests)
        ]
        for setting in order:
            before, began = cpu_seconds(urls[setting]), time.monotonic()
            asyncio.run(send(urls[setting] + "/score", batch, load.in_flight))
            seconds[setting].append(time.monotonic() - began)
            spent[setting].append(cpu_seconds(urls[setting]) - before)
        order = [*order[1:], order[0]]
    items, base = load.items_a_request * load.requests, seconds[next(iter(urls))][1:]
    for setting in urls:
        taken = seconds[setting][1:]
        rows.append(
            "threads",
            {
                "model": name,
                "load": load.name,
                "threads": setting.threads,
                "pinned": setting.pinned,
                "wait": setting.wait,
                "items_s_p50": rows.spread([items / one for one in taken])["p50"],
                **{
                    f"of_first_{part}": value
                    for part, value in rows.spread([b / t for b, t in zip(base, taken, strict=True)]).items()
                },
                "cpu_s_p50": rows.spread(spent[setting][1:])["p50"],
                "rounds": rounds,
            },
        )


if __name__ == "__main__":
    main()
