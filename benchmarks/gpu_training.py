"""Training steps: packed with shared prompts and our kernels, against padded transformers as TRL trains them.

Both take the same records through the same weights: fp32 with AdamW, products in bf16 by autocast. TRL's reward
trainer knows pairs: chosen and rejected side by side, padded to the longest; a ranking of K responses is its
K (K - 1) / 2 pairs. Its micro-batch is the fastest of several that fit.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from gpu_card import Bench, Case, Row, ratios
from gpu_models import hh_like, module_of, padded_batches, unfrozen
from torch.nn.functional import logsigmoid

from plaudit_model.encode import Encoded
from plaudit_model.packing import PackedBatch
from plaudit_model.records import Comparison, Origin, Record
from plaudit_model.reward_model import RewardModel
from plaudit_training import optim
from plaudit_training.batches import Example, micro_batches
from plaudit_training.config import LossConfig, OptimConfig
from plaudit_training.loss import preference_loss

Step = Callable[[], None]
Pair = tuple[Encoded, Encoded]

TOKEN_BUDGET = 16384
CANDIDATES = (8, 16, 32)
"""Pairs of a padded micro-batch."""

_WAYS: dict[str, dict[str, bool]] = {"": {}, ", checkpointed": {"gradient_checkpointing": True}}
"""How our step is taken."""


def training(bench: Bench) -> None:
    for name in bench.models("Qwen3-0.6B", "Qwen3-1.7B"):
        for responses, target in ((2, 2.5), (4, 4.0)):
            what = "pairs" if responses == 2 else f"rankings of {responses}"
            case = Case("training", name, f"HH-like lengths, {what}", "bfloat16 autocast", 15)
            bench.run(case, functools.partial(_steps, bench, name, responses, target))
            gc.collect()


def _steps(bench: Bench, name: str, responses: int, target: float) -> list[Row]:
    module: Any = module_of(bench, name, torch.float32)
    model = unfrozen(bench, module, "float32", "exact")
    model.train_mode()
    optimizer = optim.build(module, OptimConfig(learning_rate=1e-7))
    records = hh_like(bench.small(96 // responses**2 * 2, 3), responses, longest=bench.small(1024, 40))
    examples = [_example(number, items) for number, items in enumerate(records)]
    compared = [(a, b) for items in records for a, b in itertools.combinations(items, 2)]
    works: dict[str, Step] = {}
    for way, options in _WAYS.items():
        works[f"ours{way}"] = functools.partial(_packed_step, bench, model, optimizer, examples, options)
    for way, checkpointed in (("", False), (", checkpointed", True)):
        works[f"padded{way}"] = _fastest(bench, module, optimizer, compared, checkpointed)
    taken = bench.race_walls(works, rounds=4)
    against = "padded transformers, as TRL trains"
    rows = [Row("speed", ratios(taken["padded"], taken["ours"]), "ratio", against, target=target)]
    for way in _WAYS:
        over = ratios(taken["padded, checkpointed"], taken[f"ours{way}"])
        rows.append(Row(f"speed{way}", over, "ratio", f"{against}, checkpointed"))
    rows += [Row(f"comparisons, {who}", [len(compared) / s for s in seconds], "1/s") for who, seconds in taken.items()]
    peaks = {who: bench.peak_mib(step) for who, step in works.items()}
    rows += [Row(f"peak memory, {who}", [peak], "MiB") for who, peak in peaks.items()]
    if bench.device.type == "cuda":
        over = peaks["ours"] / peaks["padded"]
        rows.append(Row("peak memory over theirs", [over], "ratio", against, target=1.0, at_most=True))
    return rows


def _example(number: int, items: Sequence[Encoded]) -> Example:
    """A record whose responses are ranked as they come, every pair of them compared."""
    comparisons = tuple(Comparison(a, b, "first") for a, b in itertools.combinations(range(len(items)), 2))
    record = Record(str(number), (), ("",) * len(items), comparisons, Origin("made here", number + 1))
    return Example(record, tuple(items))


def _packed_step(
    bench: Bench,
    model: RewardModel,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    options: dict[str, bool],
) -> None:
    """A step of the trainer: the same batches, loss, clipping and optimiser; `options` for `train_mode`."""
    model.train_mode(**options)
    weight = sum(example.pairs for example in examples)
    budget = bench.small(TOKEN_BUDGET, 200)
    for micro in micro_batches(examples, LossConfig(), token_budget=budget, share=model.shares_prompt):
        scores_N = _scores(bench, model, micro.batch)
        torch.autograd.backward(preference_loss(scores_N, micro.pairs.to(bench.device)) / weight)
    _apply(model.module, optimizer)


def _scores(bench: Bench, model: RewardModel, batch: PackedBatch) -> torch.Tensor:
    with torch.autocast(bench.device.type, dtype=torch.bfloat16):
        scores_NA = model.forward(batch)
    return scores_NA[:, 0].index_select(0, torch.from_numpy(np.argsort(batch.indices)).to(bench.device))


def _padded_step(
    bench: Bench, module: Any, optimizer: torch.optim.Optimizer, pairs: list[Pair], size: int, checkpointed: bool
) -> None:
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        both = [chosen for chosen, _ in part] + [rejected for _, rejected in part]
        ((ids, mask),) = padded_batches(both, len(both))
        given = {"input_ids": ids.to(bench.device), "attention_mask": mask.to(bench.device)}
        with _checkpointing(module, checkpointed):
            with torch.autocast(bench.device.type, dtype=torch.bfloat16):
                scores = module(**given, use_cache=False).logits[:, 0].float()
            chosen, rejected = scores.chunk(2)
            torch.autograd.backward(-logsigmoid(chosen - rejected).sum() / len(pairs))
    _apply(module, optimizer)


@contextlib.contextmanager
def _checkpointing(module: Any, wanted: bool) -> Iterator[None]:
    """transformers' own, layer by layer."""
    if wanted:
        module.gradient_checkpointing_enable()
    try:
        yield
    finally:
        if wanted:
            module.gradient_checkpointing_disable()


def _apply(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optim.clip(module, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _fastest(
    bench: Bench, module: Any, optimizer: torch.optim.Optimizer, pairs: list[Pair], checkpointed: bool
) -> Step:
    """The padded step with the micro-batch that suits it best."""
    seconds: dict[Step, float] = {}
    for size in (2,) if bench.dry else CANDIDATES:
        step = functools.partial(_padded_step, bench, module, optimizer, pairs, size, checkpointed)
        try:
            bench.wall(step)
            seconds[step] = bench.wall(step)
        except torch.OutOfMemoryError:
            print(f"{size} padded pairs do not fit")
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            break
    return min(seconds, key=seconds.__getitem__)
