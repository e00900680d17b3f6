"""From a packed batch to scores, one way for each architecture.

Families of decoders and encoders have a packed forward of our own. Others run through transformers' module: packed,
with our attention in it, where that is proven at load, else padded.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from plaudit_kernels import Fp8Linear, Int8Linear

from . import decoder, encoder_trunk, module_trunk
from .errors import ContractError
from .infer import ENCODERS
from .module_trunk import ModuleTrunk, Unpackable
from .packing import PackedBatch
from .padded_trunk import PaddedTrunk
from .projection import EightBits
from .rope import moving_rope


class Trunk(Protocol):
    """Attributes (N, A) fp32 of the sequences of a batch, in the batch's order. Frozen, it may keep copies of the
    weights, which must not change any more, and gives no gradients. `recompute`: whether its layers are computed once
    more in the backward pass instead of being kept for it; ContractError where that is not known to hold."""

    shares_prompt: bool
    reason: str

    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def recompute(self, on: bool) -> None: ...
    def __call__(self, batch: PackedBatch) -> torch.Tensor: ...


def make_trunk(module: nn.Module, *, pooling: str, exact: bool, dtype: str, device: str) -> Trunk:
    """Layers of ours where they are known to hold for this configuration, else the module itself, packed if nothing
    speaks against it, which the proof at load must then confirm; else padded, with the reason. Raises ContractError
    where there are no 8 bits: for other models than decoders of ours, and fp8 on older GPUs."""
    config: Any = module.config
    causal = pooling == "last"
    eight_bits = _rounding(dtype, torch.device(device), exact=exact)
    if not lacks_layers(config):
        if config.model_type not in ENCODERS:
            return decoder.DecoderTrunk(module, exact=exact, eight_bits=eight_bits)
        if not eight_bits:
            return encoder_trunk.EncoderTrunk(module, exact=exact)
    if eight_bits:
        raise ContractError(
            f"{dtype} is for decoders with layers of ours, which {config.model_type} has not: use --dtype bfloat16, or "
            "for int8 on CPUs `plaudit model export --onnx`"
        )
    if reason := moving_rope(config) or module_trunk.unsupported(module, exact=exact):
        return PaddedTrunk(module, causal=causal, exact=exact, reason=reason)
    return ModuleTrunk(module, causal=causal, exact=exact)


def _rounding(dtype: str, device: torch.device, *, exact: bool) -> EightBits | None:
    if dtype == "fp8":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ContractError(f"{torch.cuda.get_device_name(device)} does not multiply fp8: use --dtype int8")
        return EightBits(partial(Fp8Linear, exact=exact), device)
    if dtype == "int8":
        scratch = torch.empty(0, dtype=torch.bfloat16, device=device)
        return EightBits(partial(Int8Linear, exact=exact, scratch=scratch), device)
    return None


def lacks_layers(config: Any) -> str:
    """Why this configuration has no layers of ours; empty if it has."""
    own = encoder_trunk if config.model_type in ENCODERS else decoder
    return own.unsupported(config) or moving_rope(config)


def head_width(config: Any) -> int:
    """Dimensions of a head of attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def padded_instead(trunk: ModuleTrunk, error: Exception) -> PaddedTrunk:
    """The padded trunk of the same module, which gets its own attention back. `error` is what the proof raised."""
    trunk.unplug()
    reason = str(error if isinstance(error, (ContractError, Unpackable)) else repr(error))
    reason = ("" if isinstance(error, Unpackable) else "when packed, ") + reason.partition(";")[0]
    return PaddedTrunk(trunk.module, causal=trunk.causal, exact=trunk.exact, reason=reason)
