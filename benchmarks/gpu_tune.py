"""Block sizes: candidates of the attention and product kernels are timed on the card beside those that are checked in.

The fastest of each are written to `attention_table.txt` in the folder of the results, in the form of
`kernels/plaudit_kernels/attention_table.py`, each row under the checked-in one and what it would gain. Before a row
goes into the table it must compile without spills: `benchmarks/compiled.py`. Changing one changes the bits of scores.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from gpu_card import Bench, Case, Row, Skip, planned, random, ratios
from gpu_kernels import gradient, inference, runs

from plaudit_kernels import matmul, matmul_fp8, packed_attention, quantize_rows
from plaudit_kernels.chips import table_of

tables = importlib.import_module("plaudit_kernels.attention_table")
products = importlib.import_module("plaudit_kernels.matmul")  # the package has a function of that name

PROPOSAL = "attention_table.txt"
WIDTHS = (128, 64, 32, 256)
CANDIDATES: dict[str, Sequence[tuple[int, int, int, int]]] = {
    "forward": (
        (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2),
        (128, 128, 8, 2), (128, 32, 4, 3), (64, 32, 4, 3),
    ),
    "query_gradient": (
        (64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (64, 64, 4, 1),
    ),
    "key_gradient": (
        (32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 32, 8, 2),
    ),
}  # fmt: skip
"""queries, keys, warps, stages; each through pointers and with the copy engine."""

TILES: dict[torch.dtype, Sequence[tuple[int, int, int, int, int]]] = {
    torch.bfloat16: (
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4),
        (64, 256, 64, 4, 4), (128, 256, 32, 8, 4),
    ),
    torch.float8_e4m3fn: (
        (128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (128, 256, 64, 8, 4),
        (128, 128, 128, 4, 4),
    ),
}  # fmt: skip
"""Rows, columns, depth, warps, stages."""

Sizes = TypeVar("Sizes", bound=NamedTuple)


def tune(bench: Bench) -> None:
    for width in WIDTHS:
        for which in (*CANDIDATES, "plain_key_gradient"):
            case = Case("tune", f"attention, {which}", f"head {width}", seconds=45)
            bench.run(case, functools.partial(_attention, bench, width, which))
    for dtype in TILES:
        case = Case("tune", "product", "8192 x 8192 x 4096", str(dtype).removeprefix("torch."), 45)
        bench.run(case, functools.partial(_product, bench, dtype))


def _attention(bench: Bench, width: int, which: str) -> list[Row]:
    table, key = tables.TABLES[table_of(bench.device)], (2, max(32, tables.padded_width(width)))
    checked_in = table[key]

    def put(launch: object) -> None:
        table[key] = checked_in._replace(**{which: launch})

    works = _passes(bench, width, backward=which != "forward")
    current = getattr(checked_in, which)
    if current is None:
        raise Skip("the checked-in row has none")
    sizes = CANDIDATES[which.removeprefix("plain_")]
    ways = (True,) if which == "plain_key_gradient" else (True, False)
    launches = (tables.Launch(*size, described) for size in sizes for described in ways)
    candidates = [current, *(launch for launch in launches if launch != current)]
    try:
        best, gain = _fastest(bench, candidates, put, works)
    finally:
        table[key] = checked_in
    _propose(bench, f"{key}, {which}", current, best, gain)
    return [Row(f"speed of {tuple(best)}", gain, "ratio", f"checked in {tuple(current)}")]


def _passes(bench: Bench, width: int, *, backward: bool) -> Callable[[], None]:
    """Attention over 16 sequences of 1,024 tokens and over 2 prompts of 820 with 16 responses of 204 each."""
    unique = [(row * 1024, 1024, 0, 0) for row in range(16)]
    shared = [
        (at + 820 + i * 204 if i >= 0 else at, 204 if i >= 0 else 820, at if i >= 0 else 0, 820 if i >= 0 else 0)
        for at in (0, 820 + 16 * 204)
        for i in range(-1, 16)
    ]
    calls = [_pass(bench, np.array(segments), width, backward) for segments in (unique[: bench.small(16, 1)], shared)]

    def work() -> None:
        for call in calls[: bench.small(2, 1)]:
            call()

    return work


def _pass(bench: Bench, segments: np.ndarray, width: int, backward: bool) -> Callable[[], object]:
    if bench.dry:
        segments = np.array([(0, 20, 0, 0), (20, 9, 0, 20)])
    tokens = int(segments[:, 1].sum())
    plan = planned(bench, segments, tokens)
    heads = 1 if bench.dry else 16
    leaves = [random(bench, tokens, count, width).requires_grad_() for count in (heads, max(1, heads // 2), heads // 2)]
    leaves[2] = leaves[2] if leaves[2].numel() else random(bench, tokens, 1, width).requires_grad_()

    def forward() -> torch.Tensor:
        return packed_attention(*leaves, plan, scale=width**-0.5)

    return gradient(bench, (forward(),), leaves) if backward else inference(forward)


def _product(bench: Bench, dtype: torch.dtype) -> list[Row]:
    table = products.TILES[table_of(bench.device)]
    current = table[dtype]
    m, n, k = (bench.small(size, 32) for size in (8192, 8192, 4096))
    a, b = random(bench, m, k), random(bench, n, k)
    rounded, scale = quantize_rows(b)
    fp8 = dtype == torch.float8_e4m3fn
    work = inference((lambda: matmul_fp8(a, rounded, scale)) if fp8 else (lambda: matmul(a, b)))
    tiles = (products.Tiles(*sizes, described) for sizes in TILES[dtype] for described in (True, False))
    candidates = [current, *(one for one in tiles if one != current)]

    def put(tiles: object) -> None:
        table[dtype] = tiles

    try:
        best, gain = _fastest(bench, candidates, put, work)
    finally:
        table[dtype] = current
    _propose(bench, str(dtype), current, best, gain)
    return [Row(f"speed of {tuple(best)}", gain, "ratio", f"checked in {tuple(current)}")]


def _fastest(
    bench: Bench, candidates: Sequence[Sizes], put: Callable[[Sizes], None], work: Callable[[], object]
) -> tuple[Sizes, list[float]]:
    """The fastest candidate that runs, and its speed over the first, the checked-in one, round by round."""

    def with_(sizes: Sizes) -> Callable[[], None]:
        def run() -> None:
            put(sizes)
            work()

        return run

    works = {str(tuple(sizes)): with_(sizes) for sizes in candidates}
    works = {name: run for name, run in works.items() if runs(f"candidate {name}", run)}
    taken = bench.race(works, budget=1.5)
    best = min(taken, key=lambda name: float(np.median(taken[name])))
    chosen = next(sizes for sizes in candidates if str(tuple(sizes)) == best)
    return chosen, ratios(taken[str(tuple(candidates[0]))], taken[best])


def _propose(bench: Bench, row: str, current: object, best: object, gain: Sequence[float]) -> None:
    if bench.dry:
        return
    bench.results.mkdir(parents=True, exist_ok=True)
    with (bench.results / PROPOSAL).open("a", encoding="utf-8") as stream:
        stream.write(f"# {row} on {bench.about['card']}, {bench.commit}: {np.median(gain):.3f}x of {current}\n{best}\n")
