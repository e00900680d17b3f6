"""Decoders with weights of int8: the scores of a bf16 model whose weights are the widened ones, in half the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from plaudit_kernels import Int8Linear, linear, matmul
from plaudit_kernels.int8 import round_rows, widen_rows
from plaudit_model.contract import read, write
from plaudit_model.encode import Encoded
from plaudit_model.errors import ContractError
from plaudit_model.footprint import Room
from plaudit_model.oracle import agreement
from plaudit_model.proof import TOLERANCE
from plaudit_model.reward_model import RewardModel

ModelDir = Callable[[str], Path]
FAMILIES = ["qwen3", "gemma2", pytest.param("qwen2", marks=pytest.mark.soak)]  # Qwen2 has biases


def items(prompts: int = 1) -> list[Encoded]:
    generator, found = np.random.default_rng(0), []
    for _ in range(prompts):
        prompt = generator.integers(5, 600, 40, dtype=np.int32)
        own = (generator.integers(5, 600, n, dtype=np.int32) for n in (1, 7, 30, 64, 90, 120))
        found += [Encoded(np.concatenate([prompt, response]), 40) for response in own]
    return found


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.base_model.layers.modules() if isinstance(layer, nn.Linear)]  # type: ignore[union-attr, operator]


def widened(directory: Path, mode: str) -> RewardModel:
    """The model in bf16 with the weights that int8 leaves, laid out for bf16."""
    model = RewardModel.load(directory, dtype="bfloat16", mode=mode)
    model.train_mode()
    with torch.no_grad():
        for layer in linears(model.module):
            widen_rows(*round_rows(layer.weight), layer.weight.data)
    model.freeze()
    return model


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_widened_weights_bit_for_bit(
    reward_model_dir: ModelDir, family: str, mode: str
) -> None:
    ours = RewardModel.load(reward_model_dir(family), dtype="int8", mode=mode)
    plain = widened(reward_model_dir(family), mode)
    assert np.array_equal(ours.score_encoded(items()), plain.score_encoded(items()))
    assert ours.numerics == plain.numerics.replace("-bfloat16-", "-int8-") and ours.path_reason == plain.path_reason


@pytest.mark.usefixtures("rowwise_products")
def test_exact_scores_are_the_same_bits_in_any_company_on_fused_kernels(
    reward_model_dir: ModelDir, fused: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, for the interpreter multiplies no bf16 numbers; which dtype the widened weights have decides nothing."""
    model = RewardModel.load(reward_model_dir("qwen3"), dtype="float32")
    some = items()[:3]
    plain = model.score_encoded(some)
    model.train_mode()
    fused()
    scratch = torch.empty(0)
    for projection in model.trunk._projections():  # type: ignore[attr-defined]
        projection.freeze(lambda weight, bias: Int8Linear(weight, bias, exact=True, scratch=scratch))
    products: list[int] = []
    monkeypatch.setattr(linear, "matmul", lambda *args: products.append(len(args[0])) or matmul(*args))
    together = model.score_encoded(some)
    assert len(products) == len(model.trunk._projections())  # type: ignore[attr-defined]
    assert np.array_equal(together, np.concatenate([model.score_encoded([item]) for item in some]))
    assert 0 < np.abs(together - plain).max() < TOLERANCE["int8"]


def test_scores_move_less_than_in_fp8_and_not_much_more_than_in_bf16(reward_model_dir: ModelDir) -> None:
    whole, bf16, int8, fp8 = (
        RewardModel.load(reward_model_dir("qwen3"), dtype=dtype, mode="fast").score_encoded(items(10))[:, 0]
        for dtype in ("float32", "bfloat16", "int8", "fp8")
    )
    assert np.abs(bf16 - whole).max() < np.abs(int8 - whole).max() < 0.6 * np.abs(fp8 - whole).max()
    assert agreement(int8, whole, "int8").flips == 0 and agreement(int8, whole, "int8").holds


def test_memory_is_what_was_predicted(reward_model_dir: ModelDir) -> None:
    model = RewardModel.load(reward_model_dir("qwen3"), dtype="int8")
    frozen: Any = [projection._frozen for projection in model.trunk._projections()]  # type: ignore[attr-defined]
    held = [tensor for layer in frozen for tensor in (layer._weight, layer._scale)]
    assert len({id(layer._scratch) for layer in frozen}) == 1
    tensors = [*held, frozen[0]._scratch, *model.module.parameters()]
    total = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    placeholders = 2 * len(linears(model.module))
    head = 2 * model.module.score.weight.numel()  # type: ignore[union-attr, operator]
    assert Room(0).prediction(model.module, "int8")["weights"] == total - placeholders - head  # of fp32, not of bf16
    assert frozen[0]._scratch.numel() == 2 * max(layer.weight.numel() for layer in linears(model.module))


def test_predictions_of_8_bits(reward_model_dir: ModelDir) -> None:
    model = RewardModel.load(reward_model_dir("llama"))
    sizes = [layer.weight.shape for layer in linears(model.module)]
    rounded, rows = sum(n * k for n, k in sizes), sum(n for n, _ in sizes)
    bf16, fp8, int8 = (Room(100).prediction(model.module, dtype) for dtype in ("bfloat16", "fp8", "int8"))
    assert bf16["weights"] - fp8["weights"] == rounded - 4 * rows
    assert int8["weights"] - fp8["weights"] == 4 * max(n * k for n, k in sizes)
    assert bf16["activations"] == fp8["activations"] == int8["activations"]
    graph = model.module.to("meta")  # where the module of an exported model is
    whole, narrow = (Room(100).prediction(graph, dtype) for dtype in ("float32", "int8"))
    assert whole["weights"] - narrow["weights"] == 3 * rounded - 4 * rows
    assert whole["activations"] == narrow["activations"]


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_a_device_gets_the_weights_of_one_product_at_a_time(
    reward_model_dir: ModelDir, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RewardModel.load(reward_model_dir("qwen3"))
    whole.train_mode()
    model = RewardModel(
        whole.module, whole.contract, whole.directory, device="meta", dtype=dtype, mode="fast"
    )  # a device without memory, so that what would be moved shows and costs nothing
    seen: list[int] = []
    trunk: Any = model.trunk
    freeze = trunk._eight_bits.freeze

    def spy(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        there = [layer.weight for layer in linears(model.module) if layer.weight.is_meta]
        seen.append(sum(weight.untyped_storage().nbytes() > 2 for weight in there))
        return freeze(weight, bias)

    trunk._eight_bits = trunk._eight_bits._replace(freeze=spy)
    model.freeze()
    assert seen == [len(projection._layers) for projection in trunk._projections()]
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert all(layer.weight.untyped_storage().nbytes() == 2 for layer in linears(model.module))


def test_the_whole_weights_are_gone(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    model = RewardModel.load(reward_model_dir("llama"), dtype="int8", mode="fast")
    assert all(layer.weight.isnan().all() for layer in linears(model.module))
    before = model.score_encoded(items())
    for refused in (model.train_mode, model.freeze, lambda: model.save(tmp_path / "saved", model.contract)):
        with pytest.raises(ValueError, match="load the model again"):
            refused()
    assert not (tmp_path / "saved").exists()
    assert np.array_equal(model.score_encoded(items()), before)


def test_it_is_loaded_as_the_contract_says(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    import shutil
    from dataclasses import replace

    copy = shutil.copytree(reward_model_dir("llama"), tmp_path / "int8")
    contract = read(copy)
    write(replace(contract, serving=replace(contract.serving, dtype="int8")), copy)
    assert RewardModel.load(copy).dtype == "int8"


def test_encoders_have_no_int8_and_are_told_what_they_have(reward_model_dir: ModelDir) -> None:
    with pytest.raises(ContractError, match="int8 is for decoders with layers of ours, which bert has not.* --onnx"):
        RewardModel.load(reward_model_dir("bert"), dtype="int8")


def test_weights_that_8_bits_cannot_hold_are_refused(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    """One huge weight in each row, where it meets a zero: exact in bf16, and in int8 all others round to nothing."""
    whole = RewardModel.load(reward_model_dir("qwen3"))
    whole.train_mode()
    with torch.no_grad():
        for layer in whole.module.base_model.layers:  # type: ignore[union-attr]
            layer.post_attention_layernorm.weight[0] = 0
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[:, 0] = 1e4
    whole.save(tmp_path / "outlier", whole.contract)
    assert RewardModel.load(tmp_path / "outlier", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ContractError, match=r"bfloat16 rounds less.* scores differ from the plain model's by"):
        RewardModel.load(tmp_path / "outlier", dtype="int8")


def test_a_weight_that_is_not_finite_gives_no_score(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    whole = RewardModel.load(reward_model_dir("llama"))
    whole.train_mode()
    with torch.no_grad():
        whole.module.base_model.layers[0].mlp.down_proj.weight[3, 5] = torch.inf  # type: ignore[union-attr, index]
    whole.save(tmp_path / "inf", whole.contract)
    with pytest.raises(ContractError, match="not finite"):
        RewardModel.load(tmp_path / "inf", dtype="int8")
