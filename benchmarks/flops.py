"""The arithmetic that a packed batch needs: products of the rows that are computed, and attention."""

from __future__ import annotations

import itertools

from torch import nn

from plaudit_model.packing import PackedBatch
from plaudit_model.reward_model import RewardModel


def layers_of(model: RewardModel) -> list[list[nn.Linear]]:
    """The linear layers of each layer of the trunk."""
    base = model.module.base_model
    layers = base.layers if hasattr(base, "layers") else base.encoder.layer
    return [[part for part in layer.modules() if isinstance(part, nn.Linear)] for layer in layers]


def products_over_all_rows(model: RewardModel) -> list[nn.Linear]:
    """The layers that every row goes through: in the last layer of the trunk, keys and values only."""
    *body, last = layers_of(model)
    names = {id(module): name for name, module in model.module.named_modules()}
    kept = [part for part in last if names[id(part)].rsplit(".", 1)[-1] in ("k_proj", "v_proj", "key", "value")]
    return list(itertools.chain(*body, kept))


def flops_of(model: RewardModel, batch: PackedBatch) -> float:
    """Floating-point operations that the batch needs."""
    *body, last = layers_of(model)
    products = 2 * batch.tokens * sum(linear.weight.numel() for linear in products_over_all_rows(model))
    pooled = 2 * len(batch.indices) * sum(linear.weight.numel() for linear in last)
    _, lengths, _, prefixes = batch.segments.T
    seen = lengths * (prefixes + (lengths + 1) / 2) if model.shares_prompt else lengths**2
    config = model.module.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * float(seen.sum()) * config.num_attention_heads * width * len(body)
    return products + pooled + attention
