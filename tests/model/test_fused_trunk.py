"""The whole forward and backward on the fused kernels, as on a GPU, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from plaudit_kernels import linear, matmul, select
from plaudit_model import heads
from plaudit_model.encode import Encoded
from plaudit_model.packing import PackedBatch, group_items, pack
from plaudit_model.reward_model import RewardModel

ModelDir = Callable[[str], Path]


def items() -> list[Encoded]:
    generator = np.random.default_rng(0)
    prompt = generator.integers(5, 600, 40, dtype=np.int32)
    lengths = (3, 20, 33)
    return [Encoded(np.concatenate([prompt, generator.integers(5, 600, n, dtype=np.int32)]), 40) for n in lengths]


def scores_and_gradients(model: RewardModel, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.module.zero_grad()
    scores = model.forward(batch)
    (scores[:, 0] * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    return scores.detach(), {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "family",
    ["qwen3", "bert", *(pytest.param(name, marks=pytest.mark.soak) for name in ("gemma2", "modernbert", "starcoder2"))],
)
def test_scores_and_gradients_are_those_of_the_torch_path(
    reward_model_dir: ModelDir, family: str, fused: Callable[[], None]
) -> None:
    model = RewardModel.load(reward_model_dir(family))
    model.train_mode()
    batch = pack(group_items(items(), share=model.shares_prompt))
    expected, gradients = scores_and_gradients(model, batch)
    fused()
    scores, ours = scores_and_gradients(model, batch)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).abs().max() <= 2e-5 * max(float(gradient.abs().max()), 1.0), name


def test_the_products_of_a_foreign_module_are_fused_too(
    reward_model_dir: ModelDir, fused: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.load(reward_model_dir("stablelm"))
    expected = model.score_encoded(items()[:1])
    fused()
    model.freeze()
    products: list[int] = []
    monkeypatch.setattr(linear, "matmul", lambda *args: products.append(len(args[0])) or matmul(*args))
    np.testing.assert_allclose(model.score_encoded(items()[:1]), expected, rtol=1e-5, atol=1e-5)
    assert products == [64] * 14, "seven linear layers in each of two blocks, over 43 tokens and a segment of padding"


@pytest.fixture
def frozen(reward_model_dir: ModelDir, fused: Callable[[], None]) -> tuple[RewardModel, NDArray[np.float32]]:
    """A model that is served by the fused kernels, and what the kernels of the CPU score."""
    model = RewardModel.load(reward_model_dir("qwen3"))
    expected = model.score_encoded(items())
    fused()
    model.freeze()
    return model, expected


@pytest.mark.usefixtures("rowwise_products")
def test_exact_scores_are_the_same_bits_in_any_company(frozen: tuple[RewardModel, NDArray[np.float32]]) -> None:
    model, expected = frozen
    together = model.score_encoded(items())
    assert np.array_equal(together, np.concatenate([model.score_encoded([item]) for item in items()]))
    np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_head_on_cuda_is_computed_so_many_rows_at_a_time(
    reward_model_dir: ModelDir, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a library picks another kernel, and with it other bits, for another number of rows."""
    assert {heads.rows_at_once(count, "cuda") for count in (1, 32, 33, 257)} == {256}
    module = RewardModel.load(reward_model_dir(family)).module
    pooled_ND = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    expected = heads.apply_head(module, pooled_ND)
    assert len(heads.apply_head(module, pooled_ND[:0])) == 0
    monkeypatch.setattr(heads, "rows_at_once", lambda *_: 32)
    seen: list[int] = []
    for layer in (part for part in heads.head_modules(module)[0].modules() if isinstance(part, torch.nn.Linear)):
        layer.register_forward_pre_hook(lambda _, rows: seen.append(len(rows[0])))
    torch.testing.assert_close(heads.apply_head(module, pooled_ND), expected)
    assert seen == [32, 32, 32]


def test_joined_weights_are_held_once_and_saved(
    frozen: tuple[RewardModel, NDArray[np.float32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = frozen
    mlp = model.module.base_model.layers[0].mlp
    assert mlp.gate_proj.weight.untyped_storage().data_ptr() == mlp.up_proj.weight.untyped_storage().data_ptr()
    model.save(tmp_path / "again", model.contract)
    monkeypatch.setenv("PLAUDIT_KERNELS", "auto")
    select.cache_clear()
    assert np.array_equal(RewardModel.load(tmp_path / "again").score_encoded(items()), expected)


def test_fast_mode_says_who_attends_and_exact_mode_asks_nobody(
    reward_model_dir: ModelDir, fused: Callable[[], None]
) -> None:
    plain = RewardModel.load(reward_model_dir("qwen3"))
    fused()

    def said(mode: str) -> str:
        made = RewardModel(plain.module, plain.contract, plain.directory, device="cpu", dtype="float32", mode=mode)
        return made.path_reason

    assert "where nothing is shared" not in said("exact")
    assert said("fast").endswith("where nothing is shared: our kernels: libraries have no attention in torch.float32")
