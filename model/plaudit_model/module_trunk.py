"""Architectures without layers of ours: transformers' own module over the packed batch, with our attention in it.

The batch is one row of T tokens whose position ids restart with every sequence and go on at the prompt's length for
every response. Attention is plugged in through transformers' `AttentionInterface`, and where the module asks for a
mask, through `AttentionMaskInterface`, it gets the plan of attention's tiles: no (T, T) mask is ever built, and each
layer's window comes from the very rule that the eager forward obeys. Whether nothing else in the module mixes tokens
(convolutions, recurrences, positions counted by row) is for the proof at load to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plaudit_kernels import BLOCK, AttentionPlan, FrozenLinear, packed_attention, select

from .heads import apply_head, is_known, last_hidden_state
from .packed import Layout
from .packing import PackedBatch
from .padded_trunk import recompute_layers

NAME = "plaudit"
"""Under which transformers knows our attention, mask and experts."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HARMLESS = frozenset({"sliding_window", "is_causal", "position_ids"})
"""What else transformers passes to attention and the plan says already."""


class Unpackable(Exception):
    """Why a module cannot run packed."""


class PackedMask:
    """What a layer gets for a mask: which rows its queries see. transformers makes masks that no layer asks for, so
    nothing is planned before one does."""

    def __init__(self, layout: Layout, mask_function: Callable[..., Tensor], size: int | None) -> None:
        self._layout, self._mask_function, self._size = layout, mask_function, size

    @cached_property
    def plan(self) -> AttentionPlan:
        return self._layout.plan(window_of(self._mask_function, self._size, causal=self._layout.causal))


_layout: ContextVar[Layout | None] = ContextVar("_layout", default=None)
"""The batch of the packed forward that this thread is in."""


def unsupported(module: nn.Module, *, exact: bool) -> str:
    """What speaks against running this module packed, as far as its structure tells; empty if nothing does."""
    config: Any = module.config
    base: Any = module.base_model
    if not is_known(module):
        return "its head is not one that is computed here"
    if not base._can_set_attn_implementation():
        return f"{config.model_type} does not ask transformers' attention interface"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{config.model_type} takes no position ids"
    if any(getattr(config, name, None) for name in _EXPERTS) and not base._can_set_experts_implementation():
        return f"the experts of {config.model_type} do not ask transformers' experts interface"
    if exact and select(next(module.parameters()).device).implementation == "triton" and _other_products(base):
        return "products other than those of linear layers depend on the batch on CUDA"
    return ""


class ModuleTrunk:
    """Attributes (N, A) fp32 of a packed batch. With `exact`, rows come in whole blocks."""

    def __init__(self, module: nn.Module, *, causal: bool, exact: bool) -> None:
        self.module, self.causal, self.exact = module, causal, exact
        base: Any = module.base_model
        config: Any = module.config
        self._base = base
        self._own = config._attn_implementation, config._experts_implementation
        self._takes = set(inspect.signature(base.forward).parameters)
        if int(getattr(config, "type_vocab_size", 0) or 0) < 2:
            self._takes.discard("token_type_ids")  # GPT-2 would look them up among its words
        self._first_position = _first_position(base)
        self._set(NAME, NAME)
        self.shares_prompt = causal
        self.reason = "packed: transformers' layers with our attention" + (", prompts shared" if causal else "")

    def unplug(self) -> None:
        """Give the module its own attention, experts and products back."""
        self.thaw()
        self._set(*self._own)

    def freeze(self) -> None:
        """Linear layers compute by products whose bits do not depend on the number of rows, on CUDA either."""
        for layer in self._linears():
            layer.forward = _frozen(layer, exact=self.exact)  # type: ignore[assignment,method-assign]

    def thaw(self) -> None:
        for layer in self._linears():
            vars(layer).pop("forward", None)

    def recompute(self, on: bool) -> None:
        recompute_layers(self.module, on)

    def __call__(self, batch: PackedBatch) -> Tensor:
        device = next(self.module.parameters()).device
        layout = Layout.of(batch, device, causal=self.causal, exact=self.exact).to(device)
        arguments: dict[str, Any] = {
            "input_ids": layout.input_ids[None],
            "position_ids": layout.position_ids[None] + self._first_position,
            "token_type_ids": layout.type_ids[None],
            # Without one, transformers looks for sequences in the position ids.
            "attention_mask": torch.ones_like(layout.input_ids)[None],
            "use_cache": False,
        }
        token = _layout.set(layout)
        try:
            hidden_TD = last_hidden_state(self.module, **{n: arguments[n] for n in arguments if n in self._takes})[0]
        finally:
            _layout.reset(token)
        return apply_head(self.module, hidden_TD.index_select(0, layout.pool_rows[: layout.distinct]))

    def _set(self, attention: str, experts: str | None) -> None:
        self.module.set_attn_implementation(attention)  # type: ignore[operator]
        if self._base._can_set_experts_implementation():
            self.module.set_experts_implementation(experts)  # type: ignore[operator]

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self._base.modules() if type(layer) is nn.Linear]


def _frozen(layer: nn.Linear, *, exact: bool) -> Callable[[Tensor], Tensor]:
    product = FrozenLinear(layer.weight, layer.bias, exact=exact)
    return lambda rows: product(rows.reshape(-1, rows.shape[-1])).view(*rows.shape[:-1], -1)


def _first_position(base: nn.Module) -> int:
    """RoBERTa and its kin count from behind the padding id, which has a position of its own."""
    for name, part in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.padding_idx + 1
    return 0


def _other_products(base: nn.Module) -> bool:
    parts = (part for part in base.modules() if not isinstance(part, (nn.Linear, nn.Embedding)))
    return any(parameter.dim() > 1 for part in parts for parameter in part.parameters(recurse=False))


def _mask(*, mask_function: Callable[..., Tensor], local_size: int | None = None, **rest: Any) -> Any:
    """Called where transformers builds a mask. Outside of a packed forward it is SDPA's."""
    if (layout := _layout.get()) is None:
        return sdpa_mask(mask_function=mask_function, local_size=local_size, **rest)
    return PackedMask(layout, mask_function, local_size)


def window_of(mask_function: Callable[..., Tensor], size: int | None, *, causal: bool) -> int | None:
    """The window of our attention that a mask function of transformers means, asked at places on both sides of every
    boundary that it may have. Raises Unpackable for another mask: prefixes, chunks, blocks."""
    edges = {n * (size or 1) + d for n in (1, 2, 3) for d in (-1, 0, 1)} | {1 << n for n in range(21)}
    places = torch.tensor(sorted({0} | edges))
    query, key = places[:, None], places[None, :]
    ahead = query - key
    everything = ahead >= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    given = mask_function(0, 0, query, key).expand_as(everything)
    if torch.equal(given, everything):
        return None
    if size is not None and torch.equal(given, everything & (ahead < size if causal else ahead.abs() <= size)):
        return size if causal else 2 * size  # a bidirectional layer sees `size` on either side
    raise Unpackable(f"a mask that is not {'causal' if causal else 'bidirectional'}, with or without a sliding window")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, **rest: Any,
) -> Any:  # fmt: skip
    """Attention as transformers calls it: query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D) and None.
    Outside of a packed forward it is SDPA's."""
    if not isinstance(attention_mask, PackedMask):
        if _layout.get() is None:
            rest |= {"dropout": dropout, "scaling": scaling, "softcap": softcap}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
        raise Unpackable("its attention has masks that transformers' mask interface does not describe")
    if strange := sorted(name for name in rest.keys() - _HARMLESS if not (rest[name] is None or rest[name] is False)):
        raise Unpackable(f"its attention takes {', '.join(strange)}")
    if dropout:
        raise Unpackable("its attention drops weights out")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise Unpackable("its attention reads rows of another sequence")
    width = value.shape[-1]
    value = pad(value, (0, query.shape[-1] - width))  # heads of latent attention are narrower in the values
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = packed_attention(query, key, value, attention_mask.plan, scale=scale, softcap=softcap)
    return mixed[None, ..., :width], None


def _experts(module: nn.Module, hidden_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """transformers' grouped experts, each with whole blocks of rows: a product over few rows would give other bits."""
    chosen, count = chosen_TK.reshape(-1), chosen_TK.shape[1]
    experts: Any = module.num_experts
    missing = -torch.bincount(chosen, minlength=experts) % BLOCK
    filler = torch.repeat_interleave(torch.arange(experts, device=chosen.device), missing)
    rows = pad(hidden_TD.repeat_interleave(count, 0), (0, 0, 0, len(filler)))
    weights = pad(weights_TK.reshape(-1), (0, len(filler)))
    out: Tensor = grouped_mm_experts_forward(module, rows, torch.cat([chosen, filler])[:, None], weights[:, None])
    return out[: len(chosen)].view(*hidden_TD.shape[:1], count, -1).sum(1)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
