"""The Gluon candidate without a card: right in an emulator that knows its races, whatever lies in the batch, and
compiled so that softmax lies inside the products."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from plaudit_kernels.attention import reference_attention
from plaudit_kernels.attention_triton import LOG2_E, strides
from plaudit_kernels.blocks import plan_blocks

from .batches import Segments, grouped, heads
from .gluon_emulator import Deadlock, Descriptor, Race, run
from .sm90 import Kernel, costs
from .test_attention_triton import CHAIN, assert_close

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "gluon_attention.py"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def candidate() -> ModuleType:
    return loaded(SOURCE)


def emulated(
    module: ModuleType, tensors: list[torch.Tensor], segments: Segments, group: int, early: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-denominators of the kernel, NaN where it writes nothing."""
    query, key, value = tensors
    tokens, count, width = query.shape
    plan = plan_blocks(np.array(segments), tokens, causal=True)
    out, lse = torch.full_like(query, torch.nan), torch.full((count, tokens), torch.nan)
    shared = any(prefix for *_, prefix in segments)
    run(
        module._forward, (len(plan.tiles) * 2, count // group), early, query, key, value,
        *(Descriptor(tensor.flatten(1), (64, width)) for tensor in (key, value)), out, lse,
        plan.segments, plan.tiles, torch.tensor(width**-0.5 * LOG2_E),
        *strides(query), *strides(key), *strides(value), *strides(out), tokens,
        **module.constants(width, count // key.shape[1], group, shared),
    )  # fmt: skip
    return out, lse


CASES: dict[str, tuple[Segments, int, int, int, int]] = {
    "one token": (grouped([(0, [1])]), 2, 1, 64, 2),
    "tile edges": (grouped([(0, [n]) for n in (63, 64, 65, 127, 128, 129)]), 2, 2, 64, 1),
    "long": (grouped([(0, [700])]), 4, 1, 64, 2),
    "shared": (grouped([(70, [3, 61]), (0, [123])]), 4, 2, 128, 2),
    "shared, one head a program": (grouped([(200, [3, 130, 250])]), 3, 1, 128, 1),
    "prefix of whole blocks": (grouped([(128, [1, 5, 64]), (64, [70])]), 4, 1, 128, 2),
    "responses of one token": (grouped([(33, [1] * 20)]), 2, 1, 64, 2),
    "both in the last block": (grouped([(65, [3, 62, 63])]), 2, 1, 64, 2),
    "chain": (CHAIN, 2, 1, 64, 2),
    "many heads of keys": (grouped([(100, [40, 90])]), 8, 4, 64, 2),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_whenever_tiles_land(candidate: ModuleType, case: str, dtype: torch.dtype) -> None:
    segments, query_heads, kv_heads, width, group = CASES[case]
    tensors = [t.to(dtype) for t in heads(sum(s[1] for s in segments), query_heads, kv_heads, width)]
    truth, theirs = (
        reference_attention(*(t.to(kind) for t in tensors), segments, causal=True, scale=width**-0.5)
        for kind in (torch.float64, dtype)
    )
    late, early = (emulated(candidate, tensors, segments, group, early) for early in (False, True))
    assert_close([late[0]], [theirs], [truth])
    assert torch.equal(late[0], early[0]) and torch.equal(late[1], early[1])
    assert (late[1] - denominators(tensors, segments)).abs().max() < 1e-4


def denominators(tensors: list[torch.Tensor], segments: Segments) -> torch.Tensor:
    """(H, T): by definition, in fp64."""
    query, key, _ = (tensor.double() for tensor in tensors)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    found = torch.empty(query.shape[1], len(query), dtype=torch.float64)
    for start, length, prefix_start, prefix in segments:
        rows = torch.cat([torch.arange(prefix_start, prefix_start + prefix), torch.arange(start, start + length)])
        logits = torch.einsum("qhd,khd->hqk", query[start : start + length], key[rows]) * query.shape[2] ** -0.5
        logits += torch.full(logits.shape[1:], -torch.inf, dtype=logits.dtype).triu(prefix + 1)
        found[:, start : start + length] = logits.logsumexp(-1) * LOG2_E
    return found


@pytest.mark.parametrize("group", [1, 2])
def test_sharing_neighbours_and_order_change_no_bit(candidate: ModuleType, group: int) -> None:
    segments = grouped([(145, [3, 170]), (0, [64]), (64, [1])])
    tensors = [t.half() for t in heads(sum(s[1] for s in segments), 2, 1, 64)]
    together = emulated(candidate, tensors, segments, group)
    for start, length, prefix_start, prefix in segments:
        rows = torch.cat([torch.arange(prefix_start, prefix_start + prefix), torch.arange(start, start + length)])
        around = [torch.full((5, *t.shape[1:]), torch.nan).half() for t in tensors]
        alone = [torch.cat([nan, t[rows], nan]) for nan, t in zip(around, tensors, strict=True)]
        apart = emulated(candidate, alone, grouped([(0, [5]), (0, [len(rows)]), (0, [5])]), group)
        own, here = slice(start, start + length), slice(5 + prefix, 5 + prefix + length)
        assert torch.equal(together[0][own], apart[0][here])
        assert torch.equal(together[1][:, own], apart[1][:, here])


FENCE, BARRIER = "hopper.fence_async_shared()\n", "barrier()\n"
FAULTS = {
    "a tile of another stage": (
        "bars.index(slot), ring.index(slot)",
        "bars.index(slot), ring.index(STAGES - 1 - slot)",
    ),
    "the other phase": ("(block // STAGES) & 1", "(block // STAGES + 1) & 1"),
    "keys not waited for": ("        landed(keys, block + 2, block + 2 < count, K_STAGES)\n", ""),
    "values not waited for": ("        landed(values, block, True, V_STAGES)\n", ""),
    "keys over those that are read": ("k_next, v_next = block + K", "k_next, v_next = block + 1 + K"),
    "values over those that are read": ("block - 2 + V_STAGES\n", "block - 1 + V_STAGES\n"),
    "a slower warp": ("        barrier()  # every warp is done", "        # every warp is done"),
    "sums under way": ("warpgroup_mma_wait(1, deps=[mixed, share])", "warpgroup_mma_wait(2, deps=[mixed, share])"),
    "products under way": ("x = hopper.warpgroup_mma_wait(0,", "x = hopper.warpgroup_mma_wait(1,"),
    "nobody announces": ("        announce(keys, k_next, k_next < count, K_STAGES)\n", ""),
    "nobody brings": ("        bring(values, v_next, more,", "        (values, v_next, more,"),
    "announced twice": ("more = (block > 1) &", "more ="),
    "the last values of two stages": ("    if V_STAGES < 3:", "    if V_STAGES < 2:"),
    "barriers that nobody knows": (f"    {FENCE}    {BARRIER}    begin", "    begin"),
    "no fence after zeros": (f"0.0))\n    {FENCE}", "0.0))\n"),
    "no barrier after zeros": (f"0.0))\n    {FENCE}    {BARRIER}", f"0.0))\n    {FENCE}"),
    "no fence after a gathered block": (f"FLAT))\n            {FENCE}        b", "FLAT))\n        b"),
    "no barrier after a gathered block": (f"{FENCE}        {BARRIER}", FENCE),
}
"""What is replaced in the source, by what."""


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_sees(fault: str, tmp_path: Path) -> None:
    before, after = FAULTS[fault]
    text = SOURCE.read_text(encoding="utf-8")
    assert before in text
    path = tmp_path / "faulty.py"
    path.write_text(text.replace(before, after), encoding="utf-8")
    module, segments = loaded(path), grouped([(200, [3, 300]), (30, [40]), (0, [500])])
    tensors = [t.half() for t in heads(sum(s[1] for s in segments), 2, 1, 64)]
    with pytest.raises((Race, Deadlock)):
        for group in (2, 1):
            emulated(module, tensors, segments, group)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("keys[None, :] <= positions", "keys[None, :] < positions"),
        ("gl.where(at < prefix, prefix_start, start - prefix)", "start - prefix"),
        ("gl.where(keys < prefix, prefix_start, start - prefix)", "start - prefix"),
        ("gl.where(prefix % ROWS != 0, prefix // ROWS, -1)", "-1"),
        ("value.load(LAYOUT), 0.0", "value.load(LAYOUT), 1e-3 * value.load(LAYOUT)"),
        ("column = gl.program_id(1) * GROUP // FOLD * WIDTH", "column = gl.program_id(1) // FOLD * WIDTH"),
    ],
)
def test_wrong_rows_are_wrong_numbers(before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    text = SOURCE.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    module, segments = loaded(path), grouped([(100, [3, 200]), (0, [70])])
    tensors = [t.half() for t in heads(sum(s[1] for s in segments), 4, 2, 64)]
    tensors[2][:100] *= 3.0  # the first rows are behind nobody's end
    tensors[2][-70:] = torch.nan  # what follows the end of the response of 200 must not matter
    out, _ = emulated(module, tensors, segments, 2)
    truth = reference_attention(*(t.double() for t in tensors), segments, causal=True, scale=64**-0.5)
    assert not (out[:303].double() - truth[:303]).abs().max() < 1e-2


# -- as compiled ---------------------------------------------------------------------------------------------


def specialised(module: ModuleType, width: int, group: int, shared: bool, dtype: str = "bf16") -> Kernel:
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
    tiles = f"tensordesc<{dtype}[64, {width}],{layout}>"
    names = module._forward.arg_names
    constants: dict[str, Any] = module.constants(width, 2, group, shared)
    signature = {name: "i32" for name in names if name not in constants}
    signature |= dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict.fromkeys(("k_tiles", "v_tiles"), tiles)
    signature |= {"lse": "*fp32", "segments": "*i32", "tiles": "*i32", "inner": "fp32"}
    return Kernel("gluon_attention", "_forward", signature, constants, num_warps=4 * group, fusion=False)


def test_compiled_it_fits_and_softmax_lies_inside_the_products(
    candidate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE.parent}:{':'.join(filter(None, sys.path))}")
    chosen = [(128, 2, False), (128, 2, True), (64, 2, True), (128, 1, True)]
    for shape, cost in zip(chosen, costs([specialised(candidate, *shape) for shape in chosen]), strict=True):
        assert cost.fits() and cost.fusible == 0, f"{shape}: {cost}"
        # Before the loop, in it and after it: 32 weights a thread each, and what two rows fade by.
        assert not cost.serialised and cost.hidden_exponentials > 3 * 32, f"{shape}: {cost}"
        if shape[1] == 1:
            assert 2 * (cost.shared + 1024) <= 228 * 1024, f"two programs do not fit on a processor: {cost}"
