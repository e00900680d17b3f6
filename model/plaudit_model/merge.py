"""From an adapter to a checkpoint that needs no base, and no PEFT to load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .infer import resolve
from .reward_model import RewardModel


def merge_adapter(adapter: str | Path, out: Path) -> RewardModel:
    """Write the reward model that an adapter and its base make as a checkpoint of its own, in fp32: plain
    `AutoModelForSequenceClassification` loads it, and it scores as the adapter does, bit for bit.

    Raises what `RewardModel.load` raises, and FileExistsError if `out` is there.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already")
    model = RewardModel.load(resolve(adapter), dtype="float32", device="cpu")
    lineage = {**model.contract.lineage, "merged": {"adapter": str(adapter), "revision": model.contract.revision()}}
    model.save(out, replace(model.contract, lineage=lineage))
    return model
