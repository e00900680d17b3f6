"""Rotary angles: those of transformers, whatever a process allows to products of fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama

from plaudit_model.rope import rotary_angles

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}


@pytest.fixture
def products_of_eight_bits() -> Iterator[None]:
    """As TORCH_ALLOW_TF32_CUBLAS_OVERRIDE allows eleven to a GPU, this allows bf16 to a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def llama(rope: dict[str, Any]) -> Any:
    config = modeling_llama.LlamaConfig(**SHAPE, max_position_embeddings=2048, rope_parameters=rope)
    return modeling_llama.LlamaRotaryEmbedding(config)


def gemma() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return modeling_gemma3.Gemma3RotaryEmbedding(modeling_gemma3.Gemma3TextConfig(**SHAPE, layer_types=kinds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (llama({"rope_type": "default", "rope_theta": 1e4}), None),
        (llama(YARN), None),  # its cosines and sines are scaled
        (gemma(), "sliding_attention"),
        (gemma(), "full_attention"),
    ],
)
def test_angles_are_those_of_transformers(module: Any, kind: str | None, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 2, 3, 511, 1023, 2047, 7, 8])
    cos, sin = module(torch.zeros(1, 9, 64, dtype=dtype), positions[None], *([kind] if kind else []))
    assert [angles.dtype for angles in rotary_angles(module, positions, dtype, kind)] == [dtype, dtype]
    assert all(map(torch.equal, rotary_angles(module, positions, dtype, kind), (cos[0], sin[0])))


def test_they_are_exact_where_products_may_be_rounded(products_of_eight_bits: None) -> None:
    positions = torch.arange(2048)
    module = llama({"rope_type": "default", "rope_theta": 1e4})
    cos, _ = rotary_angles(module, positions, torch.float32)
    wanted = (positions[:, None].double() * module.inv_freq.double()).cos()
    assert torch.allclose(cos[:, :16].double(), wanted, atol=3e-4)  # half a unit in the last place of an angle of 2,047
