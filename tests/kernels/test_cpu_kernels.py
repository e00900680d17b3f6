"""The fused CPU kernels: their definitions, the rounding of torch in bf16, and bits that depend on no neighbour."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from plaudit_kernels import (
    BLOCK,
    Activation,
    cpu_attention,
    cpu_pairs,
    cpu_runtime,
    dispatch,
    gated,
    layer_norm,
    packed_attention,
    plan_attention,
    reference_attention,
    rms_norm,
    rotary,
)

from .batches import Segments, grouped, heads

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["fp32", "bf16", "bf16 in pairs"]
"""Of the attention kernel: which runs for bf16 depends on the CPU."""


@pytest.fixture(autouse=True)
def _chosen() -> Iterator[None]:
    assert dispatch.select(CPU).implementation == "cpu", "the suite runs with numba"
    with torch.inference_mode():
        yield


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen: str = request.param
    if chosen == "bf16 in pairs" and not cpu_pairs.multiplies_pairs():
        pytest.skip("this CPU has no instruction that multiplies pairs of bf16")
    if chosen == "bf16":
        monkeypatch.setattr(cpu_attention, "multiplies_pairs", lambda: False)
    return chosen


def stored(tensors: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    return [tensor if kind == "fp32" else tensor.bfloat16() for tensor in tensors]


def attended(
    tensors: list[torch.Tensor], segments: Segments, *, causal: bool = True, window: int | None = None, cap: float = 0.0
) -> torch.Tensor:
    plan = plan_attention(np.array(segments), len(tensors[0]), causal=causal, device=CPU, window=window)
    return packed_attention(*tensors, plan, scale=tensors[0].shape[-1] ** -0.5, softcap=cap or None)


TOLERANCE = {"fp32": 1e-5, "bf16": 2**-7, "bf16 in pairs": 2**-7 + 2**-7}
"""bf16: fp32 inside, and one rounding to 8 bits of numbers below 4; in pairs the weights, which add up to 1, are
rounded to 8 bits before they multiply such numbers."""

AWKWARD = [
    ([(0, [1])], 4, 4, 32),
    ([(0, [BLOCK - 1]), (0, [BLOCK]), (0, [BLOCK + 1])], 6, 2, 64),
    ([(BLOCK, [1])], 4, 4, 32),
    ([(BLOCK - 1, [1, 2, BLOCK, BLOCK + 1])], 8, 1, 16),
    ([(BLOCK + 1, [5] * 300)], 4, 2, 64),
    ([(7, [123]), (0, [5]), (41, [3, 80])], 5, 1, 6),  # lanes and dimensions that fill no register
    ([(130, [200])], 2, 2, 256),
]


@pytest.mark.parametrize(("window", "cap"), [(None, 0.0), (9, 0.0), (None, 3.0), (40, 2.0)])
@pytest.mark.parametrize(("groups", "query_heads", "kv_heads", "width"), AWKWARD)
def test_causal_attention_is_its_definition(
    groups: list[tuple[int, list[int]]],
    query_heads: int,
    kv_heads: int,
    width: int,
    window: int | None,
    cap: float,
    kind: str,
) -> None:
    segments = grouped(groups)
    tensors = stored(heads(sum(s[1] for s in segments), query_heads, kv_heads, width), kind)
    truth = reference_attention(
        *(t.double() for t in tensors), segments, causal=True, scale=width**-0.5, window=window, softcap=cap or None
    )
    ours = attended(tensors, segments, window=window, cap=cap)
    assert (ours.double() - truth).abs().max() < TOLERANCE[kind]


@pytest.mark.parametrize("window", [None, 4, 70])
@pytest.mark.parametrize("lengths", [[1], [BLOCK, BLOCK + 1, 3], [5, 123, 64]])
def test_bidirectional_attention_is_its_definition(lengths: list[int], window: int | None, kind: str) -> None:
    segments = grouped([(0, [n]) for n in lengths])
    tensors = stored(heads(sum(lengths), 4, 4, 32), kind)
    truth = reference_attention(*(t.double() for t in tensors), segments, causal=False, scale=32**-0.5, window=window)
    assert (attended(tensors, segments, causal=False, window=window).double() - truth).abs().max() < TOLERANCE[kind]


def test_large_logits_neither_overflow_nor_vanish(kind: str) -> None:
    tensors = stored([t * 200 for t in heads(70, 2, 2, 32)], kind)
    segments: Segments = [(0, 70, 0, 0)]
    truth = reference_attention(*(t.double() for t in tensors), segments, causal=True, scale=32**-0.5)
    ours = attended(tensors, segments)
    assert torch.isfinite(ours).all()
    largest = 1e-2 if kind == "fp32" else 256 * TOLERANCE[kind]  # of values near 600
    assert (ours.double() - truth).abs().max() < largest


@pytest.mark.parametrize("window", [None, 20])
def test_a_query_gets_the_same_bits_wherever_its_keys_lie(window: int | None, kind: str) -> None:
    prefix, lengths = 45, [1, 31, 64, 77]
    query, key, value = stored(heads(prefix + sum(lengths), 6, 2, 32), kind)
    shared = attended([query, key, value], segments := grouped([(prefix, lengths)]), window=window)
    for start, length, _, _ in segments[1:]:
        rows = torch.cat([torch.arange(prefix), torch.arange(start, start + length)])
        alone = attended([part[rows] for part in (query, key, value)], [(0, len(rows), 0, 0)], window=window)
        assert torch.equal(alone[prefix:], shared[start : start + length])


def test_one_row_asked_for_alone_has_the_bits_it_has_among_others(kind: str) -> None:
    segments = np.array(grouped([(45, [31, 64, 77]), (0, [9])]))
    tensors = stored(heads(int(segments[:, 1].sum()), 4, 2, 64), kind)
    ends = segments[:, 0] + segments[:, 1] - 1
    few = plan_attention(segments, len(tensors[0]), causal=True, device=CPU, only=ends)
    some = packed_attention(*tensors, few, scale=0.1)
    whole = packed_attention(*tensors, plan_attention(segments, len(tensors[0]), causal=True, device=CPU), scale=0.1)
    assert torch.equal(some[ends], whole[ends])


def test_views_of_a_fused_product_are_read_in_place(kind: str) -> None:
    (product,) = stored([torch.randn(50, 4 * 32 + 2 * 32 + 2 * 32)], kind)
    views = [part.view(50, -1, 32) for part in product.split([128, 64, 64], dim=1)]
    copies = [view.clone() for view in views]
    assert torch.equal(attended(views, [(0, 50, 0, 0)]), attended(copies, [(0, 50, 0, 0)]))


def test_attention_refuses_what_it_has_no_kernel_for() -> None:
    with pytest.raises(ValueError, match="fp32 and bf16"):
        attended([t.double() for t in heads(5, 2, 2, 32)], [(0, 5, 0, 0)])


Operation = Callable[[], tuple[torch.Tensor, ...]]


def both(operation: Operation) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The fused kernel's result and torch's, which runs where gradients are enabled."""
    ours = operation()
    with torch.inference_mode(False), torch.enable_grad():
        return ours, operation()


def check(operation: Operation, dtype: torch.dtype) -> None:
    """fp32 within a few roundings. bf16 rounds where torch rounds: a difference is one unit of the last place, where
    fp32 arithmetic on either side of a boundary differs, and rare."""
    for our, their in zip(*both(operation), strict=True):
        assert our.dtype == their.dtype == dtype
        gap = (our.float() - their.float()).abs()
        if dtype == torch.float32:
            assert (gap <= 4e-6 * their.abs().clamp(min=1.0)).all()
        else:
            assert (gap <= 2**-7 * their.float().abs() + 1e-6).all()
            assert (gap > 1e-6).float().mean() < 0.01


SHAPES = [(1, 64), (33, 200), (5, 1023), (123, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, residual, wide = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=generator).to(dtype) for _ in range(2))
    strided = torch.cat([hidden, wide], dim=1)[:, : shape[1]]
    for rows in (hidden, strided):
        check(lambda rows=rows: rms_norm(rows, weight, 1e-6), dtype)
        check(lambda rows=rows: rms_norm(rows, weight, 1e-6, residual_TD=residual, unit_offset=True), dtype)
        check(lambda rows=rows: layer_norm(rows, weight, bias, 1e-5, residual_TD=residual), dtype)
        check(lambda rows=rows: layer_norm(rows, weight, None, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gated(activation: Activation, dtype: torch.dtype) -> None:
    rows = torch.randn(37, 2 * 77, generator=torch.Generator().manual_seed(0)) * 4
    rows[0, :4] = torch.tensor([-1e4, 1e4, -90.0, 90.0])
    check(lambda: (gated(rows.to(dtype), activation),), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [64, 32])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rotary(unit_offset: bool, normed: bool, turned: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(41, 6 * 64, generator=generator).to(dtype)
    angles = torch.randn(41, turned // 2, generator=generator).repeat(1, 2)
    weight = torch.randn(64, generator=generator).to(dtype) if normed else None

    def operation() -> tuple[torch.Tensor, torch.Tensor]:
        query, key = (part.view(41, -1, 64) for part in product.clone().split([256, 128], dim=1))
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return rotary(query, key, cos, sin, query_norm=weight, key_norm=weight, unit_offset=unit_offset)

    check(operation, dtype)


def test_rows_are_those_of_a_matrix() -> None:
    for operation in (lambda rows: rms_norm(rows, torch.ones(8), 1e-6), lambda rows: gated(rows, "silu")):
        with pytest.raises(ValueError, match="unpack"):
            operation(torch.ones(4, 6, 8)[:, 1:3])


def test_threads_do_not_change_bits(kind: str) -> None:
    segments = grouped([(45, [31, 64, 77]), (0, [9]), *[(20, [70])] * 8])
    tensors = stored(heads(sum(s[1] for s in segments), 4, 2, 64), kind)
    rows, weight = stored([torch.randn(1000, 64), torch.ones(64)], kind)
    angles = stored([torch.rand(len(tensors[0]), 64) for _ in range(2)], kind)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            turned = rotary(tensors[0].clone(), tensors[1].clone(), *angles, query_norm=weight, key_norm=weight)
            results.append((attended(tensors, segments), rms_norm(rows, weight, 1e-6)[0], *turned))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_threads_that_share_one_heap_do_not_write_over_each_other() -> None:
    """`MALLOC_ARENA_MAX`, which containers set, lets all threads allocate from the same memory."""
    test = f"{__file__}::{test_threads_do_not_change_bits.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    ended = subprocess.run(command, env={**os.environ, "MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_a_threads_memory_is_the_hosts_whatever_device_is_the_default() -> None:
    def normed(device: str) -> torch.Tensor:
        rows, weight = torch.ones(3, 40, device="cpu"), torch.ones(40, device="cpu")
        with torch.inference_mode(), torch.device(device):
            return rms_norm(rows, weight, 1e-6)[0]

    with ThreadPoolExecutor(1) as anew, ThreadPoolExecutor(1) as other:  # memory is kept by each that calls
        assert torch.equal(anew.submit(normed, "meta").result(), other.submit(normed, "cpu").result())


def test_where_numba_is_missing_torch_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_runtime, "unavailable", lambda: "numba is not installed")
    dispatch.select.cache_clear()
    try:
        assert dispatch.select(CPU).implementation == "torch"
        assert "numba" in dispatch.select(CPU).reason
        assert not dispatch.uses_cpu_kernels(torch.zeros(1, 4))
    finally:
        dispatch.select.cache_clear()


@pytest.mark.parametrize("writable", [True, False])
def test_compiled_kernels_are_kept_where_that_is_possible(tmp_path: Path, writable: bool) -> None:
    program = "import torch, plaudit_kernels as k; torch.set_grad_enabled(False); k.gated(torch.ones(2, 8), 'silu')"
    home = tmp_path if writable else Path("/proc/none")
    environment = {**os.environ, "XDG_CACHE_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert bool(list(tmp_path.rglob("*.nbi"))) == writable
