"""Batches in the fixed layouts of CUDA graphs, on the fused kernels in Triton's interpreter. What stands in for a graph
computes again from the layout that was recorded, so every number of the host is the recorded one: as on a GPU, only the
buffer changes between two replays. That CUDA records what it is shown is not seen here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from plaudit_kernels import BlockPlan, plan_blocks
from plaudit_model import graphs
from plaudit_model.encode import Encoded
from plaudit_model.graphs import Graphs, fixed
from plaudit_model.packed import padded
from plaudit_model.packing import PackedBatch, group_items, pack
from plaudit_model.reward_model import RewardModel

CPU = torch.device("cpu")
ModelDir = Callable[[str], Path]


@pytest.fixture(params=["qwen3", pytest.param("bert", marks=pytest.mark.soak)])
def model(request: pytest.FixtureRequest, reward_model_dir: ModelDir, fused: Callable[[], None]) -> RewardModel:
    """Frozen, on the fused kernels."""
    model = RewardModel.load(reward_model_dir(request.param))
    fused()
    model.freeze()
    return model


def batch(seed: int, *groups: tuple[int, int, int], share: bool = True) -> PackedBatch:
    """Groups of (tokens of the prompt, responses, tokens of each)."""
    random = np.random.default_rng(seed)
    items = []
    for prompt, count, tokens in groups:
        head = random.integers(5, 600, prompt, dtype=np.int32)
        tails = (random.integers(5, 600, tokens, dtype=np.int32) for _ in range(count))
        items += [Encoded(np.concatenate([head, tail]), prompt) for tail in tails]
    return pack(group_items(items, share=share))


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """A row that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("rowwise_products", "uninitialised_memory_is_nan")
def test_a_replay_gives_the_bits_of_the_eager_forward(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SIZES", (64, 128))
    recorded: list[int] = []
    told: list[str] = []

    def record(compute: graphs.Replay) -> graphs.Replay:
        recorded.append(len(compute()))
        return compute

    replayed = Graphs(model.trunk, CPU, record)  # type: ignore[arg-type]
    replayed.record(100, told.append)
    assert recorded == [32, 32] and told == ["recorded for 64, 128 tokens"]
    share = model.shares_prompt
    batches = [batch(1, (20, 4, 9)), batch(4, (33, 2, 8), (0, 3, 25))]
    batches = batches if share else [batch(1, (20, 2, 9), share=False), batch(2, (0, 1, 100)), batch(3, (0, 5, 7))]
    with torch.inference_mode():
        for one in batches:
            answer = replayed(one)
            assert answer is not None and torch.isfinite(answer).all()
            assert torch.equal(answer, model.trunk(one))


def test_what_no_size_holds_is_left_to_the_eager_forward(model: RewardModel) -> None:
    replayed = Graphs(model.trunk, CPU, lambda compute: compute)  # type: ignore[arg-type]
    assert replayed(batch(6, (0, 1, 5))) is None, "nothing is recorded"
    replayed._recorded[64] = torch.zeros(0), lambda: torch.zeros(0)
    assert replayed(batch(7, (0, 1, 65))) is None, "too many tokens"
    assert replayed(batch(8, (0, 33, 1))) is None, "too many sequences"


def test_every_layout_of_a_size_has_the_same_shapes_and_numbers(model: RewardModel) -> None:
    """Whatever a launch is told from the host must not differ between batches."""
    several = [batch(9, (0, 1, 1)), batch(10, (100, 28, 1)), batch(11, (0, 32, 4)), batch(12, (0, 1, 128))]
    if not model.shares_prompt:
        several = [one for one in several if not one.segments[:, 3].any()]
    layouts = [fixed(model.trunk, one, 128) for one in several]  # type: ignore[arg-type]
    seen = set()
    for layout in layouts:
        assert layout is not None
        plans = [(key, plan) for key, plan in layout.plans.items() if isinstance(plan, BlockPlan)]
        numbers = [(key, plan.tokens, plan.causal, plan.window, plan.whole) for key, plan in plans]
        shapes = [table.shape for table in layout._tables]
        seen.add((layout.distinct, layout.causal, str(numbers), str(shapes), len(layout.joined(pinned=False))))
    assert len(seen) == 1


def test_one_buffer_holds_the_whole_layout(model: RewardModel) -> None:
    layout = fixed(model.trunk, batch(13, (0, 3, 9)), 64)  # type: ignore[arg-type]
    assert layout is not None
    buffer = layout.joined(pinned=False)
    back = layout.over(buffer)
    assert buffer.dtype == torch.int32 and len(buffer) == sum(table.numel() for table in layout._tables)
    for before, after in zip(layout._tables, back._tables, strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)


@pytest.mark.parametrize("extra", [0, 1, 31, 128, 129, 1000])
def test_added_rows_are_segments_of_their_own(extra: int) -> None:
    one = batch(14, (40, 3, 20))
    more = padded(one, one.tokens + extra)
    plan = plan_blocks(more.segments, more.tokens, causal=True)  # raises where a row has no segment
    assert len(more.input_ids) == len(more.position_ids) == len(more.type_ids) == plan.tokens == one.tokens + extra
    assert np.array_equal(more.segments[: len(one.segments)], one.segments)
    added = more.segments[len(one.segments) :]
    assert not added[:, 2:].any() and (added[:, 1] <= 128).all()
    assert np.array_equal(more.pool_last, one.pool_last)


def test_added_tiles_lie_behind_every_segment() -> None:
    one = batch(15, (200, 3, 60))
    plan = plan_blocks(one.segments, one.tokens, causal=True)
    sized = plan.sized(40, 50)
    assert sized.segments.shape == (40, 4) and sized.tiles.shape == (50, 2)
    assert torch.equal(sized.tiles[: len(plan.tiles)], plan.tiles)
    numbers, firsts = sized.tiles[len(plan.tiles) :].T
    ends = sized.segments[numbers.long()][:, [1, 3]].sum(1)
    assert (firsts * 128 >= ends).all()
