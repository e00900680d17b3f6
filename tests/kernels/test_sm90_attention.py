"""Every row of the attention table compiles for sm_90 without spills and fits in its shared memory."""

from __future__ import annotations

import inspect

import pytest

from plaudit_kernels.attention_table import DELTA_ROWS, Launch, launches, padded_width

from .sm90 import Kernel, costs

WIDTHS = (32, 64, 96, 128, 256)
FEATURES = {
    "plain": (True, 0, False),
    "all": (True, 64, True),
    "both ways": (False, 0, False),
    "local": (False, 64, True),
}

DATA = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
TABLES = ("segments", "tiles", "key_tiles", "visitor_offsets", "visitors")
NUMBERS = ("inner", "outer", "scale")


def kernel(name: str, dtype: str, width: int, launch: Launch, features: str) -> Kernel:
    from plaudit_kernels import attention_backward, attention_triton

    module = attention_triton if name == "_forward" else attention_backward
    causal, window, capped = FEATURES[features]
    constexprs = {
        "FOLD": 4, "CAUSAL": causal, "WINDOW": window, "CAPPED": capped, "TILE": 128, "WIDTH": width,
        "BLOCK_D": padded_width(width), "BLOCK_M": launch.queries, "BLOCK_N": launch.keys, "PRECISION": "ieee",
        "ROWS": DELTA_ROWS,
    }  # fmt: skip
    types = dict.fromkeys(DATA, f"*{dtype}") | dict.fromkeys(TABLES, "*i32") | dict.fromkeys(NUMBERS, "fp32")
    types |= {"lse": "*fp32", "delta": "*fp32"}
    names = inspect.signature(getattr(module, name).fn).parameters
    signature = {argument: types.get(argument, "i32") for argument in names if argument not in constexprs}
    constexprs = {argument: value for argument, value in constexprs.items() if argument in names}
    return Kernel(module.__name__, name, signature, constexprs, launch.num_warps, launch.num_stages)


def grid(dtype: str, widths: tuple[int, ...], features: dict[str, tuple[str, ...]]) -> list[Kernel]:
    names = ("_forward", "_query_gradient", "_key_gradient")
    return [
        kernel(name, dtype, width, launch, feature)
        for width in widths
        for name, launch in zip(names, launches(width, 4 if dtype == "fp32" else 2), strict=True)
        for feature in features[name]
    ]


def assert_fits(kernels: list[Kernel]) -> None:
    for spec, cost in zip(kernels, costs(kernels), strict=True):
        assert cost.fits(), f"{spec}: {cost}"
        # Loads that are not known to be aligned turn into single ones: the pipeline is gone, and nobody sees why.
        assert cost.async_copies or spec.num_stages == 1, f"{spec}: {cost}"


def test_the_table_fits() -> None:
    """With the features that took most registers: the plain forward walks two loops, the backward has one."""
    most = {"_forward": ("plain",), "_query_gradient": ("all",), "_key_gradient": ("all",)}
    delta = kernel("_delta", "bf16", 128, Launch(0, 0, 4, 1), "plain")
    assert_fits([*grid("bf16", WIDTHS, most), *grid("fp32", (128,), most), delta])


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("width", [*WIDTHS, 40, 80])
def test_the_table_fits_with_every_feature(width: int, dtype: str) -> None:
    names = ("_forward", "_query_gradient", "_key_gradient")
    assert_fits(grid(dtype, (width,), dict.fromkeys(names, tuple(FEATURES))))
