"""Every row of the attention tables compiles without spills and fits in the shared memory of its chip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from plaudit_kernels.attention_table import TABLES
from plaudit_kernels.chips import TableName, table_in_words, table_of

from .shipped import DELTA, FEATURES, MOST, PASSES, WIDTHS, grid, spilled
from .sm90 import Kernel, costs


def assert_fits(kernels: list[Kernel]) -> None:
    for spec, cost in zip(kernels, costs([replace(kernel, read=False) for kernel in kernels]), strict=True):
        assert cost.fits(spilled(spec)), f"{spec}: {cost}"
        # Loads that are not known to be aligned turn into single ones: the pipeline is gone, and nobody sees why.
        assert cost.async_copies or spec.num_stages == 1, f"{spec}: {cost}"
        # A block is met by one loop or by another, as its prompt is shared or not: all must round alike.
        assert spec.fusion or cost.fusible == 0, f"{spec}: {cost}"


def test_the_widths_are_the_rows() -> None:
    for table in TABLES.values():
        assert table.keys() == {(size, width) for size in (2, 4) for width in WIDTHS}


def test_every_row_fits() -> None:
    """Of `default`, and of fp32, what serves; their gradients are compiled by the soak tests."""
    table = [one for width in WIDTHS for one in grid("sm_90", "bf16", width, MOST)]
    table += [one for width in WIDTHS for one in grid("sm_90", "fp32", width, MOST, ("_forward",))]
    default = [one for width in (64, 128, 256) for one in grid("default", "bf16", width, MOST, ("_forward",))]
    assert_fits([*table, DELTA, *default, *grid("default", "fp32", 256, MOST, ("_forward",))])


@pytest.mark.soak
@pytest.mark.parametrize("table", ["sm_90", "default"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("width", [*WIDTHS, 40, 80, 96])
def test_the_tables_fit_with_every_feature(width: int, dtype: str, table: TableName) -> None:
    assert_fits(grid(table, dtype, width, dict.fromkeys(PASSES, tuple(FEATURES))))


def test_a_chip_without_a_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    table_of.cache_clear()
    try:
        assert table_of(device) == "default"
        assert table_in_words(device) == "default block sizes, there are none for sm_89 (NVIDIA L4)"
        assert table_in_words(torch.device("cpu")) == "block sizes of sm_90"
    finally:
        table_of.cache_clear()
