"""Attention of libraries for a batch in which nothing is shared: FlashAttention 3 (Shah et al., 2407.08608) where it is
installed, else torch's variable-length attention (FlashAttention 2, Dao, 2307.08691).

Neither is known to give a row the same bits in any company, so exact mode never asks for them. Fast mode takes the
first that agrees with the definition of attention on this very device, dtype and head size, and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from .attention import reference_attention
from .blocks import BlockPlan
from .chips import table_of
from .dispatch import Choice, select

Call = Callable[..., torch.Tensor]
DTYPES = (torch.float16, torch.bfloat16)
_LENGTHS = (1, 67, 128, 200)


class Library(NamedTuple):
    """`call` takes (query, key, value, offsets (N + 1,) int32, longest, scale, window); None: our own kernels."""

    call: Call | None
    name: str
    reason: str


@lru_cache(maxsize=64)
def unshared_attention(device: torch.device, dtype: torch.dtype, width: int) -> Library:
    """The library for batches without shared prefixes, or none, and why."""
    if dtype not in DTYPES:
        return Library(None, "", f"our kernels: libraries have no attention in {dtype}")
    refused: list[str] = []
    libraries: dict[str, Call] = {"flash_attn_interface": _flash_attention_3, "torch.varlen_attn": _torch}
    if device.type == "cuda" and table_of(device) == "sm_90":  # docs/log.md, the engine on a card
        del libraries["torch.varlen_attn"]
        refused.append("torch.varlen_attn is not used (on this chip it is slower than our kernels)")
    for name, call in libraries.items():
        try:
            problem = _disagrees(call, device, dtype, width)
        except Exception as error:  # whatever it does to us, our own kernels are there
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        if not problem:
            return Library(call, name, "; ".join([name, *refused]))
        refused.append(f"{name} is not used ({problem})")
    return Library(None, "", "; ".join(["our kernels", *refused]))


def fast_choice(device: torch.device, dtype: torch.dtype, width: int) -> Choice:
    """`select` for fast mode: with the library, where the kernels are those of CUDA."""
    choice = select(device)
    if choice.implementation != "triton":
        return choice
    _, name, reason = unshared_attention(device, dtype, width)
    return replace(choice, reason=f"{choice.reason}; where nothing is shared: {reason}", library=name and f"+{name}")


def attend_unshared(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, scale: float
) -> torch.Tensor | None:
    """The library's output, without gradients; None where the plan or the device is not for it. A CUDA graph would
    keep the longest length of the batch that it was captured with."""
    if plan.unshared is None or plan.unshared[0] != len(plan.segments) or torch.is_grad_enabled():
        return None
    call = unshared_attention(query.device, query.dtype, query.shape[-1]).call
    if call is None or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    offsets = pad(plan.segments[:, 0], (0, 1), value=plan.tokens)
    return call(query, key, value, offsets, plan.unshared[1], scale, _sides(plan.causal, plan.window))


def _sides(causal: bool, window: int | None) -> tuple[int, int]:
    """Keys seen to the left and to the right of a query; -1 is all."""
    if causal:
        return (-1 if window is None else window - 1), 0
    return (-1, -1) if window is None else (window // 2, window // 2)


def _flash_attention_3(q: Any, k: Any, v: Any, offsets: Any, longest: int, scale: float, window: Any) -> torch.Tensor:
    out: Any = import_module("flash_attn_interface").flash_attn_varlen_func(
        q, k, v, offsets, offsets, longest, longest, softmax_scale=scale, causal=window[1] == 0, window_size=window
    )
    attended: torch.Tensor = out[0] if isinstance(out, tuple) else out  # some releases give logarithms of the sums too
    return attended


def _torch(q: Any, k: Any, v: Any, offsets: Any, longest: int, scale: float, window: Any) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": window}
    if "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.11 need not be asked for grouped heads
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)  # type: ignore[return-value]


def _disagrees(call: Call, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """What is wrong with it; empty if its error is at most twice that of the definition in the same dtype."""
    draw = torch.Generator().manual_seed(0)
    starts = [sum(_LENGTHS[:n]) for n in range(len(_LENGTHS) + 1)]
    q, k, v = (torch.randn(starts[-1], heads, width, generator=draw).to(device, dtype) for heads in (4, 2, 2))
    segments = [(start, length, 0, 0) for start, length in zip(starts, _LENGTHS, strict=False)]
    offsets = torch.tensor(starts, dtype=torch.int32, device=device)
    for causal, window in ((True, None), (True, 40), (False, None), (False, 40)):
        options: dict[str, Any] = {"causal": causal, "scale": width**-0.5, "window": window}
        truth = reference_attention(q.double(), k.double(), v.double(), segments, **options)
        allowed = (reference_attention(q, k, v, segments, **options) - truth).abs().max()
        with torch.no_grad():
            ours = call(q, k, v, offsets, max(_LENGTHS), options["scale"], _sides(causal, window))
        error = (ours - truth).abs().max()
        if not error <= 2 * allowed + 4 * torch.finfo(dtype).eps:
            return f"its error is {float(error):.1e} where {float(allowed):.1e} is that of the dtype"
    return ""
