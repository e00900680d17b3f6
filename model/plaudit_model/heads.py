"""The architecture's own classification head, computed in fp32 whatever the trunk's dtype.

A bf16 score near 8 comes in steps of 0.0625: ties that the model did not mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from plaudit_kernels import BLOCK

_FINAL_LAYERS = ("score", "classifier")


def is_known(module: nn.Module) -> bool:
    """Whether the head is one that is computed here: the `score` layer of transformers' decoders, or BERT's."""
    return isinstance(getattr(module, "score", None), nn.Linear) or module.config.model_type == "bert"  # type: ignore[union-attr]


def final_layer(module: nn.Module) -> nn.Linear:
    """The linear layer that gives the attributes. Raises TypeError for a head of another shape."""
    for name in _FINAL_LAYERS:
        layer = getattr(module, name, None)
        if isinstance(layer, nn.Linear):
            return layer
    raise TypeError(f"{type(module).__name__} has no linear head named {' or '.join(_FINAL_LAYERS)}")


def head_modules(module: nn.Module) -> list[nn.Module]:
    """The parts of the model that stay in fp32."""
    if not is_known(module):
        return []
    return [layer for layer in (pooler(module), final_layer(module)) if layer is not None]


def pooler(module: nn.Module) -> nn.Linear | None:
    """BERT's dense layer over the pooled token, if the architecture has one."""
    inner = getattr(getattr(module, "base_model", None), "pooler", None)
    dense = getattr(inner, "dense", None)
    return dense if isinstance(dense, nn.Linear) else None


def last_hidden_state(module: nn.Module, **arguments: Any) -> torch.Tensor:
    """Last hidden state (B, L, d) of the base model, without its pooler: that belongs to the head, in fp32."""
    base: Any = module.base_model
    inner = getattr(base, "pooler", None)
    if inner is not None:
        base.pooler = None
    try:
        hidden: torch.Tensor = base(**arguments).last_hidden_state
        return hidden
    finally:
        if inner is not None:
            base.pooler = inner


def apply_head(module: nn.Module, pooled_ND: torch.Tensor) -> torch.Tensor:
    """Attributes (N, A) fp32 from pooled hidden states (N, d) of any dtype.

    The rows are rounded up to whole blocks, so that the product's kernel does not depend on N.
    """
    count = len(pooled_ND)
    hidden = pad(pooled_ND.float(), (0, 0, 0, -count % BLOCK))
    dense = pooler(module)
    if dense is not None:
        hidden = torch.tanh(linear(hidden, dense.weight.float(), _float(dense.bias)))
    layer = final_layer(module)
    return linear(hidden, layer.weight.float(), _float(layer.bias))[:count]


def init_head(layer: nn.Linear, seed: int) -> None:
    """Weights from N(0, 1 / sqrt(d + 1)) (Stiennon et al., 2009.01325), bias 0."""
    generator = torch.Generator().manual_seed(seed)
    width = layer.in_features
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (width + 1) ** -0.5)
        if layer.bias is not None:
            layer.bias.zero_()


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()
