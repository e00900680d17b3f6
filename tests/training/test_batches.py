"""The order of the data, the cutting into micro-batches, and the packed loss against plain transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plaudit_model.records import Comparison, Message, Origin, Record, Votes
from plaudit_model.reward_model import RewardModel
from plaudit_training.batches import (
    Example,
    default_batch_pairs,
    encode_records,
    fingerprint,
    micro_batches,
    oriented,
    pairs_of,
    step_members,
    steps_per_epoch,
    total_weight,
)
from plaudit_training.config import LossConfig
from plaudit_training.loss import preference_loss
from plaudit_training.train import forward

Toy = Callable[[int, int], list[Record]]
WriteBase = Callable[[str], Path]
FIRST = Comparison(0, 1, "first")


def record(*comparisons: Comparison, responses: Sequence[str] = ("one", "two"), prompt: str = "say") -> Record:
    return Record("r", (Message("user", prompt),), tuple(responses), comparisons, Origin("file", 1))


@pytest.fixture(scope="module")
def model(write_base: WriteBase) -> RewardModel:
    return RewardModel.from_base(write_base("qwen3"), seed=0, device="cpu")


@pytest.fixture(scope="module")
def examples(model: RewardModel, toy: Toy) -> tuple[Example, ...]:
    return encode_records(toy(23, 0), model.encoder).examples


# -- order ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_an_epoch_holds_every_record_once(records: int, steps: int, seed: int, epoch: int) -> None:
    steps = min(steps, records)
    parts = [step_members(records, steps, seed, epoch * steps + part) for part in range(steps)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(records))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_order_is_a_function_of_seed_epoch_and_step() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [int(i) for part in range(4) for i in step_members(40, 4, seed, number * 4 + part)]

    assert epoch(7, 2) == epoch(7, 2)
    assert len({tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1, 2)}) == 6


def test_asking_for_a_step_needs_no_other_step() -> None:
    before = step_members(1000, 10, 3, 999).tolist()
    np.random.seed(0)
    assert step_members(1000, 10, 3, 999).tolist() == before


@pytest.mark.parametrize(
    ("pairs", "epochs", "size"),
    [(100_000, 1, 128), (6_400, 1, 128), (6_399, 1, 64), (500, 1, 8), (10, 1, 8), (500, 4, 32)],
)
def test_a_small_set_gets_smaller_steps(pairs: int, epochs: int, size: int) -> None:
    assert default_batch_pairs(pairs, epochs) == size


def test_steps_of_an_epoch_hold_about_that_many_comparisons(examples: Sequence[Example]) -> None:
    pairs = sum(example.pairs for example in examples)
    assert steps_per_epoch(examples, 8) == round(pairs / 8)
    assert steps_per_epoch(examples, 10**6) == 1
    assert steps_per_epoch(examples, 1) == len(examples), "a record is never cut"


# -- encoding ------------------------------------------------------------------------------------------------


def test_every_record_is_an_example_or_unusable_with_a_reason(write_base: WriteBase) -> None:
    encoder = RewardModel.from_base(write_base("qwen3"), seed=0, max_length=64, device="cpu").encoder
    records = [
        record(FIRST), record(), record(FIRST, responses=("a", "b" * 100)), record(FIRST, responses=("a", "\ud800")),
        record(FIRST, prompt="a long prompt. " * 30),
    ]  # fmt: skip
    encoding = encode_records(records, encoder)
    assert [example.record for example in encoding.examples] == [records[0], records[4]]
    assert [(r, why.split(":")[0]) for r, why in encoding.unusable] == [
        (records[1], "no_comparison"), (records[2], "too_long"), (records[3], "invalid_unicode"),
    ]  # fmt: skip
    assert encoding.truncated == 2, "both responses of the record with the long prompt"


def test_the_fingerprint_is_of_what_is_said_not_of_where() -> None:
    one = record(FIRST)
    moved = dataclasses.replace(one, origin=Origin("elsewhere", 9), id="other")
    assert fingerprint([one]) == fingerprint([moved])
    others = [record(Comparison(0, 1, "second")), record(FIRST, prompt="sag"), record(FIRST, responses=("one", "too"))]
    assert len({fingerprint([r]) for r in (one, *others)}) == 4
    assert fingerprint([one, others[0]]) != fingerprint([others[0], one])


# -- comparisons ---------------------------------------------------------------------------------------------


def test_the_preferred_response_is_the_chosen_one() -> None:
    votes = Votes(first=1, second=3, tie=1)
    assert oriented(FIRST) == (0, 1, 1.0)
    assert oriented(Comparison(0, 1, "second")) == (1, 0, 1.0)
    assert oriented(Comparison(1, 0, "tie")) == (1, 0, 0.5)
    assert oriented(Comparison(0, 1, "second", votes=votes))[2] == pytest.approx(0.7)


def test_labels_weights_and_margins_become_rows_of_all_responses(model: RewardModel) -> None:
    voted = Comparison(0, 1, "first", votes=Votes(3, 1), margin=0.5)
    records = [record(voted), record(FIRST, Comparison(2, 1, "second"), responses=("a", "b", "c"))]
    found = encode_records(records, model.encoder).examples
    pairs = pairs_of(found, LossConfig())
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([0, 2, 3], [1, 3, 4])
    assert pairs.share.tolist() == [1, 1, 1]
    assert pairs.margin.tolist() == [0.5, 0, 0]
    assert total_weight(found, LossConfig()) == float(pairs.weight.sum()) == 3
    soft = pairs_of(found, LossConfig(labels="votes", weight="record"))
    assert soft.share.tolist() == [0.75, 1, 1]
    assert soft.weight.tolist() == [1, 0.5, 0.5]
    assert total_weight(found, LossConfig(weight="record")) == 2


def test_a_tie_has_no_margin_for_nothing_tells_which_response_it_would_favour(model: RewardModel) -> None:
    ties = [record(Comparison(i, 1 - i, "tie", margin=2.0)) for i in (0, 1)]
    pairs = pairs_of(encode_records(ties, model.encoder).examples, LossConfig())
    assert pairs.margin.tolist() == [0, 0]


# -- packing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 150, 700, 10**6])
def test_micro_batches_hold_every_record_whole_within_the_budget(
    examples: Sequence[Example], budget: int, share: bool
) -> None:
    parts = list(micro_batches(examples, LossConfig(), token_budget=budget, share=share))
    assert sum(part.responses for part in parts) == sum(len(example.items) for example in examples)
    assert sum(len(part.pairs.share) for part in parts) == sum(example.pairs for example in examples)
    assert all(part.batch.tokens <= budget or part.responses <= 4 for part in parts), "over it only when alone"
    assert len(parts) == (len(examples) if budget == 1 else 1 if budget == 10**6 else len(parts))


def gradients(
    model: RewardModel, examples: Sequence[Example], budget: int, share: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    loss = LossConfig(center_rewards_coefficient=0.01)
    model.train_mode()
    model.module.zero_grad()
    total = 0.0
    for micro in micro_batches(examples, loss, token_budget=budget, share=share):
        scores = forward(model, micro.batch, "float32")
        part = preference_loss(scores, micro.pairs, center_rewards_coefficient=0.01) / total_weight(examples, loss)
        torch.autograd.backward(part)
        total += part.item()
    return total, {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


def test_the_budget_changes_neither_loss_nor_gradients(model: RewardModel, examples: Sequence[Example]) -> None:
    whole, reference = gradients(model, examples, 10**6, share=True)
    for budget, share in ((1, True), (300, True), (300, False)):
        loss, grads = gradients(model, examples, budget, share)
        assert loss == pytest.approx(whole, rel=1e-5)
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6, msg=name)


def plain_gradients(model: RewardModel, examples: Sequence[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same loss through transformers' own classifier, eager attention, one unpadded sequence at a time."""
    from transformers import AutoModelForSequenceClassification

    config = model.module.config
    plain = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager", dtype=torch.float32)
    plain.load_state_dict(model.module.state_dict())
    scores = []
    for item in (item for example in examples for item in example.items):
        arguments = {"input_ids": torch.from_numpy(item.ids.astype(np.int64))[None]}
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        if model.contract.template.kind == "pair":
            arguments["token_type_ids"] = (torch.arange(len(item.ids)) >= item.prompt_tokens).long()[None]
        scores.append(plain(**arguments).logits[0, 0])
    pairs = pairs_of(examples, LossConfig())
    loss = preference_loss(torch.stack(scores), pairs, center_rewards_coefficient=0.01) / len(pairs.share)
    torch.autograd.backward(loss)
    return loss.item(), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "qwen2"])
def test_packed_loss_and_gradients_are_those_of_plain_transformers(
    reward_model_dir: WriteBase, toy: Toy, family: str
) -> None:
    model = RewardModel.from_base(reward_model_dir(family), seed=1, device="cpu")
    examples = encode_records(toy(6, 3), model.encoder).examples
    ours, mine = gradients(model, examples, 600, share=model.shares_prompt)
    theirs, truth = plain_gradients(model, examples)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert set(mine) == set(truth)
    scale = max(float(gradient.abs().max()) for gradient in truth.values())
    for name, gradient in truth.items():
        assert float((mine[name] - gradient).abs().max()) <= 1e-5 * max(1.0, scale), name
    assert scale > 1e-2, "the gradients must be there for the comparison to mean something"


def test_prompts_are_computed_once(model: RewardModel, examples: Sequence[Example]) -> None:
    shared, apart = (
        sum(m.batch.tokens for m in micro_batches(examples, LossConfig(), token_budget=2000, share=share))
        for share in (True, False)
    )
    assert apart == sum(example.tokens for example in examples)
    assert shared < 0.75 * apart
