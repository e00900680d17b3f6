"""What every kernel costs on the chip that its block sizes are for: registers, shared memory and spills, without a GPU.

Each kernel is compiled by Triton for sm_90, or for sm_89 where the table is the default one, and translated by the
ptxas that comes with Triton. One row a kernel and combination of features; all must have no spills,
but for one launch that is faster with some. It takes a second of CPU a row.

    python benchmarks/compiled.py --tables sm_90 default
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import rows
import triton

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.kernels.shipped import DEFAULT_PRODUCTS, DELTA, FEATURES, PASSES, PRODUCTS, ROWS, WIDTHS, grid, spilled
from tests.kernels.sm90 import Kernel, costs

from plaudit_kernels.chips import TableName

AT_ONCE = 24
"""Kernels that one process compiles, so that the rows come while it runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=["sm_90", "default"], default=["sm_90", "default"])
    arguments = parser.parse_args()
    for table in arguments.tables:
        kernels = attention(table) + others(table)
        for start in range(0, len(kernels), AT_ONCE):
            part = kernels[start : start + AT_ONCE]
            for (what, kernel), cost in zip(part, costs([kernel for _, kernel in part]), strict=True):
                record(table, what, kernel, cost)


def attention(table: TableName) -> list[tuple[str, Kernel]]:
    """Every row of the table with every combination of features."""
    return [
        (f"{dtype}, head size {width}, {feature}", kernel)
        for dtype in ("bf16", "fp32")
        for width in WIDTHS
        for feature in FEATURES
        for kernel in grid(table, dtype, width, dict.fromkeys(PASSES, (feature,)))
    ]


def others(table: TableName) -> list[tuple[str, Kernel]]:
    kernels = [DELTA, *ROWS, *PRODUCTS] if table == "sm_90" else DEFAULT_PRODUCTS
    return [(", ".join(f"{k} {v}" for k, v in one.constexprs.items()), one) for one in kernels]


def record(table: str, what: str, kernel: Kernel, cost: object) -> None:
    figures = vars(cost)
    rows.append(
        "compiled",
        {
            "table": table,
            "chip": f"sm_{kernel.chip}",
            "kernel": f"{kernel.module.removeprefix('plaudit_kernels.')}.{kernel.function}",
            "what": what,
            "warps": kernel.num_warps,
            "stages": kernel.num_stages,
            "registers": figures["registers"],
            "shared_kib": round(figures["shared"] / 1024, 1),
            "spilled_bytes": figures["spills"],
            "wgmma": figures["wgmma"],
            "async_copies": figures["async_copies"],
            "triton": triton.__version__,
        },
    )
    if figures["spills"] > spilled(kernel):
        raise SystemExit(f"{kernel} spills")


if __name__ == "__main__":
    main()
