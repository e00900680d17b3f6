"""Every kernel as it is launched, for the tests that compile them and the benchmark that records what they cost."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from plaudit_kernels.attention_table import DELTA_ROWS, Launch, launches, padded_width
from plaudit_kernels.chips import TableName
from plaudit_kernels.gated import COLUMNS
from plaudit_kernels.launch import PARTIAL_ROWS, power_of_two, row_block
from plaudit_kernels.listwise import TILE
from plaudit_kernels.matmul import GROUP, TILES
from plaudit_kernels.pairwise import COMPARISONS
from plaudit_kernels.rotary import HEADS, PAIRS

from .sm90 import Kernel

CHIPS: dict[TableName, int] = {"sm_90": 90, "default": 89}
"""The chip that a table is compiled for. 89 (L4, RTX 40) has the least shared memory of those that `default` is for."""

WIDTHS = (32, 64, 128, 256)
PASSES = ("_forward", "_query_gradient", "_key_gradient")
FEATURES = {
    "plain": (True, 0, False),
    "all": (True, 64, True),
    "both ways": (False, 0, False),
    "local": (False, 64, True),
}
MOST = {"_forward": ("plain",), "_query_gradient": ("plain", "all"), "_key_gradient": ("plain", "all")}
"""The features that take most registers: without a window the first two walk several loops."""

DATA = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
TILES_OF = {"k_tiles": "keys", "v_tiles": "keys", "q_tiles": "queries", "grad_tiles": "queries"}
"""Rows of the tiles that the copy engine brings."""
TABLES = ("segments", "tiles", "key_tiles", "visitor_offsets", "visitors")
NUMBERS = ("inner", "outer", "scale")


def attention(name: str, dtype: str, width: int, launch: Launch, features: str, chip: int = 90) -> Kernel:
    from plaudit_kernels import attention_backward, attention_triton

    module = attention_triton if name == "_forward" else attention_backward
    causal, window, capped = FEATURES[features]
    constexprs = {
        "FOLD": 4, "CAUSAL": causal, "WINDOW": window, "CAPPED": capped, "TILE": 128, "WIDTH": width,
        "BLOCK_D": padded_width(width), "BLOCK_M": launch.queries, "BLOCK_N": launch.keys, "PRECISION": "ieee",
        "ROWS": DELTA_ROWS, "SHARED": True, "STAGES": launch.num_stages,
    }  # fmt: skip
    types = dict.fromkeys(DATA, f"*{dtype}") | dict.fromkeys(TABLES, "*i32") | dict.fromkeys(NUMBERS, "fp32")
    types |= {"lse": "*fp32", "delta": "*fp32"}
    described = launch.described and not window and width in WIDTHS
    if described:
        types |= {tile: f"tensordesc<{dtype}[{getattr(launch, rows)},{width}]>" for tile, rows in TILES_OF.items()}
    else:
        constexprs |= dict.fromkeys(TILES_OF)
    names = inspect.signature(getattr(module, name).fn).parameters
    signature = {argument: types.get(argument, "i32") for argument in names if argument not in constexprs}
    constexprs = {argument: value for argument, value in constexprs.items() if argument in names}
    return Kernel(
        module.__name__,
        name,
        signature,
        constexprs,
        launch.num_warps,
        launch.num_stages,
        chip,
        fusion=name == "_key_gradient" or not described,
    )


def grid(
    table: TableName, dtype: str, width: int, features: dict[str, tuple[str, ...]], passes: tuple[str, ...] = PASSES
) -> list[Kernel]:
    """The attention kernels of one row of a table."""
    row = launches(width, 4 if dtype == "fp32" else 2, table)
    kernels = [
        attention(name, dtype, width, launch, feature, CHIPS[table])
        for name, launch in zip(PASSES, row, strict=False)
        if name in passes
        for feature in features[name]
    ]
    if (
        row.plain_key_gradient
        and width in WIDTHS
        and "plain" in features.get("_key_gradient", ())
        and "_key_gradient" in passes
    ):
        kernels.append(attention("_key_gradient", dtype, width, row.plain_key_gradient, "plain", CHIPS[table]))
    return kernels


SPILLING = [
    attention("_key_gradient", dtype, 128, plain, "plain")
    for dtype in ("bf16", "fp16")
    if (plain := launches(128, 2, "sm_90").plain_key_gradient)
]
SPILLED = 100
"""Bytes of a thread, of which a step without masks reads one register at most: with half of that it was measured to be
the fastest."""


def spilled(kernel: Kernel) -> int:
    """The bytes that this kernel may spill."""
    return SPILLED if kernel in SPILLING else 0


DELTA = attention("_delta", "bf16", 128, Launch(0, 0, 4, 1), "plain")


UNFUSED = ("norm._forward", "rotary._forward")
"""Several rows a program, each with instructions of its own: nothing may be fused in one and not in another."""


def kernel(name: str, types: dict[str, str], launch: dict[str, int] | None = None, **constants: Any) -> Kernel:
    """`types` maps a type to the arguments that have it; `name` is module.function."""
    module, function = name.split(".")
    signature = {argument: kind for kind, arguments in types.items() for argument in arguments.split()}
    options: dict[str, Any] = {**(launch or {"num_warps": 8}), "fusion": name not in UNFUSED}
    return Kernel(f"plaudit_kernels.{module}", function, signature, constants, **options)


def norms(width: int, centre: bool) -> list[Kernel]:
    block = row_block(width)
    launch = {"num_warps": block.num_warps}
    one_row = {"num_warps": max(1, min(32, block.columns // 512))}
    constants = {"WIDTH": width, "CENTRE": centre, "UNIT_OFFSET": False, "COLUMNS": block.columns}
    forward = {
        "*bf16": "hidden residual weight normed total",
        "i32": "rows hidden_stride residual_stride",
        "fp32": "eps",
    }
    backward = {
        "*bf16": "total weight d_normed d_total d_hidden", "*fp32": "d_weight",
        "i32": "rows total_stride", "fp32": "eps",
    }  # fmt: skip
    if centre:
        forward["*bf16"] += " bias"
        backward["*fp32"] += " d_bias"
    biases: list[dict[str, Any]] = [{}, {}] if centre else [{"bias": None}, {"d_bias": None}]
    return [
        kernel("norm._forward", forward, launch, **constants, **biases[0], ROWS=block.rows),
        kernel("norm._backward", backward, one_row, **constants, **biases[1], PARTIAL=PARTIAL_ROWS),
    ]


def rotaries(width: int, rotated: int, normed: bool) -> list[Kernel]:
    strides = "tokens query_stride query_step key_stride key_step cos_stride"
    four, half = {"num_warps": 4}, power_of_two(width // 2)
    constants = {
        "QUERY_HEADS": 16, "KEY_HEADS": 8, "WIDTH": width, "ROTARY": rotated, "UNIT_OFFSET": False,
        "TOKENS": PAIRS // half, "HALF": half,
    }  # fmt: skip
    norms = " query_norm key_norm" if normed else ""
    absent: dict[str, Any] = {} if normed else {"query_norm": None, "key_norm": None}
    forward = {"*bf16": "query key query_out key_out cos sin" + norms, "i32": strides, "fp32": "eps"}
    backward = {"*bf16": "query key d_query_out d_key_out d_query d_key cos sin" + norms, "i32": strides, "fp32": "eps"}
    if normed:
        backward["*fp32"] = "d_norm"
    unnormed = {} if normed else {"d_norm": None}
    return [
        kernel("rotary._forward", forward, four, **constants, **absent, HEADS=HEADS),
        kernel("rotary._backward", backward, four, **constants, **absent, **unnormed, HEADS=HEADS // 2),
    ]


def activations(activation: str) -> list[Kernel]:
    constants = {"WIDTH": 3072, "ACTIVATION": activation, "ROWS": PARTIAL_ROWS, "COLUMNS": COLUMNS}
    sizes = "rows stride"
    return [
        kernel("gated._gated_forward", {"*bf16": "gate_up output", "i32": sizes}, **constants),
        kernel("gated._gated_backward", {"*bf16": "gate_up d_output d_gate_up", "i32": sizes}, **constants),
        kernel("gated._bias_forward", {"*bf16": "hidden bias output", "i32": sizes}, **constants),
        kernel(
            "gated._bias_backward",
            {"*bf16": "hidden bias d_output d_hidden", "*fp32": "d_bias", "i32": sizes},
            **constants,
        ),
    ]


def head(width: int) -> Kernel:
    columns = power_of_two(width)
    return kernel(
        "head._forward",
        {
            "*bf16": "hidden norm", "*i64": "rows", "*fp32": "weight bias output",
            "i32": "count steps hidden_stride weight_stride", "fp32": "eps",
        },
        {"num_warps": max(1, columns // 1024)},
        WIDTH=width, ATTRIBUTES=3, UNIT_OFFSET=False, COLUMNS=columns,
    )  # fmt: skip


def rankings(chunk: int) -> list[Kernel]:
    one, tile = {"num_warps": 1}, {"GROUPS": TILE // chunk, "CHUNK": chunk}
    common = {"*i64": "ranking offsets", "i32": "groups"}
    return [
        kernel("listwise._forward", {"*fp32": "scores losses levels logs", **common}, one, **tile),
        kernel("listwise._backward", {"*fp32": "scores levels logs d_losses d_places", **common}, one, **tile),
    ]


def losses() -> list[Kernel]:
    four = {"num_warps": 4}
    return [
        kernel(
            "pairwise._forward",
            {
                "*fp32": "scores share margin weight losses d_chosen d_rejected", "*i64": "chosen rejected",
                "i32": "count", "fp32": "centring",
            },
            four,
            COMPARISONS=COMPARISONS,
        ),
    ]  # fmt: skip


def product(
    dtype: torch.dtype, name: str, layout: str = "rows", whole: bool = True, table: TableName = "sm_90"
) -> Kernel:
    """`layout`: which dimension of a and b is contiguous; forward has rows, the weight gradient columns of both."""
    tiles = TILES[table][dtype]
    types = {f"*{name}": "a b", "i32": "rows columns depth programs"}
    scales: dict[str, Any] = {"row_scale": None, "column_scale": None}
    if name == "fp8e4nv":
        types |= {"*bf16": "output", "*fp32": "row_scale column_scale"}
        scales = {}
    else:
        types[f"*{name}"] += " output"
    a_unit, b_unit = ("a_row" if layout == "columns" else "a_depth"), ("b_depth" if layout == "rows" else "b_row")
    types["i32"] += "".join(f" {s}" for s in ("a_row", "a_depth", "b_row", "b_depth") if s not in (a_unit, b_unit))
    return kernel(
        "matmul._product", types,
        {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "chip": CHIPS[table]}, **scales,
        **{a_unit: 1, b_unit: 1}, WHOLE=whole, SIXTEENS=layout == "columns",
        M=tiles.m, N=tiles.n, K=tiles.k, GROUP=GROUP,
    )  # fmt: skip


def described_product(dtype: torch.dtype, name: str) -> Kernel:
    tiles = TILES["sm_90"][dtype]
    types = {"i32": "rows columns depth programs"}
    types |= {f"tensordesc<{name}[{tiles.m},{tiles.k}]>": "a", f"tensordesc<bf16[{tiles.m},{tiles.n // 2}]>": "output"}
    second = f"tensordesc<{name}[{tiles.n},{tiles.k}]>"
    types[second] = f"{types.get(second, '')} b"
    scales: dict[str, Any] = {"row_scale": None, "column_scale": None}
    if name == "fp8e4nv":
        types, scales = types | {"*fp32": "row_scale column_scale"}, {}
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return kernel("matmul._described_product", types, launch, **scales, M=tiles.m, N=tiles.n, K=tiles.k, GROUP=GROUP)


def widening(width: int) -> Kernel:
    block = row_block(width)
    return kernel(
        "int8._widen",
        {"*i8": "weight", "*fp32": "scale", "*bf16": "output", "i32": "rows weight_stride output_stride"},
        {"num_warps": block.num_warps},
        WIDTH=width, ROWS=block.rows, COLUMNS=block.columns,
    )  # fmt: skip


PRODUCTS = [
    product(torch.bfloat16, "bf16"),
    product(torch.float8_e4m3fn, "fp8e4nv"),
    described_product(torch.bfloat16, "bf16"),
    described_product(torch.float8_e4m3fn, "fp8e4nv"),
    product(torch.float32, "fp32"),
    product(torch.bfloat16, "bf16", "mixed"),
    product(torch.bfloat16, "bf16", "columns", whole=False),
]
ROWS = [
    *(one for width in (1024, 8192) for one in norms(width, False)),
    *norms(1024, True),
    *rotaries(128, 128, True),
    *rotaries(64, 64, False),
    *rotaries(256, 256, True),
    *rotaries(80, 32, True),
    *(one for name in ("silu", "gelu") for one in activations(name)),
    head(1024),
    head(4096),
    *losses(),
    *(one for chunk in (16, 64, TILE) for one in rankings(chunk)),
    kernel(
        "matmul._quantize",
        {"*bf16": "a", "*fp8e4nv": "quantised", "*fp32": "scale", "i32": "rows stride"},
        WIDTH=4096, ROWS=1, COLUMNS=4096,
    ),
    *map(widening, (1024, 4096, 14336)),
]  # fmt: skip
DEFAULT_PRODUCTS = [
    product(torch.bfloat16, "bf16", table="default"),
    product(torch.float8_e4m3fn, "fp8e4nv", table="default"),
    product(torch.float32, "fp32", table="default"),
    product(torch.bfloat16, "bf16", "mixed", table="default"),
    product(torch.bfloat16, "bf16", "columns", whole=False, table="default"),
]
