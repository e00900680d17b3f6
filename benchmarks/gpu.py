"""The engine on one GPU, section by section: each takes a few minutes and appends its rows to `results/gpu.csv`.

A row is one quantity: p20, p50 and p80 of its rounds, what it is compared with, what is asked of it and whether that
is met, the card, the driver, the versions, the commit and the date. Ratios are of alternating rounds in one process;
rates are shares of what the same run measured (section `matrix`).

    python benchmarks/gpu.py --section correctness
    python benchmarks/gpu.py --sections all --budget-seconds 540 --resume --results OUT --commit abc1234
    python benchmarks/gpu.py --sections all --dry-run   # tiny shapes on the CPU, no rows: does it run?

`--resume` leaves out the cases that have rows of this commit and card, in `--results` or among the checked-in ones. A
case that hangs ends the process, one that breaks the card's context the run: go on with `--resume --without CASE`.
Without a Git checkout name the commit. `http` needs the packages of the server and says so where they are absent.
Its kernels take six minutes of CPU to compile: `gpu_compile.py` does that beforehand, side by side, also on a machine
without a card. Eight processes, `--shard 0/8` to `--shard 7/8`, can share `correctness`; what is timed must run alone.
`all` is all but `gluon`, a candidate for attention that runs only when it is asked for by name.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from pathlib import Path

import rows
import torch
from gpu_card import Bench

SECTIONS = {
    "matrix": "gpu_card",
    "correctness": "gpu_correctness",
    "regroupings": "gpu_engine",
    "fused": "gpu_kernels",
    "attention": "gpu_attention",
    "forward": "gpu_engine",
    "http": "gpu_serving",
    "ready": "gpu_serving",
    "training": "gpu_training",
    "invariant": "gpu_kernels",
    "fp8": "gpu_engine",
    "gluon": "gpu_gluon",
    "sanitizer": "gpu_correctness",
    "tune": "gpu_tune",
}
"""The module of each, whose function of that name it is, in the order of their importance. It is imported when its turn
comes: what one section needs and this machine lacks stops no other."""

BY_NAME = ("gluon",)
"""Kernels that have never run: `all` leaves them out, for one that hangs would cost what follows."""


def main() -> int:
    arguments = parsed()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("there is no GPU: nothing is measured (--dry-run walks the sections on the CPU)", file=sys.stderr)
        return 1
    device = torch.device(arguments.device or ("cpu" if arguments.dry_run else "cuda"))
    commit = arguments.commit or str(rows.circumstances()["commit"])
    deadline = time.monotonic() + arguments.budget_seconds
    bench = Bench(
        device, arguments.dry_run, arguments.results, commit, arguments.resume, deadline, shard(arguments.shard),
        without=arguments.without, patience=arguments.patience,
    )  # fmt: skip
    for wanted in (*arguments.first, ""):
        bench.look_for(wanted)
        for name in chosen(arguments.sections):
            print(" ".join(filter(None, ("==", name, wanted))), flush=True)
            with bench.guarded(name):
                getattr(importlib.import_module(SECTIONS[name]), name)(bench)
    print(f"measured {len(bench.measured)}, skipped {len(bench.skipped)}, failed {len(bench.failed)} cases")
    for title, cases in (("no time for", bench.left), ("FAILED", bench.failed)):
        print(*(f"{title}: {case}" for case in cases), sep="\n")
    return 1 if bench.failed else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--section", "--sections", dest="sections", nargs="+", default=["all"], choices=["all", *SECTIONS],
        metavar="NAME", help=", ".join(["all", *SECTIONS]),
    )  # fmt: skip
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no case that would end later")
    parser.add_argument("--first", nargs="*", default=[], metavar="REGEX", help="cases that go before all others")
    parser.add_argument("--without", default="", metavar="REGEX", help="cases to leave out: one that hangs")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="how long is measured: 0.3 is a third of the rounds"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what has rows")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, no rows")
    parser.add_argument("--device", help="of a dry run; default: cpu")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of gpu.csv")
    parser.add_argument("--commit", default="", help="default: as git says")
    parser.add_argument("--shard", default="0/1", metavar="K/N", help="every Nth case from K: N processes at once")
    return parser.parse_args()


def shard(text: str) -> tuple[int, int]:
    """(K, N) of `K/N`."""
    number, count = (int(part) for part in text.split("/"))
    if not 0 <= number < count:
        raise SystemExit(f"--shard {text}: K counts from 0 to N - 1")
    return number, count


def chosen(names: list[str]) -> list[str]:
    return [name for name in SECTIONS if name in names or ("all" in names and name not in BY_NAME)]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
