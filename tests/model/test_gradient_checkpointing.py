"""Layers that are computed once more in the backward pass: the same bits, and less kept for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plaudit_model.encode import Encoded
from plaudit_model.errors import ContractError
from plaudit_model.packing import PackedBatch, group_items, pack
from plaudit_model.reward_model import RewardModel

ModelDir = Callable[[str], Path]


def batch_of(model: RewardModel) -> PackedBatch:
    """Two prompts with two and four responses."""
    draw = np.random.default_rng(0)
    items = []
    for prompt, responses in ((40, (3, 20)), (17, (5, 5, 9, 30))):
        head = draw.integers(5, 600, prompt, dtype=np.int32)
        items += [Encoded(np.concatenate([head, draw.integers(5, 600, n, dtype=np.int32)]), prompt) for n in responses]
    return pack(group_items(items, share=model.shares_prompt))


class Kept:
    """The bytes that the forward pass keeps for the backward pass, each storage once, parameters not counted."""

    def __init__(self, model: RewardModel) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def size(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage
        return tensor


def step(model: RewardModel, *, on: bool, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], int]:
    """Scores and gradients of one batch, and what was kept for them."""
    model.train_mode(gradient_checkpointing=on)
    model.module.zero_grad()
    kept = Kept(model)
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            scores = model.forward(batch_of(model))
        loss = (scores[:, 0] * torch.linspace(-1, 2, len(scores))).sum()
    torch.autograd.backward(loss)
    gradients = [p.grad.clone() for p in model.module.parameters() if p.grad is not None]
    return [scores.detach(), *gradients], kept.size


def assert_equal_for_less(plain: tuple[list[torch.Tensor], int], again: tuple[list[torch.Tensor], int]) -> None:
    assert len(plain[0]) == len(again[0]) > 10
    assert all(torch.equal(*pair) for pair in zip(plain[0], again[0], strict=True))
    assert again[1] < 0.75 * plain[1], "one or two of the layers are not the last one, and keep their inputs alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "bert", "modernbert"])
def test_scores_and_gradients_are_the_same_bits(reward_model_dir: ModelDir, family: str, dtype: torch.dtype) -> None:
    model = RewardModel.from_base(reward_model_dir(family), seed=0, device="cpu")
    assert_equal_for_less(step(model, on=False, dtype=dtype), step(model, on=True, dtype=dtype))


@pytest.mark.parametrize(("family", "path"), [("olmo2", "packed: transformers"), ("deberta-v2", "padded")])
def test_so_they_are_through_layers_of_transformers(reward_model_dir: ModelDir, family: str, path: str) -> None:
    model = RewardModel.from_base(reward_model_dir(family), seed=0, device="cpu")
    assert model.trunk.reason.startswith(path)
    plain, again = step(model, on=False), step(model, on=True)
    assert_equal_for_less(plain, again)
    assert step(model, on=False)[1] == plain[1], "it can be taken back"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_drop_the_same_inputs_again(reward_model_dir: ModelDir, dropout: float) -> None:
    base = reward_model_dir("qwen3")
    model = RewardModel.from_base(base, seed=0, device="cpu")
    model.adapt(str(base), seed=0, r=4, alpha=8, dropout=dropout, target_modules=("all-linear",), use_rslora=False)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert_equal_for_less(step(model, on=False), step(model, on=True))


def test_a_module_that_cannot_be_recomputed_says_so(
    reward_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.from_base(reward_model_dir("olmo2"), seed=0, device="cpu")
    monkeypatch.setattr("plaudit_model.padded_trunk.GradientCheckpointingLayer", type("Other", (), {}))
    model.train_mode()
    with pytest.raises(ContractError, match="Olmo2ForSequenceClassification has no gradient checkpointing"):
        model.train_mode(gradient_checkpointing=True)


def test_nothing_is_recomputed_without_gradients(reward_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel.from_base(reward_model_dir("qwen3"), seed=0, device="cpu")
    model.train_mode(gradient_checkpointing=True)
    monkeypatch.delattr("plaudit_model.projection.checkpoint")
    with torch.no_grad():
        model.forward(batch_of(model))
    with pytest.raises(NameError):
        model.forward(batch_of(model))
