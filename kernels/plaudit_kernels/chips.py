"""Which of the checked-in tables of block sizes holds for a device: decided once, when it is first used."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

TableName = Literal["sm_90", "default"]


@lru_cache(maxsize=16)
def table_of(device: torch.device) -> TableName:
    """`sm_90` for an H100 or H200, and in the interpreter, which walks the blocks that ship; else `default`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0):
        return "sm_90"
    return "default"


def table_in_words(device: torch.device) -> str:
    """The same for `/info`: a table that was made for another chip is named as such."""
    if (name := table_of(device)) != "default":
        return f"block sizes of {name}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"default block sizes, there are none for sm_{major}{minor} ({torch.cuda.get_device_name(device)})"
