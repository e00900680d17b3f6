"""A whole training step on the fused kernels, as on a GPU, in Triton's interpreter: pairs and rankings, prompts once.

Its truths are the torch path and transformers' own eager forward, padded, a response at a time. bf16 is wrong in the
interpreter: autocast is that to fp16, which torch takes on CPUs too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import softplus

from plaudit_model.records import Comparison, Message, Origin, Record
from plaudit_model.reward_model import RewardModel
from plaudit_training.batches import Example, encode_records, micro_batches, total_weight
from plaudit_training.config import LossConfig
from plaudit_training.loss import preference_loss

ModelDir = Callable[[str], Path]
Gradients = dict[str, torch.Tensor]
CENTRING = 0.01


def examples(model: RewardModel) -> tuple[Example, ...]:
    """A pair, and a ranking of four: six comparisons."""
    texts = ("red stone indeed indeed", "blue wind", "a tree, green and tall, by the water", "fire")
    comparisons = tuple(Comparison(i, j, "first") for j in range(4) for i in range(j))
    prompt = (Message("user", "which of the houses is red, and which one is nearer to the water?"),)
    records = [
        Record("pair", prompt, ("the left one", "no"), (Comparison(0, 1, "second", margin=0.5),), Origin("t", 1)),
        Record("four", (Message("user", "what is there to see?"),), texts, comparisons, Origin("t", 2)),
    ]
    return encode_records(records, model.encoder).examples


def step(model: RewardModel, *, half: torch.dtype | None = None, recompute: bool = False) -> tuple[float, Gradients]:
    """Loss and gradients of one optimiser step, as the trainer takes it."""
    settings, members, total = LossConfig(), examples(model), 0.0
    model.train_mode(gradient_checkpointing=recompute)
    model.module.zero_grad()
    for micro in micro_batches(members, settings, token_budget=4096, share=model.shares_prompt):
        with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
            scores = model.forward(micro.batch)[:, 0]
        order = torch.from_numpy(micro.batch.indices).argsort()
        loss = preference_loss(scores.index_select(0, order), micro.pairs, center_rewards_coefficient=CENTRING)
        loss = loss / total_weight(members, settings)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}


def eager(model: RewardModel) -> tuple[float, Gradients]:
    """The same by transformers' forward of each response, padded on the right."""
    from transformers import AutoModelForSequenceClassification

    module: Any = AutoModelForSequenceClassification.from_config(model.module.config, attn_implementation="eager")
    module.load_state_dict(model.module.state_dict())
    module.train()
    losses, longest = [], 4 + max(len(item.ids) for example in examples(model) for item in example.items)
    for example in examples(model):
        scores = []
        for item in example.items:
            ids = torch.full((1, longest), int(module.config.pad_token_id))
            ids[0, : len(item.ids)] = torch.from_numpy(item.ids)
            mask = (torch.arange(longest) < len(item.ids))[None].long()
            scores.append(module(input_ids=ids, attention_mask=mask).logits[0, 0])
        for comparison in example.record.comparisons:
            won, lost = comparison.first, comparison.second
            if comparison.outcome == "second":
                won, lost = lost, won
            margin = comparison.margin or 0.0
            losses.append(
                softplus(scores[lost] - scores[won] + margin) + CENTRING * (scores[won] + scores[lost]).square()
            )
    loss = torch.stack(losses).mean()
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def furthest(ours: Gradients, theirs: Gradients) -> float:
    """The largest difference between gradients, as a share of the largest gradient of its parameter."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n].double() - t).abs().max() / t.abs().max().clamp(min=1e-3)) for n, t in theirs.items())


@pytest.mark.parametrize("family", ["qwen3", pytest.param("gemma2", marks=pytest.mark.soak)])
def test_gradients_are_those_of_torch_and_of_padded_transformers(
    reward_model_dir: ModelDir, family: str, fused: Callable[[], None]
) -> None:
    model = RewardModel.from_base(reward_model_dir(family), seed=0, device="cpu")
    truth_loss, truth = eager(model)
    loss, gradients = step(model)
    fused()
    our_loss, ours = step(model)
    assert our_loss == pytest.approx(truth_loss, rel=1e-5) and loss == pytest.approx(truth_loss, rel=1e-5)
    assert furthest(gradients, truth) < 1e-4 and furthest(ours, truth) < 1e-4
    again_loss, again = step(model, recompute=True)
    assert again_loss == our_loss and all(torch.equal(again[name], ours[name]) for name in ours), "not a bit is changed"


def adapted(base: Path) -> RewardModel:
    model = RewardModel.from_base(base, seed=0, device="cpu")
    model.adapt(str(base), seed=0, r=4, alpha=8, dropout=0.0, target_modules=("q_proj", "down_proj"), use_rslora=False)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def whole(base: Path) -> RewardModel:
    return RewardModel.from_base(base, seed=0, device="cpu")


@pytest.mark.parametrize(
    ("family", "make"),
    [("qwen3", adapted), pytest.param("starcoder2", whole, marks=pytest.mark.soak),
     pytest.param("qwen3", whole, marks=pytest.mark.soak),
     pytest.param("bert", whole, marks=pytest.mark.soak),
     pytest.param("gemma2", whole, marks=pytest.mark.soak), pytest.param("modernbert", whole, marks=pytest.mark.soak)],
)  # fmt: skip
def test_under_autocast_the_kernels_round_as_torch_does(
    reward_model_dir: ModelDir, family: str, make: Callable[[Path], RewardModel], fused: Callable[[], None]
) -> None:
    """FlashAttention's rule: at most twice the error of torch's operations under the same autocast."""
    model = make(reward_model_dir(family))
    _, truth = step(model)
    _, theirs = step(model, half=torch.float16)
    fused()
    _, exact = step(model)
    assert furthest(exact, truth) < 1e-4
    _, ours = step(model, half=torch.float16)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values()), "that of the parameters"
    assert furthest(ours, truth) <= 2 * furthest(theirs, truth) + 1e-3
