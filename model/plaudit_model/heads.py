"""The architecture's own classification head, computed in fp32 whatever the trunk's dtype.

A bf16 score near 8 comes in steps of 0.0625: ties that the model did not mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, linear, pad

from plaudit_kernels import BLOCK

_DENSE: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "bert": ("base_model.pooler.dense", torch.tanh, "classifier"),
    "roberta": ("classifier.dense", torch.tanh, "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", torch.tanh, "classifier.out_proj"),
    "electra": ("classifier.dense", gelu, "classifier.out_proj"),
    "distilbert": ("pre_classifier", torch.relu, "classifier"),
    "deberta-v2": ("pooler.dense", gelu, "classifier"),
}
"""Encoders whose head is a dense layer and a linear layer over the pooled token: the names of the layers, and what
lies between them."""


def is_known(module: nn.Module) -> bool:
    """Whether the head is one that is computed here: the `score` layer of transformers' decoders, the dense and the
    linear layer of BERT and its kin, or ModernBERT's over its first token."""
    config: Any = module.config
    if config.model_type == "modernbert":
        return bool(config.classifier_pooling == "cls")
    if config.model_type == "deberta-v2":
        return bool(config.pooler_hidden_act == "gelu")
    return config.model_type in _DENSE or isinstance(getattr(module, "score", None), nn.Linear)


def final_layer(module: nn.Module) -> nn.Linear:
    """The linear layer that gives the attributes. Raises TypeError for a head of another shape."""
    config: Any = module.config
    name = _DENSE[config.model_type][2] if config.model_type in _DENSE else "score"
    layer = _find(module, "classifier" if config.model_type == "modernbert" else name)
    if isinstance(layer, nn.Linear):
        return layer
    raise TypeError(f"{type(module).__name__} has no linear head")


def head_modules(module: nn.Module) -> list[nn.Module]:
    """The parts of the model that stay in fp32."""
    return [*hidden_layers(module), final_layer(module)] if is_known(module) else []


def hidden_layers(module: nn.Module) -> list[nn.Module]:
    """What lies between the pooled token and the final layer, if anything."""
    config: Any = module.config
    if config.model_type == "modernbert":
        return [module.head]  # type: ignore[list-item]
    dense = _find(module, _DENSE[config.model_type][0]) if config.model_type in _DENSE else None
    return [dense] if isinstance(dense, nn.Linear) else []


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

    The rows are rounded up to whole blocks, or computed so many at a time, so that the product's kernel does not depend
    on N.
    """
    count, kind = len(pooled_ND), pooled_ND.device.type
    size = rows_at_once(count, kind)
    with torch.autocast(kind, enabled=False):
        parts = torch.split(pad(pooled_ND.float(), (0, 0, 0, -count % size)), size)
        return torch.cat([head_layers(module, part) for part in parts])[:count]


def rows_at_once(count: int, kind: str) -> int:
    """Rows of a product of `count` on a device of this kind. On CUDA a library has other kernels for other numbers of
    rows; the CPU's differ for very few alone."""
    return 256 if kind == "cuda" else max(1, -(-count // BLOCK)) * BLOCK


def head_layers(module: nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
    """The layers of the head one after the other, over rows (N, d) of their own dtype: attributes (N, A)."""
    config: Any = module.config
    for layer in hidden_layers(module):
        hidden_ND = layer(hidden_ND)
        if isinstance(layer, nn.Linear):
            hidden_ND = _DENSE[config.model_type][1](hidden_ND)
    final = final_layer(module)
    return linear(hidden_ND, final.weight, final.bias)


def init_head(layer: nn.Linear, seed: int) -> None:
    """Weights from N(0, 1 / sqrt(d + 1)) (Stiennon et al., 2009.01325), bias 0."""
    generator = torch.Generator().manual_seed(seed)
    width = layer.in_features
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (width + 1) ** -0.5)
        if layer.bias is not None:
            layer.bias.zero_()


def _find(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
