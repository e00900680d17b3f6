"""Linear layers that read the same rows, computed as one product; layers with LoRA adapters, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from plaudit_kernels import Fp8Linear, FrozenLinear, Int8Linear

Frozen = FrozenLinear | Fp8Linear | Int8Linear
Freeze = Callable[[torch.Tensor, torch.Tensor | None], Frozen]
"""What makes a frozen layer of a weight (N, K) and a bias (N,)."""


class EightBits(NamedTuple):
    """How weights are rounded to 8 bits as they are frozen, and on which device: it gets one product's at a time, and
    never holds them all as they were."""

    freeze: Freeze
    device: torch.device


class Projection:
    """The outputs of `layers` side by side: (T, K) -> (T, N1 + N2 + ...).

    Live, it reads the layers' weights at each call, and gradients flow to them. Frozen, it keeps them joined: for a
    model that is served. A layer with an adapter computes x W^T + (alpha / r) (x A^T) B^T itself, live alone: it is
    merged, and this made anew, before anything is frozen.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self._layers = layers
        self._adapted = not all(isinstance(layer, nn.Linear) for layer in layers)
        self._frozen: Frozen | None = None

    def freeze(self, freeze: Freeze, device: torch.device | None = None) -> None:
        """Keep the weights as they are now, on `device` if it is given, and nothing twice: the layers' own become views
        of them or, where they are laid out anew, one NaN in the shape of each, until they are thawed. Rounded to 8 bits
        they cannot be thawed: ValueError."""
        assert not self._adapted, "merge the adapters first"
        self.thaw()
        for layer in self._layers:
            layer.to(device or layer.weight.device)
        weight, bias = self._joined()
        self._frozen = freeze(weight, bias)
        if self._frozen.blocked:
            for layer in self._layers:
                layer.weight.data = layer.weight.new_full((1, 1), torch.nan).expand_as(layer.weight)
        elif len(self._layers) > 1:
            self._give_back(weight.detach())

    def thaw(self) -> None:
        if self._frozen is not None and self._frozen.blocked:
            self._give_back(self._frozen.dense())
        self._frozen = None

    def _give_back(self, weight_NK: torch.Tensor) -> None:
        row = 0
        for layer in self._layers:
            layer.weight.data = weight_NK[row : (row := row + layer.out_features)]

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        if self._frozen:
            return self._frozen(x_TK)
        if self._adapted:
            return torch.cat([layer(x_TK) for layer in self._layers], dim=-1)
        return linear(x_TK, *self._joined())

    def heads(self, x_TK: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
        """The output of each layer by itself, as heads (T, N / width, width): views of the one product."""
        product, parts, column = self(x_TK), [], 0
        for layer in self._layers:
            parts.append(product[:, column : column + layer.out_features].view(len(x_TK), -1, width))
            column += layer.out_features
        return tuple(parts)

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        first = self._layers[0]
        if len(self._layers) == 1:
            return first.weight, first.bias
        bias = None if first.bias is None else torch.cat([layer.bias for layer in self._layers])
        return torch.cat([layer.weight for layer in self._layers]), bias


class Projecting(Protocol):
    """A layer with projections."""

    @property
    def projections(self) -> tuple[Projection, ...]: ...


class Freezable:
    """A stack of layers: weights can be frozen, and what is computed for the backward pass forgotten until then."""

    _layers: Sequence[Projecting]
    _exact: bool
    _eight_bits: EightBits | None = None
    _recompute: bool = False

    def freeze(self) -> None:
        """The weights will not change any more."""
        for projection in self._projections():
            projection.freeze(*(self._eight_bits or [partial(FrozenLinear, exact=self._exact)]))

    def thaw(self) -> None:
        """They may change again, and have gradients."""
        for projection in self._projections():
            projection.thaw()

    def recompute(self, on: bool) -> None:
        """Whether a layer keeps nothing for the backward pass but its inputs (Chen et al., 1604.06174)."""
        self._recompute = on

    def _through(self, layer: Any, *inputs: Any) -> Any:
        """The output of any layer but the last: the backward pass needs that one first, while it is all there is."""
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _projections(self) -> list[Projection]:
        return [projection for layer in self._layers for projection in layer.projections]
