"""Attention against torch's best on the same logical batch, forward and backward."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from gpu_card import Bench, Case, Row, planned, random, ratios
from gpu_kernels import MODELS, Work, gradient, inference, runs
from gpu_models import RESPONSES, Sizes, sizes_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from plaudit_kernels import packed_attention

Operation = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]
"""What computes an output, and what it has gradients by."""


@dataclass(frozen=True)
class Batch:
    """Segments of a packed batch; the `sequences` of `length` tokens that it stands for; what is asked of the speed
    over torch's best, forward and backward."""

    segments: np.ndarray
    sequences: int
    length: int
    targets: tuple[float, float]

    def flops(self, sizes: Sizes) -> float:
        """Of the products that each query needs with the keys that it sees."""
        lengths, prefixes = self.segments[:, 1], self.segments[:, 3]
        return 4 * float((lengths * (prefixes + (lengths + 1) / 2)).sum()) * sizes.heads * sizes.width


def attention(bench: Bench) -> None:
    """Ours over torch's best on the same logical batch: unshared, and with RESPONSES to a prompt."""
    for model in bench.models(*MODELS):
        for shape, batch in batches(bench):
            case = Case("attention", model, shape, seconds=4)
            bench.run(case, lambda m=model, b=batch: _over_torch(bench, sizes_of(bench, m), b))


def batches(bench: Bench) -> Iterator[tuple[str, Batch]]:
    for length in (1024, 512, 2048)[: bench.small(3, 1)]:
        yield f"{length} tokens, unique", _unique(bench, bench.small(length, 40))
        yield f"{length} tokens, {RESPONSES} a prompt", _shared(bench, bench.small(length, 40))


def _unique(bench: Bench, length: int) -> Batch:
    count = bench.small(16384, 80) // length
    return Batch(np.array([(row * length, length, 0, 0) for row in range(count)]), count, length, (0.9, 0.75))


def _shared(bench: Bench, length: int) -> Batch:
    prompt, responses = length * 4 // 5, RESPONSES if not bench.dry else 2
    own, segments, row = length - prompt, [], 0
    for _ in range(max(1, bench.small(32768, 40) // (prompt + responses * own))):
        segments.append((row, prompt, 0, 0))
        segments += [(row + prompt + i * own, own, row, prompt) for i in range(responses)]
        row += prompt + responses * own
    return Batch(np.array(segments), sum(prefix > 0 for *_, prefix in segments), length, (2.0, 1.6))


def _over_torch(bench: Bench, sizes: Sizes, batch: Batch) -> list[Row]:
    """Forward and backward of ours over each candidate of torch; the fastest by its median is what counts."""
    tokens = int(batch.segments[:, 1].sum())
    plan = planned(bench, batch.segments, tokens)
    ours = leaves(bench, sizes, tokens)
    scale = sizes.width**-0.5
    passes = _passes(bench, {"ours": (lambda: packed_attention(*ours, plan, scale=scale), ours)})
    theirs = leaves(bench, sizes, batch.sequences * batch.length)
    candidates = torch_attention(bench, theirs, batch, scale)
    rows = []
    for (name, mine), target in zip(passes.items(), batch.targets, strict=True):
        works = {label: work for label, work in candidates[name].items() if runs(label, work)}
        taken = bench.race({**mine, **works}, budget=1.0)
        best = min(works, key=lambda label: float(np.median(taken[label])))
        over = ratios(taken[best], taken["ours"])
        rows.append(Row(f"{name}, speed over torch's best", over, "ratio", f"torch {best}", target=target))
        if name == "forward":
            rates = [batch.flops(sizes) / seconds / 1e12 for seconds in taken["ours"]]
            rows.append(Row("forward, rate", rates, "TFLOP/s"))
    return rows


def leaves(bench: Bench, sizes: Sizes, tokens: int) -> list[torch.Tensor]:
    counts = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    return [random(bench, tokens, heads, sizes.width).requires_grad_() for heads in counts]


def _passes(bench: Bench, operations: Mapping[str, Operation]) -> dict[str, dict[str, Work]]:
    """The forward pass without gradients, and the backward pass alone, of each."""
    found: dict[str, dict[str, Work]] = {"forward": {}, "backward": {}}
    for name, (work, leaves) in operations.items():
        found["forward"][name] = inference(work)
        found["backward"][name] = _backward(bench, work, leaves)
    return found


def _backward(bench: Bench, work: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Work:
    """The graph is made at the first call: a candidate that cannot run fails there."""
    kept: list[Work] = []

    def run() -> object:
        if not kept:
            kept.append(gradient(bench, (work(),), leaves))
        return kept[0]()

    return run


def torch_attention(
    bench: Bench, tensors: list[torch.Tensor], batch: Batch, scale: float
) -> dict[str, dict[str, Work]]:
    """SDPA with each backend and variable-length attention, on sequences of one length."""
    shape = (batch.sequences, batch.length)
    q, k, v = (tensor.view(*shape, *tensor.shape[1:]).transpose(1, 2) for tensor in tensors)

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if bench.device.type == "cpu":
        backends = {"math": SDPBackend.MATH}
    operations: dict[str, Operation] = {
        f"sdpa {name}": (functools.partial(sdpa, backend), tensors) for name, backend in backends.items()
    }
    if varlen := _varlen(tensors, *shape, scale):
        operations["varlen_attn"] = (varlen, tensors)
    return _passes(bench, operations)


def _varlen(leaves: list[torch.Tensor], sequences: int, length: int, scale: float) -> Callable[[], torch.Tensor] | None:
    """torch's variable-length attention, whose arguments have changed between versions."""
    if not leaves[0].is_cuda or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    ends = torch.arange(0, sequences * length + 1, length, device=leaves[0].device, dtype=torch.int32)
    wanted = {"scale": scale, "enable_gqa": True, "window_size": (-1, 0), "is_causal": True}
    options = {name: value for name, value in wanted.items() if name in known}
    if "window_size" in options:
        options.pop("is_causal", None)
    return lambda: varlen_attn(*leaves, ends, ends, length, length, **options)
