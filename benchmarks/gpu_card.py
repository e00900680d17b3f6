"""What every section on the card shares: the device, the clock, the ceilings of this run, and the rows.

A section is a list of cases. A case is measured as a whole and its rows are written together, so a run that was cut
short goes on with the first case that has no rows. A case that fails is told with its traceback, gives no row and
makes the exit code 1; the others are measured all the same.
"""

from __future__ import annotations

import contextlib
import csv
import faulthandler
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch

from plaudit_kernels import BlockPlan, plan_attention

FILE = "gpu"
KEY = ("section", "subject", "shape", "dtype", "commit", "card")


class Skip(Exception):
    """Nothing is measured, for this reason."""


@dataclass(frozen=True)
class Case:
    """What is measured together. `subject` is a model or an operation; `seconds` is about what it takes."""

    section: str
    subject: str
    shape: str
    dtype: str = "bfloat16"
    seconds: float = 20.0

    def __str__(self) -> str:
        return " | ".join((self.section, self.subject, self.shape, self.dtype))


@dataclass(frozen=True)
class Row:
    """Repeated measurements of one quantity. `target` and `floor` are least values, with `at_most` greatest ones;
    `against` is what a ratio divides by."""

    what: str
    values: Sequence[float]
    unit: str
    against: str = ""
    target: float | None = None
    floor: float | None = None
    at_most: bool = False

    def met(self) -> str:
        """`target`, `floor` or `no`; empty where nothing is asked."""
        middle, sign = rows.spread(self.values)["p50"], -1 if self.at_most else 1
        for name, bound in (("target", self.target), ("floor", self.floor)):
            if bound is not None and sign * middle >= sign * bound:
                return name
        return "" if self.target is None and self.floor is None else "no"

    def cells(self) -> dict[str, object]:
        if not np.isfinite(self.values).all():
            raise ValueError(f"{self.what}: {list(self.values)} is not finite")
        asked = {"target": self.target, "floor": self.floor, "at_most": self.at_most, "met": self.met()}
        measured = {**rows.spread(self.values), "unit": self.unit, "rounds": len(self.values)}
        return {"what": self.what, "against": self.against, **measured, **asked}


@dataclass
class Bench:
    """One run. `dry`: tiny shapes, no rows; any device. `deadline` is on the monotonic clock; of `shard` (K, N) every
    Nth case is measured, from K; of the others those alone whose name `wanted` finds, but none that `without` finds.
    `patience` scales how long is measured. `lost`: a kernel has ended the context, and nothing runs in it any more."""

    device: torch.device
    dry: bool
    results: Path
    commit: str
    resume: bool = False
    deadline: float = float("inf")
    shard: tuple[int, int] = (0, 1)
    wanted: str = ""
    without: str = ""
    patience: float = 1.0
    lost: bool = False
    left: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    _met: int = -1

    def look_for(self, wanted: str) -> None:
        """Begin with the first case again; what was measured is not measured anew."""
        self.wanted, self._met = wanted, -1

    def run(self, case: Case, measure: Callable[[], Sequence[Row]]) -> None:
        """Measure a case and write its rows, unless they are there or there is no time."""
        number, count = self.shard
        self._met += 1
        if self._met % count != number or self._key(case) in self._recorded or not re.search(self.wanted, str(case)):
            return
        if str(case) in (*self.measured, *self.failed, *self.skipped, *self.left):
            return
        if self.lost or (self.without and re.search(self.without, str(case))):
            return
        if self.dry:
            torch.manual_seed(0)  # of tensors so small one draw in a hundred has torch err by less than half of us
        if time.monotonic() + (0.0 if self.dry else case.seconds) > self.deadline:
            self.left.append(str(case))
            return
        start = time.monotonic()
        with self.guarded(str(case)), self._limited(case):
            cells = [row.cells() for row in measure()]
            self.measured.append(str(case))
            self._write(case, cells, time.monotonic() - start)
        self._tidy()

    @contextlib.contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """What goes wrong inside is told and counted, and ends this case, not the run: a server that does not start
        raises SystemExit."""
        try:
            yield
        except Skip as reason:
            self.skipped.append(name)
            print(f"not measured: {name}: {reason}", flush=True)
        except (Exception, SystemExit):
            self.failed.append(name)
            print(f"FAILED: {name}\n{traceback.format_exc()}", flush=True)

    def models(self, *names: str) -> Sequence[str]:
        """The models of a section: of a dry run the first, for all are made tiny."""
        return names[: self.small(len(names), 1)]

    def small(self, full: int, dry: int) -> int:
        """A size: the second in a dry run."""
        return dry if self.dry else full

    @cached_property
    def ceilings(self) -> Ceilings:
        """The denominators of this run."""
        return Ceilings.measure(self)

    @cached_property
    def about(self) -> dict[str, object]:
        return rows.card(self.device) | rows.circumstances() | {"commit": self.commit}

    @cached_property
    def _recorded(self) -> set[tuple[str, ...]]:
        paths = {folder / f"{FILE}.csv" for folder in (self.results, rows.RESULTS)}
        if not self.resume or self.dry:
            return set()
        found = set()
        for path in paths:
            if path.exists():
                with path.open(encoding="utf-8", newline="") as stream:
                    found |= {tuple(row[name] for name in KEY) for row in csv.DictReader(stream)}
        return found

    def _key(self, case: Case) -> tuple[str, ...]:
        return (case.section, case.subject, case.shape, case.dtype, self.commit, str(self.about["card"]))

    def _write(self, case: Case, cells: Sequence[Mapping[str, object]], seconds: float) -> None:
        name = {"section": case.section, "subject": case.subject, "shape": case.shape, "dtype": case.dtype}
        print(f"-- {case} ({seconds:.0f} s)", flush=True)
        for row in cells:
            if self.dry:
                print("dry:", *(f"{key}={value}" for key, value in row.items() if value not in ("", None)))
            else:
                rows.append(FILE, {**name, **row}, self.about, self.results)

    @contextlib.contextmanager
    def _limited(self, case: Case) -> Iterator[None]:
        """What hangs on a card hangs for ever: the process ends with a traceback, and the next one can go on without
        the case. At first a case compiles: a minute."""
        if self.device.type != "cuda":
            yield
            return
        faulthandler.dump_traceback_later(60 + 3 * case.seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _tidy(self) -> None:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.lost = True
                print(f"the card is lost to this process ({error}): go on with --resume --without CASE", flush=True)

    # -- the clock -------------------------------------------------------------------------------------------

    def race(self, works: Mapping[str, Callable[[], object]], *, budget: float = 1.5) -> dict[str, list[float]]:
        """Seconds of each, in alternating rounds, so that ratios are paired: 5 to 50 rounds, about `budget` seconds.
        On the card by its events, each after the second-level cache was overwritten; else by the host's clock."""
        for _ in range(1 if self.dry else 3):
            for work in works.values():
                work()
        once = sum(self._timed(work) for work in works.values())
        rounds = 1 if self.dry else int(np.clip(self.patience * budget / max(once, 1e-9), 5, 50))
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                taken[name].append(self._timed(work))
        return taken

    def wall(self, work: Callable[[], object]) -> float:
        """Seconds on the host's clock, the device idle before and after: what a caller waits."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def race_walls(self, works: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
        """`race` by `wall`."""
        taken: dict[str, list[float]] = {name: [] for name in works}
        warm = 0 if self.dry else 2 if self.patience >= 1 else 1
        for number in range(warm + (1 if self.dry else max(3, round(self.patience * rounds)))):
            for name, work in works.items():
                seconds = self.wall(work)
                if number >= warm:
                    taken[name].append(seconds)
        return taken

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _timed(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            return self.wall(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):
            self._flush.fill_(1)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    @cached_property
    def _flush(self) -> torch.Tensor:
        """Larger than the cache. To write it twice takes longer than the host takes to launch the work: half a
        millisecond; a backward pass of attention is three kernels of ours and autograd's own."""
        return torch.empty(1 << 30, dtype=torch.uint8, device=self.device)

    def peak_mib(self, work: Callable[[], object]) -> float:
        """MiB on the card at the most while `work` runs, weights included; 0 on a CPU, in a dry run."""
        if self.device.type != "cuda":
            return 0.0
        self.__dict__.pop("_flush", None)  # a gigabyte that no work has asked for; it comes back when it is needed
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20


@dataclass(frozen=True)
class Ceilings:
    """The best rate of square bf16 products, FLOP/s of each round by size, and of a copy, bytes read and written."""

    products: dict[int, list[float]]
    copies: list[float]

    @property
    def matrix(self) -> float:
        return max(rows.spread(rates)["p50"] for rates in self.products.values())

    @property
    def copy(self) -> float:
        return rows.spread(self.copies)["p50"]

    @classmethod
    def measure(cls, bench: Bench) -> Ceilings:
        products = {}
        for size in (64, 96) if bench.dry else (4096, 6144, 8192):
            a, b = (random(bench, size, size) for _ in range(2))
            taken = bench.race({"product": lambda a=a, b=b: a @ b})["product"]
            products[size] = [2 * size**3 / seconds for seconds in taken]
        source = random(bench, bench.small(1 << 30, 1 << 12))
        target = torch.empty_like(source)
        taken = bench.race({"copy": lambda: target.copy_(source)})["copy"]
        return cls(products, [2 * source.nbytes / seconds for seconds in taken])


def planned(bench: Bench, segments: np.ndarray, tokens: int, *, causal: bool = True, window: int | None = None) -> Any:
    """The plan of attention, on the device."""
    plan = plan_attention(segments, tokens, causal=causal, window=window, device=bench.device)
    return plan.to(bench.device) if isinstance(plan, BlockPlan) else plan


def random(bench: Bench, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers: never zeros, which run faster and hide wrong indexing."""
    return torch.randn(*shape, device=bench.device, dtype=dtype)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def matrix(bench: Bench) -> None:
    """The ceilings, as rows."""

    def measure() -> list[Row]:
        found = bench.ceilings
        products = [
            Row(f"{size}^3 product", [r / 1e12 for r in rates], "TFLOP/s") for size, rates in found.products.items()
        ]
        return [*products, Row("copy, bytes read and written", [r / 1e9 for r in found.copies], "GB/s")]

    bench.run(Case("matrix", "ceilings", "4096^3 to 8192^3, 2 GiB"), measure)
