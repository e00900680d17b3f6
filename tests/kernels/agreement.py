"""When a fused operation agrees with its torch reference: FlashAttention's rule, for outputs and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

Inputs = Sequence[torch.Tensor | None]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated holds NaN: a row that a kernel does not write shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    with (
        mock.patch.object(torch.Tensor, "new_empty", poison(new_empty)),
        mock.patch.object(torch, "empty_like", poison(empty_like)),
    ):
        yield


def agree(
    fused: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, dtype: torch.dtype, device: torch.device
) -> None:
    """Outputs and gradients by every input: the error of `fused` is at most twice that of torch in the same dtype,
    plus two roundings of the largest value. The truth is the reference in fp64."""
    with poisoned():
        ours = _run(fused, inputs, dtype, device)
    theirs, truths = (_run(reference, inputs, kind, torch.device("cpu")) for kind in (dtype, torch.float64))
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        assert our.shape == truth.shape
        if truth.numel():
            allowed = 2 * _error(their, truth) + 2 * torch.finfo(dtype).eps * max(1.0, float(truth.abs().max()))
            assert _error(our, truth) <= allowed


def _error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth).abs().max())


def _run(function: Callable[..., Any], inputs: Inputs, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    leaves = [None if tensor is None else _like(tensor, dtype, device).requires_grad_() for tensor in inputs]
    results = function(*leaves)
    outputs = [output for output in (results if isinstance(results, tuple) else (results,)) if output is not None]
    directions = [random(*output.shape, seed=7).to(device, dtype) for output in outputs]
    loss = torch.stack([(output * way).sum() for output, way in zip(outputs, directions, strict=True)]).sum()
    gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    return [tensor.detach().cpu() for tensor in (*outputs, *gradients)]


def _like(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The same values and strides in another dtype: views of wider tensors stay views."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
    return copy.copy_(tensor)
