"""The Gluon candidate for attention's forward pass against ours and torch's best: it has run on no card yet.

It is measured only where it agrees with ours, and sharing changes none of its bits. A kernel that does not end within
a minute ends the process, with the rows of the cases before it written.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from gpu_attention import Batch, batches, leaves, torch_attention
from gpu_card import Bench, Case, Row, Skip, planned, random, ratios
from gpu_kernels import MODELS, Work, runs
from gpu_models import Sizes, sizes_of

from plaudit_kernels import packed_attention

MINUTE = 60.0
GROUPS = {"two heads a program": 2, "one head a program": 1}


def gluon(bench: Bench) -> None:
    for model in bench.models(*MODELS):
        for shape, batch in batches(bench):
            case = Case("gluon", model, shape, seconds=6)
            bench.run(case, lambda m=model, b=batch: _raced(bench, sizes_of(bench, m), b))


def _raced(bench: Bench, sizes: Sizes, batch: Batch) -> list[Row]:
    module, scale, tokens = _candidate(bench), sizes.width**-0.5, int(batch.segments[:, 1].sum())
    plan, theirs = planned(bench, batch.segments, tokens), leaves(bench, sizes, batch.sequences * batch.length)
    tensors = [tensor.detach() for tensor in leaves(bench, sizes, tokens)]
    ours = functools.partial(packed_attention, *tensors, plan, scale=scale)
    works: dict[str, Work] = {"ours": torch.no_grad()(ours)}
    known = torch_attention(bench, theirs, batch, scale)["forward"]
    works |= {label: work for label, work in known.items() if runs(label, work)}
    for label, group in GROUPS.items():
        work = functools.partial(module.forward, *tensors, plan, scale, group)
        if runs(label, functools.partial(_right, bench, module, sizes, work, ours, group)):
            works[label] = work
    taken = bench.race(works, budget=1.0)
    best = min(known.keys() & works, key=lambda label: float(np.median(taken[label])))
    return [row for label in GROUPS if label in works for row in _rows(label, taken, best, batch, sizes)]


def _rows(label: str, taken: dict[str, list[float]], best: str, batch: Batch, sizes: Sizes) -> list[Row]:
    over, target = ratios(taken[best], taken[label]), batch.targets[0]
    return [
        Row(f"{label}, speed over torch's best", over, "ratio", f"torch {best}", target=target),
        Row(f"{label}, speed over ours", ratios(taken["ours"], taken[label]), "ratio", "ours"),
        Row(f"{label}, rate", [batch.flops(sizes) / seconds / 1e12 for seconds in taken[label]], "TFLOP/s"),
    ]


def _candidate(bench: Bench) -> ModuleType:
    """Raises Skip where it cannot run."""
    if bench.device.type != "cuda" or torch.cuda.get_device_capability(bench.device) != (9, 0):
        raise Skip("the candidate is for sm_90")
    try:
        import gluon_attention
    except ImportError as error:
        raise Skip(f"no Gluon: {error}") from error
    return gluon_attention


def _right(bench: Bench, module: ModuleType, sizes: Sizes, work: Work, ours: Work, group: int) -> None:
    """Raises RuntimeError where the candidate differs from ours by more than the rounding of its output, or a row
    depends on whether its prompt is shared."""
    with _limited():
        (out, _), expected = work(), ours()  # type: ignore[misc]
        error = (out.double() - expected.double()).abs().max() / expected.double().abs().max()
        if not error < 2 * torch.finfo(out.dtype).eps:
            raise RuntimeError(f"off by {float(error):.1e} of the largest value")
        if changed := _changed(bench, module, sizes, group):
            raise RuntimeError(f"sharing changes {changed} numbers")


def _changed(bench: Bench, module: ModuleType, sizes: Sizes, group: int) -> int:
    """Numbers of responses that change where a prompt of 300 tokens is shared: responses of 200, 1 and 70."""
    tensors = [random(bench, 571, heads, sizes.width) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    shared = np.array([(0, 300, 0, 0), (300, 200, 0, 300), (500, 1, 0, 300), (501, 70, 0, 300)])
    together, _ = module.forward(*tensors, planned(bench, shared, 571), sizes.width**-0.5, group)
    changed = 0
    for start, length, *_ in shared[1:].tolist():
        rows = [*range(300), *range(start, start + length)]
        plan = planned(bench, np.array([(0, len(rows), 0, 0)]), len(rows))
        alone, _ = module.forward(*(tensor[rows] for tensor in tensors), plan, sizes.width**-0.5, group)
        changed += int((alone[300:] != together[start : start + length]).sum())
    return changed


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """The process ends with a traceback where this takes longer than a minute."""
    faulthandler.dump_traceback_later(MINUTE, exit=True)
    try:
        yield
        torch.cuda.synchronize()
    finally:
        faulthandler.cancel_dump_traceback_later()
