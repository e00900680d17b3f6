"""How much memory a model takes, predicted from its shape before anything is moved to a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .contract import EIGHT_BITS
from .errors import ModelError

_GIB = 1 << 30


@dataclass(frozen=True)
class Room:
    """What a model may take while it computes batches of `token_budget` tokens: `cap` bytes, None for any number."""

    token_budget: int
    cap: int | None = None

    def prediction(self, module: nn.Module, dtype: str) -> dict[str, int]:
        """Bytes of weights and of what a batch holds in the layer where it holds most.

        Left out: the process itself and its libraries, what an allocator keeps, and the copies of an architecture that
        runs through its own module.
        """
        parameters: list[torch.Tensor] = list(module.parameters())
        exported = parameters[0].is_meta  # then it is a graph of ONNX Runtime's, fp32 but for its int8 weights
        size = 4 if dtype == "float32" or exported else 2
        weights = size * sum(parameter.numel() for parameter in parameters)
        if dtype in EIGHT_BITS:  # but for the embeddings and the head, and with an fp32 scale a row
            base: Any = module.base_model
            rounded = [layer.weight for layer in base.modules() if isinstance(layer, nn.Linear)]
            weights -= sum((size - 1) * weight.numel() - 4 * len(weight) for weight in rounded)
            if dtype == "int8" and not exported:  # gate and up, side by side, are the most that is widened to bf16
                weights += 2 * 2 * max(map(torch.numel, rounded))
        return {"weights": weights, "activations": size * self.token_budget * _numbers_a_token(module.config)}

    def check(self, module: nn.Module, dtype: str) -> None:
        """Raises ModelError if the prediction is above the cap."""
        parts = self.prediction(module, dtype)
        if self.cap is not None and sum(parts.values()) > self.cap:
            weights, activations = (parts[name] / _GIB for name in ("weights", "activations"))
            raise ModelError(
                f"the model needs {weights:.3f} GiB for its weights in {dtype} and {activations:.3f} GiB for batches "
                f"of {self.token_budget} tokens, more than the cap of {self.cap / _GIB:.3f} GiB: "
                "raise --memory-cap, or lower --token-budget or the --dtype"
            )

    def enforce(self, device: str) -> None:
        """Have CUDA's allocator run out of memory at the cap. On a CPU nothing enforces it."""
        if self.cap is not None and torch.device(device).type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(self.cap / total, 1.0), device)


def _numbers_a_token(config: Any) -> int:
    """Live at once in a layer's feed-forward: five rows of the hidden size, queries, keys and values as the product
    gave them and as attention read them, its output, and both halves of the gate with their product."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    width: int = getattr(config, "head_dim", None) or hidden // heads
    keys: int = getattr(config, "num_key_value_heads", None) or heads
    inner: int = getattr(config, "intermediate_size", None) or 4 * hidden
    numbers: int = 5 * hidden + 3 * width * (heads + keys) + 3 * inner
    return numbers
