"""Attention by a library where nothing is shared: only where it agrees with the definition, and never in exact mode.

No library of CUDA runs without a card: a module of FlashAttention 3's signature stands in and computes by definition.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from plaudit_kernels import (
    fast_choice,
    packed_attention,
    plan_attention,
    reference_attention,
    select,
    unshared_attention,
)
from plaudit_kernels.varlen import _torch

from .batches import Segments, grouped, heads

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, and what is installed is asked")


class StandIn(ModuleType):
    """`flash_attn_interface`, by definition; `wrong` changes what it gives."""

    def __init__(self, wrong: Callable[[torch.Tensor], Any] = lambda out: out) -> None:
        super().__init__("flash_attn_interface")
        self.wrong, self.calls = wrong, 0

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Any:
        self.calls += 1
        starts = cu_seqlens_q.tolist()
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k) and starts[-1] == len(q)
        lengths = np.diff(starts)
        assert max_seqlen_q == max_seqlen_k == lengths.max() and softmax_scale is not None
        left, right = window_size
        assert causal == (right == 0)
        window = None if left < 0 else left + 1 if causal else 2 * left
        segments = [(start, int(length), 0, 0) for start, length in zip(starts, lengths, strict=False)]
        out = reference_attention(q, k, v, segments, causal=causal, scale=softmax_scale, window=window)
        return self.wrong(out)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    """`installed(wrong)` puts a stand-in where FlashAttention 3 would be, beside kernels in the interpreter."""
    monkeypatch.setenv("PLAUDIT_KERNELS", "triton")

    def install(*wrong: Callable[[torch.Tensor], Any]) -> StandIn:
        module = StandIn(*wrong)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
        return module

    for cache in (select, unshared_attention):
        cache.cache_clear()
    yield install
    monkeypatch.undo()
    for cache in (select, unshared_attention):
        cache.cache_clear()


UNSHARED = grouped([(0, [n]) for n in (5, 40, 1)])


def attended(
    segments: Segments, *, fast: bool, causal: bool = True, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    tokens = sum(segment[1] for segment in segments)
    plan = plan_attention(np.array(segments), tokens, causal=causal, window=window, device=CPU, fast=fast)
    tensors = [tensor.half() for tensor in heads(tokens, 2, 1, 32)]
    return packed_attention(*tensors, plan, scale=0.2, softcap=softcap)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 8), (False, None), (False, 8)])
@pytest.mark.parametrize("shape", [lambda out: out, lambda out: (out, None)])
def test_one_that_agrees_is_used(
    installed: Callable[..., StandIn], shape: Callable[[torch.Tensor], Any], causal: bool, window: int | None
) -> None:
    module = installed(shape)
    assert unshared_attention(CPU, torch.float16, 32).reason == "flash_attn_interface"
    choice = fast_choice(CPU, torch.float16, 32)
    assert choice.library == "+flash_attn_interface"
    assert choice.reason == f"{select(CPU).reason}; where nothing is shared: flash_attn_interface"
    assert module.calls == 4, "causal and not, with and without a window"
    with torch.no_grad():
        ours, theirs = (attended(UNSHARED, fast=fast, causal=causal, window=window) for fast in (False, True))
    assert module.calls == 5, "in fast mode alone"
    torch.testing.assert_close(theirs, ours, rtol=2e-3, atol=2e-3)


def failing(out: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda out: out * 1.01, "its error is"),
        (lambda out: torch.full_like(out, torch.nan), "its error is nan"),
        (lambda out: out.roll(1, 0), "its error is"),
        (failing, "RuntimeError: no kernel image is available)"),
    ],
)
def test_one_that_is_wrong_is_refused_and_named(
    installed: Callable[..., StandIn], wrong: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    module = installed(wrong)
    library = unshared_attention(CPU, torch.float16, 32)
    assert library.call is None and library.reason.startswith("our kernels; flash_attn_interface is not used (")
    assert said in library.reason and "torch.varlen_attn is not used (" in library.reason, "which needs CUDA"
    calls = module.calls
    with torch.no_grad():
        attended(UNSHARED, fast=True)
    assert module.calls == calls


def test_what_is_not_installed_is_named(installed: Callable[..., StandIn]) -> None:
    reason = unshared_attention(CPU, torch.float16, 32).reason
    assert "flash_attn_interface is not used (ModuleNotFoundError: No module named" in reason
    assert unshared_attention(CPU, torch.float32, 32).reason.startswith("our kernels: libraries have no attention in")


def test_what_is_shared_or_capped_or_trained_is_ours(installed: Callable[..., StandIn]) -> None:
    module = installed()
    with torch.no_grad():
        attended(grouped([(20, [3, 9])]), fast=True)
        attended(UNSHARED, fast=True, softcap=3.0)
    attended(UNSHARED, fast=True)
    assert module.calls == 0


def test_torchs_own_is_asked_as_its_signature_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no word for grouped heads, and takes them; later releases have to be asked."""
    from torch.nn.attention import varlen

    seen: list[dict[str, Any]] = []

    def of_now(*tensors: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool = False) -> torch.Tensor:
        seen.append({"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa})
        return torch.zeros(0)

    def of_then(*tensors: Any, scale: float, window_size: tuple[int, int]) -> torch.Tensor:
        return of_now(*tensors, scale=scale, window_size=window_size)

    names = inspect.signature(varlen.varlen_attn).parameters.keys()
    assert {"scale", "window_size"} <= names
    query, key, _ = heads(5, 4, 2, 16)
    for release, asked in ((of_now, True), (of_then, False)):
        monkeypatch.setattr(varlen, "varlen_attn", release)
        _torch(query, key, key, None, 5, 0.2, (-1, 0))
        assert seen.pop() == {"scale": 0.2, "window_size": (-1, 0), "enable_gqa": asked}
