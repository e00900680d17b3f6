"""Warm-up meets every kernel that traffic needs: on a GPU that is not there, where all is real but the arithmetic."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plaudit_model import warm
from plaudit_model.encode import Encoded
from plaudit_model.packing import group_items, split_by_budget
from plaudit_model.reward_model import RewardModel

SCRIPT = Path(__file__).parents[1] / "pretended_gpu.py"
MODELS = ("qwen3:exact:float32", "qwen3:fast:float32", "qwen3:exact:bfloat16", "gemma2:exact:bfloat16",
          "bert:exact:float32", "modernbert:exact:float32", "modernbert:fast:float32", "llama:exact:int8",
          "llama:exact:fp8")  # fmt: skip


@pytest.fixture(scope="module")
def answers(reward_model_dir: Callable[[str], Path]) -> dict[str, Any]:
    names = [f"{reward_model_dir(family)}:{rest}" for family, rest in (name.split(":", 1) for name in MODELS)]
    done = subprocess.run([sys.executable, SCRIPT, "traffic", *names], capture_output=True, text=True, check=True)
    return dict(zip(MODELS, json.loads(done.stdout), strict=True))


def test_traffic_compiles_nothing_after_warming_up(answers: dict[str, Any]) -> None:
    for name, answer in answers.items():
        assert len(answer["warmed"]) >= 5, name
        assert not answer["late"], name
        assert answer["told"][-1].startswith("warming up: ")


def test_a_row_goes_through_the_same_code_in_any_batch(answers: dict[str, Any]) -> None:
    for name, answer in answers.items():
        assert not {"plaudit_kernels.norm._forward", "plaudit_kernels.rotary._forward"} & set(answer["fused"]), name
        general = [_unspecialised(one) for one in answer["warmed"]]
        assert len(set(general)) == len(general) or ":fast:" in name, answer["warmed"]


def _unspecialised(kernel: str) -> str:
    """Its name and what the model decides. Weights `b` of a product lie where the file has them, in any batch."""
    kernel = re.sub(r"\b([a-z_]+)(?:: (?:i32|i64)(?:/16)?|=1)(?=[,)])", r"\1", kernel)
    return re.sub(r"(?<!\bb: \*fp32)/16", "", kernel)


@pytest.mark.parametrize(("budget", "longest"), [(4096, 512), (600, 640), (32, 8), (5000, 40_960), (1, 20)])
def test_its_batches_are_those_that_serving_can_meet(budget: int, longest: int) -> None:
    batches = [group_items(items, share=True) for items in warm.warming(budget, longest, share=True)]
    sizes = [sum(group.tokens for group in batch) for batch in batches]
    assert max(sizes) >= max(budget, longest) and sizes[0] <= 64
    assert all(len(split_by_budget(batch, max(budget, longest, 64))) == 1 for batch in batches)
    ends = [len(group.prefix) + len(suffix) for batch in batches for group in batch for suffix in group.suffixes]
    assert min(ends) > 0 and max(ends) <= longest
    if budget >= 600:
        assert any(len(group.suffixes) > 1 for batch in batches for group in batch), "a shared prompt"


def test_what_does_not_fit_is_left_out_and_told(
    reward_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.load(reward_model_dir("bert"))
    computed: list[int] = []

    def score(items: list[Encoded], token_budget: int) -> None:
        if sum(len(item.ids) for item in items) > 100:
            raise torch.OutOfMemoryError
        computed.append(len(items))

    monkeypatch.setattr(model, "score_encoded", score)
    told: list[str] = []
    assert warm.warm_up(model, 4096, told.append) == 64
    assert computed and told == ["out of memory over 128 tokens: larger batches are not warmed up"]


def test_a_cpu_is_not_warmed_up(reward_model_dir: Callable[[str], Path]) -> None:
    assert not warm.pays(RewardModel.load(reward_model_dir("bert"), device="cpu"))
