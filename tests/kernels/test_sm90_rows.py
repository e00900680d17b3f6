"""Every kernel but attention compiles for its chip with the launch it ships with: nothing spills, all fits, and a row
is rounded in one way wherever it lies in a tile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from .shipped import DEFAULT_PRODUCTS, PRODUCTS, ROWS
from .sm90 import Kernel, costs

UNFUSED = ("_gated_forward", "_bias_forward", "_quantize", "_product", "_described_product")


@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param([*ROWS, *PRODUCTS, DEFAULT_PRODUCTS[0]], id="shipped"),
        pytest.param(DEFAULT_PRODUCTS[1:], id="default, all", marks=pytest.mark.soak),
    ],
)
def test_it_fits(kernels: list[Kernel]) -> None:
    kernels = [replace(one, read=one.module.endswith("head") or one.function in UNFUSED) for one in kernels]
    for one, cost in zip(kernels, costs(kernels), strict=True):
        assert cost.fits(), (one, cost)
        if one.function == "_product" and one.signature["a"] != "*fp32":
            assert cost.async_copies and (cost.wgmma or one.chip != 90)
        # What a row of scoring goes through: ptxas decides nothing, or decides it once for all rows.
        assert one.fusion or cost.fusible == 0, (one, cost)
        if one.function in UNFUSED:
            assert cost.fused == 0, (one, cost)
        if one.module.endswith("head"):
            assert cost.roots == 1, (one, cost)
