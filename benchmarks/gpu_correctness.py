"""Every kernel against its definition in float64, on fresh random inputs, forward and backward.

FlashAttention's rule: the largest error is at most twice that of torch in the same dtype, plus a floor. What is
recorded is that error over what is allowed, the most over outputs and gradients: at most 1. Outputs hold NaN before a
kernel runs, inputs are views with gaps between their rows, and the largest shapes need 64-bit offsets.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_card import Bench, Case, Row, Skip, planned

from plaudit_kernels import (
    bias_gelu,
    bradley_terry,
    gated,
    layer_norm,
    matmul,
    matmul_fp8,
    packed_attention,
    plackett_luce,
    pooled_head,
    quantize_rows,
    reference_attention,
    rms_norm,
    rotary,
    select,
)
from plaudit_kernels.int8 import round_rows, widen_rows

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
from agreement import poisoned
from batches import Segments, grouped

FLOOR = 1e-5
"""Of the largest true value, at least 1: where torch happens to be exact."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Operation = Callable[..., Any]
Inputs = Sequence[torch.Tensor | None]


@contextlib.contextmanager
def torch_operations() -> Iterator[None]:
    """Operations are plain torch, on whatever device."""
    before = os.environ.get("PLAUDIT_KERNELS")
    os.environ["PLAUDIT_KERNELS"] = "torch"
    select.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("PLAUDIT_KERNELS")
        if before is not None:
            os.environ["PLAUDIT_KERNELS"] = before
        select.cache_clear()


def worst(fused: Operation, reference: Operation, inputs: Inputs, dtype: torch.dtype, *, trained: bool = True) -> float:
    """Error over what is allowed, the most over outputs and, where `trained`, gradients by every input; NaN where
    something was not written."""
    rounded = [_like(tensor, dtype) if _real(tensor) else tensor for tensor in inputs]
    with poisoned():
        ours = outcomes(fused, rounded, dtype, dtype, trained)
    with torch_operations():
        theirs, truths = (outcomes(reference, rounded, kind, dtype, trained) for kind in (dtype, torch.float64))
    over = [float(_error(o, true) / _allowed(t, true)) for o, t, true in zip(ours, theirs, truths, strict=True)]
    return max(over) if np.isfinite(over).all() else float("nan")


def outcomes(
    operation: Operation, inputs: Inputs, dtype: torch.dtype, given: torch.dtype, trained: bool
) -> list[torch.Tensor]:
    """Outputs, and gradients for random ones of the outputs, computed in `dtype` from numbers that `given` holds."""
    leaves = [_like(tensor, dtype).requires_grad_(trained) if _real(tensor) else tensor for tensor in inputs]
    with torch.set_grad_enabled(trained):
        results = operation(*leaves)
    outputs = [result for result in (results if isinstance(results, tuple) else (results,)) if result is not None]
    if not trained:
        return [output.double() for output in outputs]
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    draws = [torch.randn(out.shape, generator=generator, device=out.device) for out in outputs]
    ways = [draw.to(given).to(out.dtype) for draw, out in zip(draws, outputs, strict=True)]
    asked = [leaf for leaf in leaves if _real(leaf)]
    gradients = torch.autograd.grad(outputs, asked, ways)
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


def _real(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers and strides in another dtype."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
    return copy.copy_(tensor)


def _error(values: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (values - truth).abs().max()


def _allowed(theirs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return 2 * _error(theirs, truth) + FLOOR * truth.abs().max().clamp(min=1)


# -- attention -----------------------------------------------------------------------------------------------


def attention_cases(dry: bool) -> dict[str, tuple[Segments, int, int, int, dict[str, Any]]]:
    """(segments, query heads, key heads, head size, options)."""
    if dry:
        return {"shared, GQA": (grouped([(20, [3, 9])]), 2, 1, 32, {})}
    ragged = grouped([(0, [1]), (300, [1, 127, 128, 129, 70]), (0, [1023])])
    return {
        **{f"shared, GQA, head {width}": (ragged, 4, 2, width, {}) for width in (32, 64, 80, 96, 128, 256)},
        "window": (ragged, 4, 1, 64, {"window": 200}),
        "window of a long prefix": (grouped([(1500, [3, 90, 700])]), 4, 2, 128, {"window": 512}),
        "softcap": (ragged, 4, 2, 128, {"softcap": 3.0}),
        "softcap and window": (ragged, 2, 2, 256, {"softcap": 3.0, "window": 64}),
        "16 responses": (grouped([(800, [200] * 16)]), 8, 2, 128, {}),
        "bidirectional": (grouped([(0, [n]) for n in (5, 123, 700, 65)]), 4, 4, 64, {"causal": False}),
        "local": (grouped([(0, [n]) for n in (5, 900)]), 4, 4, 64, {"causal": False, "window": 128}),
    }


def attention(bench: Bench, name: str, dtype: torch.dtype) -> float:
    segments, heads, kv_heads, width, options = attention_cases(bench.dry)[name]
    tokens, scale = sum(segment[1] for segment in segments), width**-0.5
    causal, window, softcap = options.get("causal", True), options.get("window"), options.get("softcap")
    plan = planned(bench, np.array(segments), tokens, causal=causal, window=window)

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return packed_attention(q, k, v, plan, scale=scale, softcap=softcap)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference_attention(q, k, v, segments, causal=causal, scale=scale, window=window, softcap=softcap)

    qkv = fresh(bench, tokens, heads + 2 * kv_heads, width)
    return worst(fused, reference, qkv.split([heads, kv_heads, kv_heads], 1), dtype)


# -- rows, products, losses ----------------------------------------------------------------------------------


def operations(bench: Bench) -> dict[str, tuple[Operation, Inputs, bool]]:
    """(operation, inputs, with gradients); an operation is its own reference on torch's path."""
    rows, width = bench.small(777, 3), bench.small(4096, 24)
    wide = fresh(bench, 3, rows, width + 16)
    hidden, residual, other = (part[:, 8 : 8 + width] for part in wide)
    weight, bias = fresh(bench, width), fresh(bench, width)
    picked = torch.randint(rows, (rows // 2 + 1,), device=bench.device)
    head = fresh(bench, 3, width)
    return {
        "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6)[0], (hidden, weight), True),
        "add + rms_norm": (lambda x, r, w: rms_norm(x, w, 1e-6, residual_TD=r), (hidden, residual, weight), True),
        "rms_norm, 1 + weight": (lambda x, w: rms_norm(x, w, 1e-6, unit_offset=True)[0], (hidden, weight), True),
        "add + layer_norm": (
            lambda x, r, w, b: layer_norm(x, w, b, 1e-6, residual_TD=r),
            (hidden, residual, weight, bias),
            True,
        ),
        "gated silu": (lambda x: gated(x, "silu"), (hidden,), True),
        "gated gelu": (lambda x: gated(x, "gelu"), (hidden,), True),
        "gated gelu_tanh": (lambda x: gated(x, "gelu_tanh"), (hidden,), True),
        "bias + gelu": (lambda x, b: bias_gelu(x, b, "gelu"), (hidden, bias), True),
        "pooled head": (
            lambda x, w, b, n: pooled_head(x, picked, w, b, norm_weight=n),
            (hidden, head, bias[:3], weight),
            False,
        ),
        "product": (matmul, (hidden, other), True),
        **{f"rotary, head {d}, {name}": _rotary(bench, d, normed) for d in (64, 128) for name, normed in _NORMED},
        **_losses(bench),
    }


_NORMED = (("plain", False), ("normed", True))


def _rotary(bench: Bench, width: int, normed: bool) -> tuple[Operation, Inputs, bool]:
    tokens = bench.small(1027, 3)
    fused = fresh(bench, tokens, 8, width)
    angles = torch.arange(tokens, device=bench.device)[:, None] * fresh(bench, width // 2).abs()
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
    norms = (fresh(bench, width), fresh(bench, width)) if normed else (None, None)

    def turned(q: torch.Tensor, k: torch.Tensor, *norm: torch.Tensor | None) -> Any:
        return rotary(q, k, cos.to(q), sin.to(q), query_norm=norm[0], key_norm=norm[1])

    return turned, (fused[:, :4], fused[:, 4:6], *norms), True


def _losses(bench: Bench) -> dict[str, tuple[Operation, Inputs, bool]]:
    count, groups = bench.small(5000, 9), bench.small(400, 3)
    scores = fresh(bench, count)
    chosen, rejected = (torch.randint(count, (count,), device=bench.device) for _ in range(2))
    share, margin, weight = (fresh(bench, count).sigmoid().float() for _ in range(3))
    ends = np.random.default_rng(0).integers(bench.small(150, 4), size=groups).cumsum()
    offsets = torch.tensor([0, *ends.tolist()], device=bench.device)
    ranking = torch.randint(count, (int(ends[-1]),), device=bench.device)
    return {
        "bradley_terry": (
            lambda s: bradley_terry(s, chosen, rejected, share, margin, weight, centring=0.01),
            (scores,),
            True,
        ),
        "plackett_luce": (lambda s: plackett_luce(s, ranking, offsets), (scores,), True),
    }


def fresh(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=bench.device, dtype=torch.float64)


def fp8(bench: Bench) -> float:
    """The product of rounded rows against the same rounded rows in float64, and the rounding against half a step of
    e4m3; in units of what is allowed."""
    m, n, k = (bench.small(size, 16) for size in (1000, 1024, 4096))
    a, b = fresh(bench, m, k).bfloat16(), fresh(bench, n, k).bfloat16()
    with poisoned():
        (left, left_scale), (right, right_scale) = quantize_rows(a), quantize_rows(b)
        ours = matmul_fp8(a, right, right_scale).double()
    wide = left.double() * left_scale.double()[:, None]
    rounding = (wide - a.double()).abs() / (a.double().abs() / 16 + left_scale.double()[:, None] * 2**-10)
    truth = wide @ (right.double() * right_scale.double()[:, None]).T
    # bf16 rounds to 8 bits, and Hopper adds 128 products in 14 bits before they go to fp32.
    allowed = truth.abs() * 2**-8 + 2**-13 * wide.abs() @ (right.double().abs() * right_scale.double()[:, None]).T
    a[0, 0] = torch.nan
    if matmul_fp8(a, right, right_scale)[0].isfinite().any():
        return float("inf")
    return max(float(rounding.max()), float(((ours - truth).abs() / allowed).max()))


def int8(bench: Bench) -> float:
    """Weights of int8 as they are widened, against float64: a rounding to bf16, in units of what is allowed."""
    n, k = bench.small(1024, 16), bench.small(14336, 24)
    weight, scale = round_rows(fresh(bench, n, k).bfloat16())
    with poisoned():
        ours = widen_rows(weight, scale, scale.new_empty(n, k, dtype=torch.bfloat16))
    truth = weight.double() * scale.double()[:, None]
    return float(((ours.double() - truth).abs() / (truth.abs() * (2**-8 + 2**-23) + 1e-30)).max())


# -- 64-bit offsets ------------------------------------------------------------------------------------------


def huge(bench: Bench) -> dict[str, Callable[[], float]]:
    """Offsets beyond 2^31: the last rows have the bits that they have alone; 0 if so, else the share of others."""
    rows = bench.small(1 << 31, 1 << 10) // bench.small(28672, 64) + 64

    def gated_rows() -> float:
        gate_up = torch.randn(rows, bench.small(28672, 64), device=bench.device, dtype=torch.bfloat16)
        return _apart(gated(gate_up, "silu")[-64:], gated(gate_up[-64:].clone(), "silu"))

    def norm_rows() -> float:
        count, width = bench.small(1 << 31, 1 << 10) // bench.small(4096, 32) + 64, bench.small(4096, 32)
        hidden = torch.randn(count, width, device=bench.device, dtype=torch.bfloat16)
        weight = torch.randn(width, device=bench.device, dtype=torch.bfloat16)
        return _apart(rms_norm(hidden, weight, 1e-6)[0][-64:], rms_norm(hidden[-64:].clone(), weight, 1e-6)[0])

    def product() -> float:
        columns = bench.small(28672, 64)
        a = torch.randn(rows, 64, device=bench.device, dtype=torch.bfloat16)
        b = torch.randn(columns, 64, device=bench.device, dtype=torch.bfloat16)
        return _apart(matmul(a, b)[-64:], matmul(a[-64:].clone(), b))

    def heads() -> float:
        stride = bench.small(32768, 768)
        tokens = bench.small(1 << 31, 1 << 16) // stride // 100 * 100 + 100
        wide = torch.randn(tokens, stride, device=bench.device, dtype=torch.bfloat16)
        views = [wide[:, -64 * part : stride - 64 * (part - 1)].view(tokens, 1, 64) for part in (1, 2, 3)]
        segments = grouped([(0, [100])] * (tokens // 100))
        plan = planned(bench, np.array(segments), tokens)
        ours, plain = (packed_attention(*qkv, plan, scale=0.125) for qkv in (views, [v.contiguous() for v in views]))
        return _apart(ours, plain)

    return {"gated": gated_rows, "rms_norm": norm_rows, "product": product, "attention": heads}


def rounding(bench: Bench) -> float:
    """Share of the numbers of rotary in bf16, where each product is rounded before the sum, that torch has not."""
    operation, inputs, _ = _rotary(bench, 128, False)
    heads = [_like(tensor, torch.bfloat16) for tensor in inputs if tensor is not None]
    with torch.no_grad():
        ours = torch.cat(operation(*heads, None, None), 1)
        with torch_operations():
            return _apart(ours, torch.cat(operation(*heads, None, None), 1))


def _apart(ours: torch.Tensor, alone: torch.Tensor) -> float:
    return float((ours != alone).float().mean())


def correctness(bench: Bench) -> None:
    def ratio(value: float) -> list[Row]:
        return [Row("error over what is allowed", [value], "ratio", "2 x torch + floor", target=1.0, at_most=True)]

    interpreted = bench.device.type == "cpu" and os.environ.get("PLAUDIT_KERNELS") == "triton"
    for name, dtype in DTYPES.items():
        if interpreted and name != "float32":
            continue  # Triton's interpreter multiplies the bits of bf16 and fp8, not their numbers
        for shape in attention_cases(bench.dry):
            case = Case("correctness", "attention", shape, name, 6)
            bench.run(case, lambda shape=shape, dtype=dtype: ratio(attention(bench, shape, dtype)))
        for subject in operations(bench):
            case = Case("correctness", subject, "777 rows", name, 4)
            bench.run(case, lambda subject=subject, dtype=dtype: ratio(_operation(bench, subject, dtype)))
    if interpreted:
        return
    bench.run(Case("correctness", "fp8 product", "1000 x 1024 x 4096", "fp8", 5), lambda: ratio(fp8(bench)))
    bench.run(Case("correctness", "int8 widened", "1024 x 14336", "int8", 4), lambda: ratio(int8(bench)))
    bits = {f"{subject}, offsets over 2^31": apart for subject, apart in huge(bench).items()}
    for subject, apart in {**bits, "rotary, bits of torch": lambda: rounding(bench)}.items():
        bench.run(
            Case("correctness", subject, "last rows" if subject in bits else "1027 tokens", seconds=6),
            lambda apart=apart: [Row("share of changed bits", [apart()], "share", target=0.0, at_most=True)],
        )


def _operation(bench: Bench, subject: str, dtype: torch.dtype) -> float:
    operation, inputs, trained = operations(bench)[subject]
    return worst(operation, operation, inputs, dtype, trained=trained)


# -- compute-sanitizer ---------------------------------------------------------------------------------------

TOOLS = ("memcheck", "racecheck", "initcheck")


def sanitizer(bench: Bench) -> None:
    """The correctness section at its smallest under each tool of compute-sanitizer."""
    for tool in TOOLS:
        bench.run(Case("sanitizer", tool, "smallest shapes", "all", 90), lambda tool=tool: _sanitized(bench, tool))


def _sanitized(bench: Bench, tool: str) -> list[Row]:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is not installed")
    if bench.device.type != "cuda":
        raise Skip("there is no GPU")
    command = [program, "--tool", tool, sys.executable, str(Path(__file__).with_name("gpu.py"))]
    run = subprocess.run(
        [*command, "--section", "correctness", "--dry-run", "--device", "cuda"], capture_output=True, text=True,
        timeout=300, check=False, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    summary = [line for line in run.stdout.splitlines() if "SUMMARY" in line]
    if not summary or run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {(run.stdout + run.stderr)[-2000:]}")
    print(*summary, sep="\n")
    errors = [float(word) for line in summary for word in line.split() if word.isdigit()]
    return [Row("errors", [max(errors)], "count", target=0.0, at_most=True)]
