from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plaudit_model.encode import Encoded
from plaudit_model.errors import ModelError
from plaudit_model.footprint import Room
from plaudit_model.reward_model import RewardModel


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it held at once. Views are of what they view."""

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[int, int] = {}
        self.bytes = self._live = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._hold(tensor)
        return made

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        self._live += 0 if self._views.get(place) else size
        self._views[place] = self._views.get(place, 0) + 1
        self.bytes = max(self.bytes, self._live)
        weakref.finalize(tensor, self._let_go, place, size)

    def _let_go(self, place: int, size: int) -> None:
        self._views[place] -= 1
        self._live -= 0 if self._views[place] else size


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "bert"])
def test_the_prediction_is_what_a_forward_holds_give_or_take(
    reward_model_dir: Callable[[str], Path], family: str
) -> None:
    model = RewardModel.load(reward_model_dir(family), device="cpu")
    items = [Encoded(torch.arange(5, 405, dtype=torch.int32).numpy(), 0) for _ in range(4)]
    with Peak() as peak:
        model.score_encoded(items, token_budget=1600)
    predicted = Room(1600).prediction(model.module, model.dtype)
    assert predicted["weights"] == sum(p.numel() for p in model.module.parameters()) * 4
    assert 0.6 * predicted["activations"] < peak.bytes < 1.2 * predicted["activations"]
    assert Room(1600).prediction(model.module, "bfloat16")["weights"] == predicted["weights"] / 2


def test_a_model_that_does_not_fit_is_refused_before_it_is_moved(reward_model_dir: Callable[[str], Path]) -> None:
    directory = reward_model_dir("qwen3")
    needed = sum(Room(512).prediction(RewardModel.load(directory).module, "float32").values())
    assert RewardModel.load(directory, room=Room(512, needed)).parameters > 0
    with pytest.raises(ModelError, match=r"batches of 512 tokens, more than the cap of 0\.\d+ GiB: raise --memory-cap"):
        RewardModel.load(directory, room=Room(512, needed - 1))
    assert RewardModel.load(directory, dtype="bfloat16", room=Room(512, needed - 1)).dtype == "bfloat16"


def test_the_cap_is_enforced_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, str]] = []
    device = type("Device", (), {"total_memory": 80 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: told.append(args))
    for cap, where in ((None, "cuda"), (20 << 30, "cpu"), (20 << 30, "cuda:1"), (100 << 30, "cuda")):
        Room(4096, cap).enforce(where)
    assert told == [(0.25, "cuda:1"), (1.0, "cuda")]
