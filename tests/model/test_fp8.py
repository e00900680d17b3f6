"""Decoders in fp8: scores near those in fp32, weights of 8 bits that nothing takes for the whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plaudit_kernels import Fp8Linear
from plaudit_model.encode import Encoded
from plaudit_model.errors import ContractError
from plaudit_model.oracle import agreement
from plaudit_model.reward_model import RewardModel

ModelDir = Callable[[str], Path]


def items() -> list[Encoded]:
    generator = np.random.default_rng(0)
    prompt = generator.integers(5, 600, 40, dtype=np.int32)
    own = [generator.integers(5, 600, n, dtype=np.int32) for n in (1, 7, 30, 64, 90, 120)]
    return [Encoded(np.concatenate([prompt, response]), 40) for response in own]


def test_scores_move_by_rounding_and_the_rounding_is_seen(reward_model_dir: ModelDir) -> None:
    whole, bf16, fp8 = (
        RewardModel.load(reward_model_dir("qwen3"), dtype=dtype, mode="fast").score_encoded(items())[:, 0]
        for dtype in ("float32", "bfloat16", "fp8")
    )
    moved, spread = np.abs(fp8 - whole).max(), whole.std()
    assert np.abs(bf16 - whole).max() < moved < 0.5 * spread
    assert agreement(fp8, whole, "fp8").flips == 0


def test_the_whole_weights_are_gone(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    model = RewardModel.load(reward_model_dir("llama"), dtype="fp8", mode="fast")
    layer = model.module.base_model.layers[0].mlp.down_proj  # type: ignore[union-attr, index]
    assert layer.weight.untyped_storage().nbytes() == 2 and layer.weight.isnan().all()
    assert "-fp8-" in model.numerics
    with pytest.raises(ValueError, match="load the model again"):
        model.train_mode()
    with pytest.raises(ValueError, match="load the model again"):
        model.save(tmp_path / "saved", model.contract)


def test_encoders_have_no_fp8(reward_model_dir: ModelDir) -> None:
    with pytest.raises(ContractError, match="fp8 is for decoders"):
        RewardModel.load(reward_model_dir("bert"), dtype="fp8")


def test_a_bias_is_added_after_the_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 64), (24, 64), (24,)))
    ours, truth = Fp8Linear(weight, bias)(x), x @ weight.T + bias
    assert (ours - truth).norm() / truth.norm() < 0.05
    assert torch.equal(ours, Fp8Linear(weight, None)(x) + bias)
