"""The packed forward of decoders: Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3, which differ in a few settings.

One token axis, no padding, a shared prompt once, no cache of keys and values. Weights are those of the
transformers module, whose layers this replaces; queries, keys and values are one product, gate and up another. Of
the last layer only the pooled tokens' output is read: their keys and values come from all rows; queries, attention
output and feed-forward are computed for the pooled rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plaudit_kernels import Activation, AttentionPlan, gated, packed_attention, pooled_head, rms_norm, rotary

from .heads import final_layer
from .packed import Layout
from .packing import PackedBatch
from .projection import EightBits, Freezable, Projection
from .rope import rotary_angles

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"})

Pair = tuple[Tensor, Tensor]

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Spec:
    """What a decoder's configuration says of its layers. `windows`: what each layer sees, None for everything.
    `sandwich`: Gemma norms what a branch returns, too; its norms scale by 1 + weight."""

    head_dim: int
    scale: float
    eps: float
    activation: Activation
    windows: tuple[int | None, ...]
    softcap: float | None = None
    sandwich: bool = False

    @classmethod
    def of(cls, config: Any) -> Spec:
        """Of a transformers configuration of one of the FAMILIES."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        gemma = config.model_type.startswith("gemma")
        return cls(
            head_dim=head_dim,
            scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
            eps=config.rms_norm_eps,
            activation=_ACTIVATIONS[config.hidden_activation if gemma else config.hidden_act],
            windows=windows_of(config),
            softcap=getattr(config, "attn_logit_softcapping", None),
            sandwich=gemma,
        )


def windows_of(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer, None where a layer sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral: one setting for all
        return tuple(window for _ in range(config.num_hidden_layers))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def unsupported(config: Any) -> str:
    """Why this decoder's configuration has no packed forward; empty if it has one."""
    if config.model_type not in FAMILIES:
        return f"packing is not proven for {config.model_type}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in _ACTIVATIONS:
        return f"activation {activation}"
    return "bidirectional attention" if getattr(config, "use_bidirectional_attention", False) else ""


class DecoderTrunk(Freezable):
    """Attributes (N, A) fp32 of a packed batch. With `exact`, rows come in whole blocks: matrix products choose
    another kernel for very few rows, and with it other bits. `eight_bits` rounds the weights of frozen layers."""

    shares_prompt = True

    def __init__(self, module: nn.Module, *, exact: bool, eight_bits: EightBits | None = None) -> None:
        base: Any = module.base_model
        config: Any = module.config
        self._module, self._base, self._exact, self._eight_bits = module, base, exact, eight_bits
        self._spec = Spec.of(config)
        kinds = getattr(config, "layer_types", None) or [None] * len(base.layers)
        self._rope_kinds = tuple(kinds) if hasattr(base.rotary_emb, "layer_types") else (None,) * len(base.layers)
        self._layers: list[Layer] = [
            Layer(layer, self._spec, window) if layer is not base.layers[-1] else LastLayer(layer, self._spec, window)
            for layer, window in zip(base.layers, self._spec.windows, strict=True)
        ]
        self.reason = "packed: own layers, prompts shared"

    def __call__(self, batch: PackedBatch) -> Tensor:
        hidden_RD = self.hidden(self.lay_out(batch).to(self.device))
        return self.head(hidden_RD[: len(batch.pool_last)])

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    def lay_out(self, batch: PackedBatch) -> Layout:
        """What `hidden` needs of a batch, on the host."""
        *body, last = self._spec.windows
        plans = [*((window, False) for window in body), (last, True)]
        return Layout.of(batch, self.device, causal=True, exact=self._exact, plans=plans)

    def hidden(self, layout: Layout) -> Tensor:
        """The last layer's output (R, D) at the pooled rows. On CUDA it waits for nothing on the host."""
        residual: Tensor = self._base.embed_tokens(layout.input_ids)
        rope, positions = self._base.rotary_emb, layout.position_ids
        angles = {kind: rotary_angles(rope, positions, residual.dtype, kind) for kind in set(self._rope_kinds)}
        branch: Tensor | None = None
        *body, last = self._layers
        for layer, kind in zip(body, self._rope_kinds[:-1], strict=True):
            branch, residual = self._through(layer, branch, residual, layout.plan(layer.window), angles[kind])
        assert isinstance(last, LastLayer)
        return last.pooled(branch, residual, layout, angles[self._rope_kinds[-1]])

    def head(self, hidden_RD: Tensor) -> Tensor:
        """Attributes (R, A) fp32 of what `hidden` gave."""
        head, norm = final_layer(self._module), self._base.norm
        rows = torch.arange(len(hidden_RD), device=hidden_RD.device)
        with torch.autocast(hidden_RD.device.type, enabled=False):
            return pooled_head(
                hidden_RD, rows, head.weight, head.bias,
                norm_weight=norm.weight, eps=self._spec.eps, unit_offset=self._spec.sandwich,
            )  # fmt: skip


class Layer:
    """A decoder layer over all rows. Between layers flow what the last branch gave and the sum before it, so that
    the addition can be part of the next norm."""

    def __init__(self, layer: Any, spec: Spec, window: int | None) -> None:
        self._layer, self._spec, self.window = layer, spec, window
        attention, mlp = layer.self_attn, layer.mlp
        self._norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = Projection(attention.o_proj)
        self._gate_up = Projection(mlp.gate_proj, mlp.up_proj)
        self._down = Projection(mlp.down_proj)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self._qkv, self._o, self._gate_up, self._down

    def __call__(self, branch_TD: Tensor | None, residual_TD: Tensor, plan: AttentionPlan, angles: Pair) -> Pair:
        normed_TD, residual_TD = self._add_norm(branch_TD, residual_TD, self._layer.input_layernorm)
        query, key, value = self._qkv.heads(normed_TD, self._spec.head_dim)
        query, key = self._rotary(query, key, *angles)
        mixed = self._attend(query, key, value, plan)
        return self._feed_forward(self._o(mixed.flatten(1)), residual_TD)

    def _attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, plan: AttentionPlan) -> Tensor:
        return packed_attention(query_THD, key_TKD, value_TKD, plan, scale=self._spec.scale, softcap=self._spec.softcap)

    def _feed_forward(self, branch: Tensor, residual: Tensor) -> Pair:
        layer, spec = self._layer, self._spec
        if spec.sandwich:
            branch = self._norm(branch, layer.post_attention_layernorm)
        before = layer.pre_feedforward_layernorm if spec.sandwich else layer.post_attention_layernorm
        normed, residual = self._add_norm(branch, residual, before)
        branch = self._down(gated(self._gate_up(normed), spec.activation))
        return self._norm(branch, layer.post_feedforward_layernorm) if spec.sandwich else branch, residual

    def _add_norm(self, branch: Tensor | None, residual: Tensor, norm: Any) -> Pair:
        """The norm of the sum, and the sum."""
        if branch is None:
            return self._norm(residual, norm), residual
        return rms_norm(branch, norm.weight, self._spec.eps, residual_TD=residual, unit_offset=self._spec.sandwich)

    def _norm(self, hidden: Tensor, norm: Any) -> Tensor:
        return rms_norm(hidden, norm.weight, self._spec.eps, unit_offset=self._spec.sandwich)[0]

    def _rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        query_norm, key_norm = (None if norm is None else norm.weight for norm in self._norms)
        return rotary(
            query, key, cos, sin,
            query_norm=query_norm, key_norm=key_norm, eps=self._spec.eps, unit_offset=self._spec.sandwich,
        )  # fmt: skip


class LastLayer(Layer):
    """The same arithmetic for the pooled rows alone."""

    def __init__(self, layer: Any, spec: Spec, window: int | None) -> None:
        super().__init__(layer, spec, window)
        attention = layer.self_attn
        self._q = Projection(attention.q_proj)
        self._kv = Projection(attention.k_proj, attention.v_proj)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self._q, self._kv, self._o, self._gate_up, self._down

    def pooled(self, branch_TD: Tensor | None, residual_TD: Tensor, layout: Layout, angles: Pair) -> Tensor:
        """The layer's output (R, D) at the pooled rows, before the final norm."""
        rows, head_dim = layout.pool_rows, self._spec.head_dim
        normed_TD, residual_TD = self._add_norm(branch_TD, residual_TD, self._layer.input_layernorm)
        key, value = self._kv.heads(normed_TD, head_dim)
        (query,) = self._q.heads(normed_TD.index_select(0, rows), head_dim)
        query, key = self._rotary(layout.scatter(query), key, *angles)
        mixed = self._attend(query, key, value, layout.plan(self.window, pooled_only=True)).index_select(0, rows)
        branch, residual = self._feed_forward(self._o(mixed.flatten(1)), residual_TD.index_select(0, rows))
        return residual + branch
