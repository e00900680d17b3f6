"""The whole forward: how much of the card's arithmetic it reaches, what sharing, exactness and fp8 cost or bring, how
it compares with a padded forward, and whether a score in exact mode knows its company."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from flops import flops_of
from gpu_card import Bench, Case, Row, ratios
from gpu_kernels import MODELS
from gpu_models import hh_like, model_of, module_of, padded_scores, shared, unique
from numpy.typing import NDArray
from regroupings import random_items, regroup
from torch import nn

from plaudit_kernels import watch_compilations
from plaudit_model import warm
from plaudit_model.encode import Encoded
from plaudit_model.oracle import agreement
from plaudit_model.packing import PackedBatch, group_items, pack
from plaudit_model.reward_model import RewardModel

BATCH_TOKENS = 16384
"""Tokens that are computed in one batch."""


def in_a_row_of(name: str) -> int:
    """Batches that are timed together: the host plans the next while the card computes one, as when serving. Of the
    largest model one takes a third of a second, beside which planning is nothing."""
    return 1 if "8B" in name else 3


SHARE = {"Qwen3-0.6B": (0.55, 0.45), "Llama-3.2-1B": (0.67, 0.60), "Llama-3.1-8B": (0.75, 0.70)}
"""Target and floor of the share of the matrix rate at 1,024 tokens."""

OVER_PADDED = {"Qwen3-0.6B": 4.0, "Llama-3.2-1B": None, "Llama-3.1-8B": 2.5}


class Engine:
    """A model with its weights once, in both modes, made when it is first needed."""

    def __init__(self, bench: Bench, name: str) -> None:
        self._bench, self._name = bench, name

    @cached_property
    def module(self) -> nn.Module:
        return module_of(self._bench, self._name, torch.bfloat16)

    @cached_property
    def padded(self) -> nn.Module:
        """For transformers' forward: the same module, unless its weights were laid out anew, as on a CPU."""
        on_card = self._bench.device.type == "cuda"
        return self.module if on_card else module_of(self._bench, self._name, torch.bfloat16)

    @cached_property
    def fast(self) -> RewardModel:
        return model_of(self._bench, self.module, "bfloat16", "fast")

    @cached_property
    def exact(self) -> RewardModel:
        return model_of(self._bench, self.module, "bfloat16", "exact")


def forward(bench: Bench) -> None:
    for name in bench.models(*MODELS):
        engine = Engine(bench, name)
        for length in (1024, 512, 2048)[: bench.small(3, 1)]:
            case = Case("forward", name, f"{length} tokens", seconds=20 if "8B" in name else 12)
            bench.run(case, functools.partial(_shares, bench, name, engine, length))
        bench.run(
            Case("forward", name, "HH-like lengths", seconds=20 if "8B" in name else 15),
            functools.partial(_over_padded, bench, name, engine),
        )
        if name == MODELS[0]:
            case = Case("forward", name, "ragged after warm-up", seconds=30)
            bench.run(case, functools.partial(_late_kernels, bench, engine))
        del engine
        gc.collect()


def _shares(bench: Bench, name: str, engine: Engine, length: int) -> list[Row]:
    tokens, budget, times = bench.small(length, 20), bench.small(BATCH_TOKENS, 160), in_a_row_of(name)
    batches = {
        "unique": packed(unique(tokens, budget // tokens)),
        "shared": packed(shared(tokens, max(1, budget // (4 * tokens)))),
    }
    modes = {"fast": engine.fast, "exact": engine.exact}
    works = {
        f"{mode} {kind}": in_a_row(model, batch, times)
        for mode, model in modes.items()
        for kind, batch in batches.items()
    }
    taken = bench.race_walls(works, rounds=_rounds(name))
    rows = []
    for key, seconds in taken.items():
        mode, kind = key.split()
        batch = batches[kind]
        logical = len(batch.indices) * tokens
        arithmetic = flops_of(engine.fast, batch) / bench.ceilings.matrix
        asked = SHARE[name] if (kind, mode, length) == ("unique", "fast", 1024) else (None, None)
        share = [times * arithmetic / s for s in seconds]
        label = f"{mode}, {kind}"
        rows += [
            Row(f"{label}: share of the matrix rate", share, "share", "matrix rate", target=asked[0], floor=asked[1]),
            Row(f"{label}: executed tokens", [times * batch.tokens / s for s in seconds], "tokens/s"),
            Row(f"{label}: logical tokens", [times * logical / s for s in seconds], "tokens/s"),
        ]
    logical = {kind: len(batch.indices) for kind, batch in batches.items()}
    for mode in modes:
        over = ratios(taken[f"{mode} unique"], taken[f"{mode} shared"])
        gain = [ratio * logical["shared"] / logical["unique"] for ratio in over]
        target = 3.2 if mode == "fast" else None
        rows.append(Row(f"{mode}: 16 a prompt, logical tokens", gain, "ratio", "unique", target=target))
    for kind in batches:
        over = ratios(taken[f"fast {kind}"], taken[f"exact {kind}"])
        rows.append(Row(f"{kind}: exact over fast", over, "ratio", "fast", target=0.75))
        rows.append(Row(f"{kind}: peak memory", [bench.peak_mib(works[f"fast {kind}"])], "MiB"))
    return rows


def packed(items: Sequence[Encoded]) -> PackedBatch:
    return pack(group_items(items, share=True))


def in_a_row(model: RewardModel, batch: PackedBatch, times: int = 1) -> Callable[[], None]:
    @torch.inference_mode()
    def work() -> None:
        for _ in range(times):
            model.forward(batch)

    return work


# -- against a padded forward --------------------------------------------------------------------------------


def _over_padded(bench: Bench, name: str, engine: Engine) -> list[Row]:
    """From token ids to scores on the host, both; the padded one with the size of batch that suits it best."""
    records = bench.small(32 if "8B" in name else 96, 4)
    pairs = [item for record in hh_like(records, longest=bench.small(1024, 40)) for item in record]
    alone = pairs[::2]
    in_order = sorted(pairs, key=lambda item: len(item.ids))
    works: dict[str, Callable[[], object]] = {
        "pairs": lambda: engine.fast.score_encoded(pairs, token_budget=BATCH_TOKENS),
        "alone": lambda: engine.fast.score_encoded(alone, token_budget=BATCH_TOKENS),
    }
    size = _best_size(bench, engine, pairs)
    for label, items in (("padded pairs", pairs), ("padded alone", alone), ("padded sorted", in_order)):
        works[label] = functools.partial(padded_scores, engine.padded, bench.device, items, size)
    taken = bench.race_walls(works, rounds=_rounds(name))
    ours = engine.fast.score_encoded(pairs, token_budget=BATCH_TOKENS)[:, 0]
    theirs = padded_scores(engine.padded, bench.device, pairs, 16).numpy()
    moved = float(np.abs(ours - theirs).max() / theirs.std())
    logical = sum(len(item.ids) for item in pairs)
    against = "padded transformers, SDPA, bf16"
    return [
        Row("pairs", ratios(taken["padded pairs"], taken["pairs"]), "ratio", against, target=OVER_PADDED[name]),
        Row("one response a prompt", ratios(taken["padded alone"], taken["alone"]), "ratio", against),
        Row("pairs, theirs sorted", ratios(taken["padded sorted"], taken["pairs"]), "ratio", f"{against}, by length"),
        Row("pairs, logical tokens", [logical / s for s in taken["pairs"]], "tokens/s"),
        Row("pairs, items", [len(pairs) / s for s in taken["pairs"]], "items/s"),
        Row("largest difference of scores over their spread", [moved], "ratio", against),
        Row("pairs, peak memory", [bench.peak_mib(works["pairs"])], "MiB"),
        Row("padded pairs, peak memory", [bench.peak_mib(works["padded pairs"])], "MiB", against),
    ]


def _best_size(bench: Bench, engine: Engine, items: list[Encoded]) -> int:
    """The padded batch that suits them best."""
    padded_scores(engine.padded, bench.device, items, 8)
    seconds = {n: bench.wall(lambda n=n: padded_scores(engine.padded, bench.device, items, n)) for n in (8, 32, 128)}  # type: ignore[misc]
    return min(seconds, key=seconds.__getitem__)


def _rounds(name: str) -> int:
    """The largest model takes a second a round."""
    return 3 if "8B" in name else 7


def _late_kernels(bench: Bench, engine: Engine) -> list[Row]:
    """Kernels that ragged traffic needs after the warm-up that a server does."""
    budget = bench.small(4096, 64)
    warm.warm_up(engine.exact, budget, print)
    seen = watch_compilations()
    for record in hh_like(bench.small(64, 2), 3, seed=1, longest=bench.small(1024, 30)):
        engine.exact.score_encoded(record, token_budget=budget)
    print(*seen, sep="\n")
    return [Row("kernels built after warm-up", [float(len(seen))], "count", target=0.0, at_most=True)]


# -- fp8 -----------------------------------------------------------------------------------------------------


def fp8(bench: Bench) -> None:
    name = "Llama-3.1-8B"
    bench.run(Case("fp8", name, "1024 tokens, unique", "fp8, int8", 30), lambda: _eight_bits(bench, name))


def _eight_bits(bench: Bench, name: str) -> list[Row]:
    sizes, models = {}, {}
    for dtype in ("bfloat16", "fp8", "int8"):
        before = _allocated(bench)
        models[dtype] = model_of(bench, module_of(bench, name, torch.bfloat16), dtype, "fast")
        gc.collect()
        sizes[dtype] = _allocated(bench) - before
    length = bench.small(1024, 20)
    batch = packed(unique(length, bench.small(BATCH_TOKENS, 160) // length))
    taken = bench.race_walls({dtype: in_a_row(model, batch) for dtype, model in models.items()}, rounds=_rounds(name))
    items = [item for record in hh_like(bench.small(128, 6), longest=bench.small(1024, 40)) for item in record]
    scores: dict[str, NDArray[np.float32]] = {
        dtype: model.score_encoded(items, token_budget=BATCH_TOKENS)[:, 0] for dtype, model in models.items()
    }
    against, rows = "bfloat16", [Row(f"weights, {dtype}", [mib], "MiB") for dtype, mib in sizes.items()]
    for dtype, target in (("fp8", 1.25), ("int8", None)):  # int8 is for memory: it multiplies in bf16
        change = agreement(scores[dtype], scores[against], dtype)
        moved = change.max_difference / change.std
        rows += [
            Row(f"{dtype} end to end", ratios(taken[against], taken[dtype]), "ratio", against, target=target),
            Row(f"{dtype}: largest change of a score over their spread", [moved], "ratio", against),
            Row(f"{dtype}: Kendall's tau of the scores", [change.kendall_tau], "tau", against),
        ]
    return rows


def _allocated(bench: Bench) -> float:
    return torch.cuda.memory_allocated() / 2**20 if bench.device.type == "cuda" else 0.0


# -- exactness -----------------------------------------------------------------------------------------------


REGROUPED = (
    ("Qwen3-0.6B", "bfloat16"), ("Llama-3.2-1B", "bfloat16"), ("BERT-base", "bfloat16"), ("Qwen3-0.6B", "fp8"),
    ("Qwen3-0.6B", "int8"), ("Qwen3-0.6B", "float32"),
)  # fmt: skip


def regroupings(bench: Bench) -> None:
    """Items scored in random company, small batches by replayed graphs; every score compared bit for bit with that of
    the item alone, computed without."""
    for name, dtype in REGROUPED[: bench.small(len(REGROUPED), 3)]:
        case = Case("regroupings", name, "10,000 regroupings", dtype, 60)
        bench.run(case, functools.partial(_regrouped, bench, name, dtype))


def _regrouped(bench: Bench, name: str, dtype: str) -> list[Row]:
    stored = torch.float32 if dtype == "float32" else torch.bfloat16

    def load() -> RewardModel:
        return model_of(bench, module_of(bench, name, stored), dtype, "exact")

    def replaying() -> RewardModel:
        model = load()
        model.record(4096, print)
        return model

    model, generator = load(), np.random.default_rng(0)
    # Prompts of several tiles, so that the copy engine's pipeline over a prefix is full.
    longest = {"prompt": bench.small(700, 120), "response": bench.small(260, 70)}
    items = random_items(model, generator, **longest)[: bench.small(1 << 20, 12)]
    alone = np.concatenate([model.score_encoded([item]) for item in items])
    done, changed = regroup(replaying, items, alone, bench.small(10_000, 20), generator)
    return [
        Row("changed scores", [float(changed)], "count", "the item alone", target=0.0, at_most=True),
        Row("regroupings", [float(done)], "count"),
        Row("spread of the scores", [float(alone.std())], "score"),
    ]
