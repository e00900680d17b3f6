"""Records -> encoded groups -> packed micro-batches on a token budget.

Which records an optimiser step holds, and in which order, is a function of (seed, epoch, step) and of nothing
else: a resumed run asks for step 1,000 and gets it, without reading the 999 before. How a step is cut into
micro-batches depends on the token budget only, and changes neither the loss nor its normalisation.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from plaudit_model.encode import Encoded, Encoder
from plaudit_model.errors import ItemError
from plaudit_model.packing import PackedBatch, group_items, pack
from plaudit_model.records import Comparison, Record

from .config import LossConfig
from .loss import Pairs

FEWEST_STEPS, FEWEST_PAIRS, MOST_PAIRS = 50, 8, 128


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A record and the tokens of its responses, in their order."""

    record: Record
    items: tuple[Encoded, ...]

    @property
    def pairs(self) -> int:
        return len(self.record.comparisons)

    @property
    def shared_tokens(self) -> int:
        """Rows it takes when the prompt is there once, a bound: truncation can make the prompts differ."""
        prompt = max(item.prompt_tokens for item in self.items)
        return prompt + sum(len(item.ids) - item.prompt_tokens for item in self.items)

    @property
    def tokens(self) -> int:
        """Rows it takes without sharing."""
        return sum(len(item.ids) for item in self.items)


@dataclass(frozen=True, slots=True)
class Encoding:
    """What encoding did to the records: every one is in `examples` or in `unusable`, with the reason.
    `truncated` counts responses whose prompt lost its beginning."""

    examples: tuple[Example, ...]
    unusable: tuple[tuple[Record, str], ...]
    truncated: int

    def reasons(self) -> dict[str, int]:
        """How many records are unusable, by the code of the reason."""
        return dict(Counter(reason.split(":")[0] for _, reason in self.unusable))

    def complaint(self) -> str:
        """One line about the unusable records, the first one of each reason with its place; empty without any."""
        first = {reason.split(":")[0]: (record.origin, reason) for record, reason in reversed(self.unusable)}
        return "; ".join(
            f"{count:,} unusable, {first[code][1]} ({first[code][0].file}:{first[code][0].line})"
            for code, count in self.reasons().items()
        )


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One forward and backward: a packed batch and the comparisons among its N responses, by row of the
    scores in the caller's order (`batch.indices`)."""

    batch: PackedBatch
    pairs: Pairs
    responses: int


def encode_records(records: Sequence[Record], encoder: Encoder) -> Encoding:
    """Encode every response after its prompt. A prompt that is too long loses its beginning; a record with a
    response that cannot be encoded, or without comparisons, is unusable."""
    examples: list[Example] = []
    unusable: list[tuple[Record, str]] = []
    for record in records:
        try:
            items = tuple(encoder.encode(record.prompt, text, "truncate_prompt") for text in record.responses)
        except ItemError as error:
            unusable.append((record, f"{error.code}: {error.message}"))
            continue
        if record.comparisons:
            examples.append(Example(record, items))
        else:
            unusable.append((record, "no_comparison: nothing to learn from"))
    truncated = sum(item.truncated is not None for example in examples for item in example.items)
    return Encoding(tuple(examples), tuple(unusable), truncated)


def fingerprint(records: Sequence[Record]) -> str:
    """sha256 of what the records say, in order; where they were read from does not count."""
    digest = hashlib.sha256()
    for r in records:
        prompt = [(m.role, m.content) for m in r.prompt]
        comparisons = [(c.first, c.second, c.outcome, c.share(), c.margin) for c in r.comparisons]
        digest.update(json.dumps([prompt, r.responses, comparisons]).encode() + b"\n")
    return digest.hexdigest()


def default_batch_pairs(pairs: int, epochs: int) -> int:
    """Comparisons of an optimiser step: 128, halved while the run would have fewer than 50 steps, not below 8."""
    size = MOST_PAIRS
    while size > FEWEST_PAIRS and pairs * epochs < FEWEST_STEPS * size:
        size //= 2
    return size


def steps_per_epoch(examples: Sequence[Example], batch_pairs: int) -> int:
    """Optimiser steps in an epoch, the same in each: as many as give about `batch_pairs` comparisons a step."""
    pairs = sum(example.pairs for example in examples)
    return max(1, min(len(examples), round(pairs / batch_pairs)))


def step_members(records: int, steps: int, seed: int, step: int) -> NDArray[np.int64]:
    """Which of the records global step `step` holds, in order, from (seed, epoch, step) alone.

    Each epoch is a permutation of its own, cut into `steps` parts of equal size, give or take one.
    """
    epoch, part = divmod(step, steps)
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(records)
    return order[part * records // steps : (part + 1) * records // steps]


def micro_batches(
    examples: Sequence[Example], config: LossConfig, *, token_budget: int, share: bool
) -> Iterator[MicroBatch]:
    """The examples of one step, packed in order. A record is never cut: its comparisons need all its scores.
    One that alone exceeds the budget is a micro-batch of its own."""
    for part in _by_budget(examples, token_budget, share):
        items = [item for example in part for item in example.items]
        yield MicroBatch(pack(group_items(items, share=share)), pairs_of(part, config), len(items))


def pairs_of(examples: Sequence[Example], config: LossConfig) -> Pairs:
    """The comparisons of the examples, by row among all their responses, the preferred one as chosen."""
    chosen, rejected, share, margin, weight = [], [], [], [], []
    row = 0
    for example in examples:
        for comparison in example.record.comparisons:
            first, second, votes = oriented(comparison)
            chosen.append(row + first)
            rejected.append(row + second)
            share.append(votes if config.labels == "votes" else hard(comparison))
            margin.append(0.0 if comparison.outcome == "tie" else comparison.margin or 0.0)
            weight.append(1.0 if config.weight == "comparison" else 1.0 / example.pairs)
        row += len(example.items)
    return Pairs(
        torch.tensor(chosen), torch.tensor(rejected), torch.tensor(share), torch.tensor(margin), torch.tensor(weight)
    )


def oriented(comparison: Comparison) -> tuple[int, int, float]:
    """(chosen, rejected, share of the votes for the chosen one); a tie stays in its order."""
    if comparison.outcome == "second":
        return comparison.second, comparison.first, 1 - comparison.share()
    return comparison.first, comparison.second, comparison.share()


def hard(comparison: Comparison) -> float:
    """The label without votes: 1 for a winner, 0.5 for a tie."""
    return 0.5 if comparison.outcome == "tie" else 1.0


def total_weight(examples: Sequence[Example], config: LossConfig) -> float:
    """What the summed loss of a step is divided by: its number of comparisons, or of records."""
    return float(len(examples) if config.weight == "record" else sum(example.pairs for example in examples))


def _by_budget(examples: Sequence[Example], token_budget: int, share: bool) -> Iterator[list[Example]]:
    part: list[Example] = []
    room = token_budget
    for example in examples:
        cost = example.shared_tokens if share else example.tokens
        if part and cost > room:
            yield part
            part, room = [], token_budget
        part.append(example)
        room -= cost
    if part:
        yield part
