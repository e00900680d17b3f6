"""The packed forward of encoders: BERT and RoBERTa (norms after the sum), ModernBERT (norms before it).

No padding. A bidirectional prompt depends on its response from the second layer on, so nothing is shared. Of the last
layer only the pooled tokens' output is read, and only theirs is computed (but ModernBERT's queries, which are one
layer with its keys and values).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plaudit_kernels import Activation, AttentionPlan, bias_gelu, gated, layer_norm, packed_attention, rotary

from .heads import apply_head
from .packed import Layout
from .packing import PackedBatch
from .projection import Freezable, Projection
from .rope import rotary_angles

FAMILIES = frozenset({"bert", "roberta", "xlm-roberta", "modernbert"})

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}

Angles = tuple[Tensor, Tensor]


def unsupported(config: Any) -> str:
    """Why this encoder's configuration has no packed forward; empty if it has one."""
    if config.model_type not in FAMILIES:
        return f"packing is not proven for {config.model_type}"
    if getattr(config, "is_decoder", False):
        return "an encoder configured as a decoder"
    modern = config.model_type == "modernbert"
    if modern and config.classifier_pooling != "cls":
        return f"pooling {config.classifier_pooling}"
    activation = config.hidden_activation if modern else config.hidden_act
    known = activation in _ACTIVATIONS and (modern or activation != "silu")
    return "" if known else f"activation {activation}"


class EncoderLayer(Protocol):
    """A layer: its output at all rows, or with `layout`, for the last one, at the pooled rows alone."""

    @property
    def window(self) -> int | None: ...
    @property
    def projections(self) -> tuple[Projection, ...]: ...

    def __call__(
        self, hidden_TD: Tensor, plan: AttentionPlan, angles: Angles | None, layout: Layout | None
    ) -> Tensor: ...


class EncoderTrunk(Freezable):
    """Attributes (N, A) fp32 of a packed batch; with `exact`, rows come in whole blocks."""

    shares_prompt = False

    def __init__(self, module: nn.Module, *, exact: bool) -> None:
        base: Any = module.base_model
        config: Any = module.config
        self._module, self._base, self._exact = module, base, exact
        self._modern = config.model_type == "modernbert"
        self._first_position = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        if self._modern:
            self._layers: list[EncoderLayer] = [PreNormLayer(layer, config) for layer in base.layers]
            self._kinds: tuple[str | None, ...] = tuple(layer.attention_type for layer in base.layers)
        else:
            *body, last = base.encoder.layer
            self._layers = [*(PostNormLayer(layer, config) for layer in body), PostNormLayer(last, config, last=True)]
            self._kinds = (None,) * len(self._layers)
        self.reason = "packed: own layers"

    def __call__(self, batch: PackedBatch) -> Tensor:
        hidden_RD = self.hidden(self.lay_out(batch).to(self.device))
        return self.head(hidden_RD[: len(batch.pool_first)])

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    def lay_out(self, batch: PackedBatch) -> Layout:
        """What `hidden` needs of a batch, on the host."""
        *body, last = self._layers
        plans = [*((layer.window, False) for layer in body), (last.window, True)]
        return Layout.of(batch, self.device, causal=False, exact=self._exact, plans=plans)

    def hidden(self, layout: Layout) -> Tensor:
        """The last layer's output (R, D) at the pooled rows. On CUDA it waits for nothing on the host."""
        hidden = self._embed(layout)
        angles = {kind: self._angles(hidden, layout, kind) for kind in set(self._kinds)}
        *body, last = self._layers
        for layer, kind in zip(body, self._kinds[:-1], strict=True):
            hidden = self._through(layer, hidden, layout.plan(layer.window), angles[kind], None)
        pooled_plan = layout.plan(last.window, pooled_only=True)
        pooled_RD = last(hidden, pooled_plan, angles[self._kinds[-1]], layout)
        return self._base.final_norm(pooled_RD) if self._modern else pooled_RD

    def head(self, hidden_RD: Tensor) -> Tensor:
        """Attributes (R, A) fp32 of what `hidden` gave."""
        return apply_head(self._module, hidden_RD)

    def _embed(self, layout: Layout) -> Tensor:
        arguments: dict[str, Tensor] = {"input_ids": layout.input_ids[None]}
        if not self._modern:
            arguments["position_ids"] = layout.position_ids[None] + self._first_position
            types = layout.type_ids if self._base.config.type_vocab_size > 1 else torch.zeros_like(layout.type_ids)
            arguments["token_type_ids"] = types[None]
        hidden: Tensor = self._base.embeddings(**arguments)
        return hidden[0]

    def _angles(self, hidden: Tensor, layout: Layout, kind: str | None) -> Angles | None:
        return rotary_angles(self._base.rotary_emb, layout.position_ids, hidden.dtype, kind) if kind else None


class PostNormLayer:
    """BERT's and RoBERTa's: the norm comes after the sum."""

    window: int | None = None

    def __init__(self, layer: Any, config: Any, *, last: bool = False) -> None:
        attention = layer.attention.self
        self._head_dim = attention.attention_head_size
        self._activation = _ACTIVATIONS[config.hidden_act]
        self._norms = layer.attention.output.LayerNorm, layer.output.LayerNorm
        self._qkv = Projection(*([] if last else [attention.query]), attention.key, attention.value)
        self._q: tuple[Projection, ...] = (Projection(attention.query),) if last else ()
        self._o, self._up = Projection(layer.attention.output.dense), Projection(layer.intermediate.dense)
        self._down = Projection(layer.output.dense)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return *self._q, self._qkv, self._o, self._up, self._down

    def __call__(self, hidden_TD: Tensor, plan: AttentionPlan, angles: Angles | None, layout: Layout | None) -> Tensor:
        if layout is None:
            query, key, value = self._qkv.heads(hidden_TD, self._head_dim)
        else:
            key, value = self._qkv.heads(hidden_TD, self._head_dim)
            hidden_TD = hidden_TD.index_select(0, layout.pool_rows)
            (query,) = self._q[0].heads(hidden_TD, self._head_dim)
            query = layout.scatter(query)
        mixed = packed_attention(query, key, value, plan, scale=self._head_dim**-0.5)
        if layout is not None:
            mixed = mixed.index_select(0, layout.pool_rows)
        hidden = _norm(self._norms[0], self._o(mixed.flatten(1)), hidden_TD)
        inner = bias_gelu(self._up(hidden), None, self._activation)
        return _norm(self._norms[1], self._down(inner), hidden)


class PreNormLayer:
    """ModernBERT's: the norm comes before each branch, the feed-forward is gated, positions are rotary."""

    def __init__(self, layer: Any, config: Any) -> None:
        self._layer = layer
        self._head_dim = layer.attn.head_dim
        self._activation = _ACTIVATIONS[config.hidden_activation]
        self.window = 2 * config.sliding_window if layer.attention_type == "sliding_attention" else None
        self._qkv, self._o = Projection(layer.attn.Wqkv), Projection(layer.attn.Wo)
        self._gate_up, self._down = Projection(layer.mlp.Wi), Projection(layer.mlp.Wo)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self._qkv, self._o, self._gate_up, self._down

    def __call__(self, hidden_TD: Tensor, plan: AttentionPlan, angles: Angles | None, layout: Layout | None) -> Tensor:
        assert angles is not None, "positions are rotary"
        normed_TD = self._layer.attn_norm(hidden_TD)
        (heads,) = self._qkv.heads(normed_TD, self._head_dim)
        query, key, value = heads.chunk(3, 1)
        query, key = rotary(query, key, *angles)
        mixed = packed_attention(query, key, value, plan, scale=self._head_dim**-0.5)
        if layout is not None:
            mixed, hidden_TD = (rows.index_select(0, layout.pool_rows) for rows in (mixed, hidden_TD))
        norm = self._layer.mlp_norm
        normed, residual = layer_norm(
            self._o(mixed.flatten(1)), norm.weight, norm.bias, norm.eps, residual_TD=hidden_TD
        )
        return residual + self._down(gated(self._gate_up(normed), self._activation))


def _norm(norm: nn.LayerNorm, branch: Tensor, residual: Tensor) -> Tensor:
    return layer_norm(branch, norm.weight, norm.bias, norm.eps, residual_TD=residual)[0]
