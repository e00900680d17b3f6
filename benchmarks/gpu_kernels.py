"""Kernels by themselves: fused operations against the copy bandwidth and liger-kernel, matrix products against
cuBLAS."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_card import Bench, Case, Row, random, ratios
from gpu_models import Sizes, sizes_of
from torch.nn.functional import linear

from plaudit_kernels import (
    bradley_terry,
    gated,
    layer_norm,
    matmul,
    matmul_fp8,
    plackett_luce,
    pooled_head,
    quantize_rows,
    rms_norm,
    rotary,
)

Work = Callable[[], object]
Norms = tuple[torch.Tensor | None, torch.Tensor | None]
"""Weights of the norms of queries and keys."""

ELEMENTS = 1 << 27
"""Of the stream: a microsecond around a kernel must be nothing beside it."""

MODELS = ("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B")


@dataclass(frozen=True)
class Fused:
    """A fused operation: `work` moves `bytes` at the least, counting each input and output once. `liger`: the equal
    operation there; `more`: whether ours fuses more than it."""

    work: Work
    bytes: int
    liger: Work | None = None
    more: bool = False


# -- fused operations ----------------------------------------------------------------------------------------


def fused(bench: Bench) -> None:
    """Share of the copy bandwidth at sizes that fill the card; over liger-kernel where that is installed."""
    for model in bench.models(*MODELS):
        sizes = sizes_of(bench, model)
        rows = bench.small(ELEMENTS // sizes.hidden, 32)
        for name, make in {**_forwards(bench, sizes, rows), **_backwards(bench, sizes, rows)}.items():
            bench.run(Case("fused", name, f"{model}, {rows} rows", seconds=2), lambda make=make: _moved(bench, make()))
    for name, make in _losses(bench).items():
        bench.run(Case("fused", name, "2^24 comparisons", "float32", 5), lambda make=make: _moved(bench, make()))


def _moved(bench: Bench, fused: Fused) -> list[Row]:
    works: dict[str, Work] = {"ours": fused.work}
    if fused.liger is not None:
        works["liger"] = fused.liger
    taken = bench.race(works, budget=0.5)
    shares = [fused.bytes / seconds / bench.ceilings.copy for seconds in taken["ours"]]
    against = "copy" if _liger() else "copy; liger-kernel is not installed and was not measured"
    rows = [Row("share of the copy bandwidth", shares, "share", against, target=0.85)]
    if "liger" in taken:
        target = 1.2 if fused.more else 0.97
        over = ratios(taken["liger"], taken["ours"])
        rows.append(Row("speed over liger-kernel", over, "ratio", f"liger-kernel {_liger()}", target=target))
    return rows


def _forwards(bench: Bench, sizes: Sizes, rows: int) -> dict[str, Callable[[], Fused]]:
    """What is made is made when it is measured: together they would fill the card's memory."""

    def norm(add: bool) -> Fused:
        hidden, residual = (random(bench, rows, sizes.hidden) for _ in range(2))
        weight = random(bench, sizes.hidden)
        liger = _liger_norm(hidden, residual if add else None, weight)
        passes = 4 if add else 2
        return Fused(
            inference(lambda: rms_norm(hidden, weight, 1e-6, residual_TD=residual if add else None)),
            passes * hidden.nbytes, liger,
        )  # fmt: skip

    def layer() -> Fused:
        hidden, residual = (random(bench, rows, sizes.hidden) for _ in range(2))
        weight, bias = (random(bench, sizes.hidden) for _ in range(2))
        work = inference(lambda: layer_norm(hidden, weight, bias, 1e-6, residual_TD=residual))
        return Fused(work, 4 * hidden.nbytes)

    def turned(normed: bool) -> Fused:
        query, key, cos, sin, norms = _heads(bench, sizes, rows, normed)
        options = {"query_norm": norms[0], "key_norm": norms[1]}
        work = inference(lambda: rotary(query, key, cos, sin, **options))
        liger = _liger_rope(query, key, cos, sin, norms)
        return Fused(work, 2 * (_bytes(query) + _bytes(key)) + cos.nbytes, liger, more=normed)

    def activated() -> Fused:
        gate_up = random(bench, rows, 2 * sizes.inner)
        work = inference(lambda: gated(gate_up, "silu"))
        return Fused(work, gate_up.nbytes * 3 // 2, _liger_swiglu(gate_up))

    def head() -> Fused:
        hidden, weight = random(bench, rows, sizes.hidden), random(bench, 1, sizes.hidden).float()
        norm, picked = random(bench, sizes.hidden), torch.randperm(rows, device=bench.device)
        work = inference(lambda: pooled_head(hidden, picked, weight, None, norm_weight=norm))
        return Fused(work, hidden.nbytes + picked.nbytes + 4 * rows)

    def rounded() -> Fused:
        hidden = random(bench, rows, sizes.hidden)
        return Fused(inference(lambda: quantize_rows(hidden)), hidden.nbytes * 3 // 2)

    return {
        "rms_norm": lambda: norm(False),
        "add + rms_norm": lambda: norm(True),
        "add + layer_norm": layer,
        "rotary": lambda: turned(False),
        "qk-norm + rotary": lambda: turned(True),
        "gated silu": activated,
        "norm + pooled head": head,
        "rows to fp8": rounded,
    }


def _backwards(bench: Bench, sizes: Sizes, rows: int) -> dict[str, Callable[[], Fused]]:
    def norm() -> Fused:
        hidden, residual = (random(bench, rows, sizes.hidden).requires_grad_() for _ in range(2))
        weight = random(bench, sizes.hidden).requires_grad_()
        outputs = rms_norm(hidden, weight, 1e-6, residual_TD=residual)
        return Fused(gradient(bench, outputs, (hidden, weight)), 4 * _bytes(hidden))

    def activated() -> Fused:
        gate_up = random(bench, rows, 2 * sizes.inner).requires_grad_()
        return Fused(gradient(bench, (gated(gate_up, "silu"),), (gate_up,)), _bytes(gate_up) * 5 // 2)

    def turned() -> Fused:
        query, key, cos, sin, norms = _heads(bench, sizes, rows, True)
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, *norms)]
        outputs = rotary(*leaves[:2], cos, sin, query_norm=leaves[2], key_norm=leaves[3])
        return Fused(gradient(bench, outputs, leaves), 3 * (_bytes(query) + _bytes(key)) + cos.nbytes)

    return {
        "add + rms_norm, backward": norm,
        "gated silu, backward": activated,
        "qk-norm + rotary, backward": turned,
    }


def _losses(bench: Bench) -> dict[str, Callable[[], Fused]]:
    count = bench.small(1 << 24, 64)

    def pairs() -> Fused:
        scores = random(bench, 2 * count, dtype=torch.float32)
        chosen, rejected = torch.arange(0, 2 * count, 2, device=bench.device), torch.arange(1, 2 * count, 2)
        share, margin, weight = (random(bench, count, dtype=torch.float32).sigmoid() for _ in range(3))
        given = (scores, chosen, rejected.to(bench.device), share, margin, weight)
        return Fused(inference(lambda: bradley_terry(*given)), count * (2 * 4 + 2 * 8 + 3 * 4 + 3 * 4))

    def rankings() -> Fused:
        scores = random(bench, count, dtype=torch.float32)
        ranking = torch.arange(count, device=bench.device)
        offsets = torch.arange(0, count + 1, 64, device=bench.device)
        return Fused(inference(lambda: plackett_luce(scores, ranking, offsets)), count * (4 + 8 + 4 + 4))

    return {"bradley_terry": pairs, "plackett_luce, 64 a group": rankings}


def _heads(
    bench: Bench, sizes: Sizes, rows: int, normed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Norms]:
    """Query and key as views of a fused product, angles, norms."""
    product = random(bench, rows, (sizes.heads + 2 * sizes.kv_heads), sizes.width)
    query, key, _ = product.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], 1)
    angles = random(bench, rows, sizes.width // 2, dtype=torch.float32).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    norms = (random(bench, sizes.width), random(bench, sizes.width)) if normed else (None, None)
    return query, key, cos, sin, norms


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def inference(work: Work) -> Work:
    return torch.no_grad()(work)


def gradient(bench: Bench, outputs: tuple[torch.Tensor, ...], leaves: Any) -> Work:
    """The backward pass alone."""
    ways = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, list(leaves), ways, retain_graph=True)


# -- liger-kernel --------------------------------------------------------------------------------------------


@functools.cache
def _liger() -> str:
    """The version that is installed; empty without it."""
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return ""
    return importlib.metadata.version("liger_kernel")


def _liger_norm(hidden: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> Work | None:
    if not _liger():
        return None
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if residual is None:
        return inference(lambda: LigerRMSNormFunction.apply(hidden, weight, 1e-6, 0.0, "llama", False))
    return inference(lambda: LigerFusedAddRMSNormFunction.apply(hidden, residual, weight, 1e-6, 0.0, "llama", False))


def _liger_rope(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: Norms
) -> Work | None:
    """Of normed heads in three kernels, where ours takes one."""
    if not _liger():
        return None
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def normed(heads: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        return heads if norm is None else LigerRMSNormFunction.apply(heads, norm, 1e-6, 0.0, "llama", False)

    # Its layout is (1, heads, tokens, width), views of one row after another, which it turns in place.
    q, k = query.contiguous()[None], key.contiguous()[None]

    def work() -> object:
        turned = (normed(q, norms[0]).transpose(1, 2), normed(k, norms[1]).transpose(1, 2))
        return LigerRopeFunction.apply(*turned, cos[None], sin[None])

    return inference(work)


def _liger_swiglu(gate_up: torch.Tensor) -> Work | None:
    if not _liger():
        return None
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = (part.contiguous() for part in gate_up.chunk(2, 1))
    return inference(lambda: LigerSiLUMulFunction.apply(gate, up))


def runs(name: str, work: Work) -> bool:
    """Whether a candidate takes these tensors on this card."""
    try:
        work()
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"{name} is left out: {str(error).splitlines()[0]}")
        return False
    return True


# -- products ------------------------------------------------------------------------------------------------


def invariant(bench: Bench) -> None:
    """The batch-invariant product over cuBLAS, and fp8 over bf16, on the layers' shapes."""
    for model in bench.models(*MODELS):
        sizes = sizes_of(bench, model)
        heads = (sizes.heads + 2 * sizes.kv_heads) * sizes.width
        layers = {
            "qkv": (heads, sizes.hidden),
            "output": (sizes.hidden, sizes.heads * sizes.width),
            "gate-up": (2 * sizes.inner, sizes.hidden),
            "down": (sizes.hidden, sizes.inner),
        }
        for layer, (n, k) in layers.items():
            m = bench.small(8192, 16)
            case = Case("invariant", f"{model} {layer}", f"{m} x {n} x {k}", seconds=3)
            bench.run(case, lambda shape=(m, n, k): _products(bench, *shape))


def _products(bench: Bench, m: int, n: int, k: int) -> list[Row]:
    a, b = random(bench, m, k), random(bench, n, k)
    rounded, scale = quantize_rows(b)
    left, left_scale = quantize_rows(a)
    works: dict[str, Work] = {
        "cublas": lambda: linear(a, b),
        "ours": lambda: matmul(a, b),
        "fp8": lambda: matmul_fp8(a, rounded, scale),
        "fp8, fast mode": lambda: matmul_fp8(a, rounded, scale, exact=False),
    }
    if bench.device.type == "cuda":
        scales = {"scale_a": left_scale[:, None], "scale_b": scale[None]}
        works["torch fp8"] = lambda: torch._scaled_mm(
            left, rounded.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        if not runs("fp8", works["torch fp8"]):
            del works["torch fp8"]
    with torch.no_grad():
        taken = bench.race(works, budget=1.0)
    rows = [
        Row("speed of the invariant product", ratios(taken["cublas"], taken["ours"]), "ratio", "cuBLAS", target=0.7),
        *(
            Row(f"speed of {name}, rounding included", ratios(taken["cublas"], taken[name]), "ratio", "cuBLAS bf16")
            for name in ("fp8", "fp8, fast mode")
        ),
        Row("rate of cuBLAS", [2 * m * n * k / s / 1e12 for s in taken["cublas"]], "TFLOP/s"),
    ]
    if "torch fp8" in taken:
        over = ratios(taken["cublas"], taken["torch fp8"])
        rows.append(Row("speed of torch's fp8, operands rounded before", over, "ratio", "cuBLAS bf16"))
    return rows
